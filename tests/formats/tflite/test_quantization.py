"""Quantization parameters: blockwise, per tensor, per axis, and those that cannot be right."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Loss
from nibblecast.formats.tflite import schema
from tests.formats.tflite.models import (
    FIXTURES,
    Fields,
    Load,
    Patch,
    affine,
    blockwise,
    constant,
    ints,
    model,
    table,
    tensor,
)

# ---- blockwise -----------------------------------------------------------------------------------


def test_blockwise_scales_are_the_tensor_of_their_own_name() -> None:
    loaded = nibblecast.load(FIXTURES / "mlp_int4_blockwise.tflite")
    weight, scales = loaded["mlp_1/dense_1_1/MatMul"], loaded["mlp_1/dense_1_1/MatMul_scales"]
    assert weight.quantization is not None
    assert weight.quantization.scale is scales
    assert (scales.parameter_of, weight.parameter_of) == (weight.name, None)
    assert (scales.shape, scales.dtype, scales.quantization) == ((32, 2), np.float16, None)
    assert weight.quantization.zero_point is None


CODES = bytes(range(0x10, 0x20))  # 32 INT4 codes
SCALES = np.arange(1, 9, dtype=np.float16)


def blockwise_model(
    quantization: Fields, shape: Sequence[int] = (4, 8), scales: NDArray[Any] = SCALES, first: bool = False
) -> bytes:
    weight = constant("w", "INT4", shape, CODES, quantization=quantization)
    parameter = constant("s", scales.dtype.name.upper(), scales.shape, scales.tobytes())
    return model([parameter, weight] if first else [weight, parameter])


def test_blocks_run_along_the_last_dimension(load: Load) -> None:
    weight = load(blockwise_model(blockwise(1, 4)))["w"]
    assert weight.granularity == "blockwise (1, 4)"
    expected = weight.codes().reshape(8, 4).astype(np.float32) * SCALES.astype(np.float32)[:, None]
    assert np.array_equal(weight.dequantize(), expected.reshape(4, 8))


def test_scales_of_another_shape_count_in_order(load: Load) -> None:
    loaded = load(blockwise_model(blockwise(1, 4), scales=SCALES.astype(np.float32)))
    assert loaded["s"].shape == (8,)
    assert loaded["w"].quantization is not None
    assert loaded["w"].quantization.scale.shape == (4, 2)
    assert np.array_equal(loaded["w"].quantization.scale.codes().reshape(-1), loaded["s"].codes())


def test_blockwise_zero_points_are_a_tensor_too(load: Load) -> None:
    points = np.arange(-4, 4, dtype=np.int32)
    content = model(
        [
            constant("w", "INT4", (4, 8), CODES, quantization=blockwise(1, 4, 2)),
            constant("s", "FLOAT16", (4, 2), SCALES.tobytes()),
            constant("z", "INT32", (4, 2), points.tobytes()),
        ]
    )
    loaded = load(content)
    assert loaded["w"].quantization is not None
    assert loaded["w"].quantization.zero_point is loaded["z"]
    assert loaded["z"].parameter_of == "w"
    shifted = loaded["w"].codes().reshape(8, 4) - points[:, None]
    assert np.array_equal(loaded["w"].dequantize().reshape(8, 4), shifted.astype(np.float32) * SCALES[:, None])


def test_two_weights_may_share_their_scales(load: Load) -> None:
    content = model(
        [
            constant("a", "INT4", (4, 8), CODES, quantization=blockwise(1, 4)),
            constant("s", "FLOAT16", (4, 2), SCALES.tobytes()),
            constant("b", "INT4", (4, 8), CODES, quantization=blockwise(1, 4)),
        ]
    )
    loaded = load(content)
    assert loaded["a"].quantization is not None
    assert loaded["b"].quantization is not None
    assert loaded["a"].quantization.scale is loaded["b"].quantization.scale is loaded["s"]
    assert loaded["s"].parameter_of == "a"


@pytest.mark.parametrize("zero_points", [None, 0])
def test_zero_points_of_tensor_0_are_the_schemas_default_and_none(load: Load, zero_points: int | None) -> None:
    """An absent field reads as 0: tensor 0 is left alone, whatever it is."""
    kernel = constant("kernel", "INT4", (4, 2), bytes(4), quantization=affine([0.5]))
    weight = constant("w", "INT4", (8, 4), CODES, quantization=blockwise(2, 4, zero_points))
    parameter = constant("s", "FLOAT16", (8, 1), SCALES.tobytes())
    for first in (constant("bias", "FLOAT32", (8,), bytes(32)), tensor("input", "INT8", (1, 4))):
        loaded = load(model([first, weight, parameter]))
        assert loaded["w"].quantization is not None
        assert loaded["w"].quantization.zero_point is None
    wide = constant("w", "INT4", (4, 8), CODES, quantization=blockwise(2, 8, zero_points))
    loaded = load(model([kernel, wide, constant("s", "FLOAT16", (4, 1), SCALES[:4].tobytes())]))
    assert loaded["w"].quantization is not None
    assert loaded["w"].quantization.zero_point is None
    assert loaded["kernel"].granularity == "per-tensor"
    assert loaded["kernel"].parameter_of is None


@pytest.mark.parametrize("zero_points", [None, 0])
def test_a_blockwise_weight_that_is_tensor_0_is_not_its_own_zero_points(load: Load, zero_points: int | None) -> None:
    weight = constant("w", "INT4", (1, 8), CODES[:4], quantization=blockwise(1, 1, zero_points))
    loaded = load(model([weight, constant("s", "FLOAT16", (1, 8), SCALES.tobytes())]))
    assert loaded["w"].quantization is not None
    assert loaded["w"].quantization.zero_point is None
    assert loaded["w"].parameter_of is None


@pytest.mark.parametrize("block_size", [3, 5, 16, 64, 0, -4, -(2**31)])
def test_a_block_that_does_not_divide_is_refused(load: Load, block_size: int) -> None:
    with pytest.raises(CorruptFile, match=rf"tensor 'w': has blocks of {block_size} along the last dimension"):
        load(blockwise_model(blockwise(1, block_size)))


def test_a_block_size_patched_in_a_real_file_is_refused(tmp_path: Path) -> None:
    patch = Patch("mlp_int4_blockwise.tflite")
    details = patch.child(patch.quantization("dense_1_1/MatMul"), schema.QuantizationParameters.blockwise.slot)
    patch.put("i", patch.need(details, schema.BlockwiseQuantization.block_size.slot), 48)
    with pytest.raises(CorruptFile, match=r"dense_1_1/MatMul': has blocks of 48 along .* \(32, 64\); a divisor"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


@pytest.mark.parametrize("scales", [-1, 2, 2**31 - 1, -(2**31)])
def test_a_scales_index_out_of_range_is_refused(load: Load, scales: int) -> None:
    with pytest.raises(CorruptFile, match=rf"tensor 'w': names tensor {scales} as a parameter"):
        load(blockwise_model(blockwise(scales, 4)))


def test_scales_that_name_the_weight_itself_are_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match="tensor 'w': names tensor 0 as a parameter"):
        load(blockwise_model(blockwise(0, 4)))


@pytest.mark.parametrize(
    "scales", [SCALES[:7], np.ones(16, np.float16), np.ones((8, 4), np.float16), np.ones(8, np.int32)]
)
def test_scales_that_do_not_fit_are_refused(load: Load, scales: NDArray[Any]) -> None:
    expected = rf"from tensor 's' of {scales.dtype} and shape .*; floats of shape \(4, 2\) are needed"
    with pytest.raises(CorruptFile, match=expected):
        load(blockwise_model(blockwise(1, 4), scales=scales))


def test_zero_points_that_do_not_fit_are_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match=r"its zero points from tensor 1, which holds no integers of shape \(4, 2\)"):
        load(blockwise_model(blockwise(1, 4, 1)))


def test_scales_that_are_an_activation_are_refused(load: Load) -> None:
    weight = constant("w", "INT4", (4, 8), CODES, quantization=blockwise(1, 4))
    with pytest.raises(CorruptFile, match="names tensor 1 as a parameter, which holds no constant numbers"):
        load(model([weight, tensor("s", "FLOAT16", (4, 2))]))


def test_a_block_shape_is_not_guessed_at(load: Load) -> None:
    with pytest.raises(Unsupported, match=r"block shape \[1, 4\]"):
        load(blockwise_model(blockwise(1, 4, block_shape=ints(1, 4))))


@pytest.mark.parametrize("details_type", [1, 4, 255])
def test_quantization_details_of_unknown_type_are_refused(load: Load, details_type: int) -> None:
    quantization = table(schema.QuantizationParameters, details_type=np.uint8(details_type))
    with pytest.raises(Unsupported, match=f"tensor 'w': has quantization details of type {details_type}"):
        load(blockwise_model(quantization))


def test_blockwise_details_that_are_missing_are_refused(load: Load) -> None:
    with pytest.raises(Unsupported, match="has quantization details of type 2"):
        load(blockwise_model(table(schema.QuantizationParameters, details_type=np.uint8(2))))


def multi_axis(dimensions: Sequence[int], block_size: int) -> Fields:
    details = table(
        schema.MultiAxisQuantization,
        scales=np.int32(1),
        zero_points=np.int32(-1),
        block_size=np.int32(block_size),
        quantized_dimensions=ints(*dimensions),
    )
    return table(schema.QuantizationParameters, details_type=np.uint8(3), multi_axis=details)


def test_multi_axis_quantization(load: Load) -> None:
    scales = np.arange(1, 9, dtype=np.float32)
    weight = load(blockwise_model(multi_axis([0, 2], 2), (2, 2, 8), scales))["w"]
    assert weight.quantization is not None
    assert weight.quantization.block_shape == (1, 2, 2)
    expected = weight.codes().reshape(2, 2, 4, 2) * scales.reshape(2, 1, 4, 1)
    assert np.array_equal(weight.dequantize().reshape(2, 2, 4, 2), expected)


@pytest.mark.parametrize(("dimensions", "block_size"), [([], 0), ([0, 0], 0), ([3], 0), ([-1], 0), ([2], 3), ([2], -1)])
def test_impossible_multi_axis_quantization_is_refused(load: Load, dimensions: list[int], block_size: int) -> None:
    with pytest.raises(CorruptFile, match=r"quantized along dimensions|has blocks of"):
        load(blockwise_model(multi_axis(dimensions, block_size), (2, 2, 8)))


# ---- per tensor and per axis ---------------------------------------------------------------------


def spoiled(tmp_path: Path, name: str, tensor: str, slot: int, form: str, value: float, at: int = 0) -> Path:
    """A fixture with one number of a tensor's quantization vectors (or, with `at` -1, of its table) overwritten."""
    patch = Patch(name)
    table = patch.quantization(tensor)
    place = patch.need(table, slot) if at < 0 else patch.child(table, slot) + 4 * at
    struct.pack_into("<" + form, patch.data, place, value)
    return patch.write(tmp_path / name)


SCALE = schema.QuantizationParameters.scale.slot
ZERO_POINT = schema.QuantizationParameters.zero_point.slot


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number_is_refused_with_its_channel(tmp_path: Path, value: float) -> None:
    path = spoiled(tmp_path, "cnn_int4_per_channel.tflite", "conv_1/convolution", SCALE, "f", value, at=1 + 5)
    with pytest.raises(CorruptFile, match=rf"convolution': has scale {value} for channel 5; a finite number"):
        nibblecast.load(path)


def test_scales_of_zero_and_below_are_kept(load: Load) -> None:
    weight = load(model([constant("w", "INT4", (2, 2), b"\x21\x43", quantization=affine([0.0, -2.0]))]))["w"]
    assert weight.dequantize().tolist() == [[0, 0], [-6, -8]]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_as_many_zero_points_as_scales_are_needed(tmp_path: Path, count: int) -> None:
    name = "cnn_int4_per_channel.tflite"
    path = spoiled(tmp_path, name, "conv_1/convolution", ZERO_POINT, "I", count)
    with pytest.raises(CorruptFile, match=rf"convolution': has 8 scales but {count} zero points"):
        nibblecast.load(path)


@pytest.mark.parametrize("axis", [1, 3, -1, 2**31 - 1])
def test_scales_along_a_dimension_of_another_size_are_refused(load: Load, axis: int) -> None:
    weight = constant("w", "INT4", (8, 3, 3, 3), bytes(108), quantization=affine([1] * 8, axis=axis))
    with pytest.raises(CorruptFile, match=rf"tensor 'w': has 8 scales along dimension {axis} of shape \(8, 3, 3, 3\)"):
        load(model([weight]))


@pytest.mark.parametrize("axis", [2, -1])
def test_a_single_scale_along_an_impossible_dimension_is_refused(load: Load, axis: int) -> None:
    weight = constant("w", "INT4", (2, 2), bytes(2), quantization=affine([1], axis=axis))
    with pytest.raises(CorruptFile, match=rf"tensor 'w': has 1 scales along dimension {axis} of shape \(2, 2\)"):
        load(model([weight]))


def test_scales_that_a_1d_tensor_has_no_place_for_are_refused(load: Load) -> None:
    for axis in (0, 5, -5):
        bias = constant("b", "INT32", (3,), bytes(12), quantization=affine([1, 2], axis=axis))
        with pytest.raises(CorruptFile, match=f"tensor 'b': has 2 scales along dimension {axis} of shape"):
            load(model([bias]))


def test_a_scale_count_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    patch = Patch("mlp_int4_odd.tflite")
    for slot in (SCALE, ZERO_POINT):
        patch.put("I", patch.child(patch.quantization("dense_1_1/MatMul"), slot), 6)
    with pytest.raises(CorruptFile, match=r"has 6 scales along dimension 0 of shape \(7, 5\)"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


@pytest.mark.parametrize("axis", [1, 3, -1])
def test_the_axis_of_a_1d_bias_is_taken_as_0_and_reported(load: Load, axis: int) -> None:
    """tflite-micro's own person_detect has such biases."""
    codes = np.array([1, -2, 3], np.int32)
    loaded = load(model([constant("b", "INT32", (3,), codes.tobytes(), quantization=affine([1, 2, 4], axis=axis))]))
    assert loaded["b"].granularity == "per-axis 0"
    assert loaded["b"].dequantize().tolist() == [1, -4, 12]
    assert loaded.losses == (
        Loss("b", "reinterpreted", f"its quantized dimension {axis} is taken as 0, because it is 1-D"),
    )


def test_a_table_without_scales_is_no_quantization(load: Load) -> None:
    for quantization in (table(schema.QuantizationParameters, quantized_dimension=np.int32(1)), affine([])):
        assert load(model([constant("w", "INT8", (2,), b"\1\2", quantization=quantization)]))["w"].quantization is None


def test_scales_of_floats_are_leftovers(load: Load) -> None:
    loaded = load(model([constant("w", "FLOAT32", (2,), bytes(8), quantization=affine([1, 2, 3]))]))
    assert loaded["w"].quantization is None


@pytest.mark.parametrize(("scale", "granularity"), [([0.5], "per-tensor"), ([1, 2, 3], "per-axis 1")])
def test_parameters_have_the_grids_shape(load: Load, scale: list[float], granularity: str) -> None:
    weight = load(model([constant("w", "INT8", (2, 3), bytes(6), quantization=affine(scale, axis=1))]))["w"]
    assert weight.granularity == granularity
    assert weight.quantization is not None
    assert weight.quantization.scale.shape == (1, len(scale))


def test_a_scalar_can_be_quantized(load: Load) -> None:
    weight = load(model([constant("w", "INT8", (), b"\x05", quantization=affine([0.5], [3]))]))["w"]
    assert (weight.shape, weight.dequantize().item()) == ((), 1.0)
