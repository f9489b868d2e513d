"""codes -> floats, against the formula written out element by element."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters import ir
from nibblecast.converters.arithmetic import decoding
from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.converters.ir import (
    GroupIndex,
    Model,
    Quantization,
    Tensor,
    blocked,
    grid_shape,
    per_axis,
    per_tensor,
)
from nibblecast.converters.stages import dequantize as stage

DTYPES = [
    ml_dtypes.int2,
    ml_dtypes.uint2,
    ml_dtypes.int4,
    ml_dtypes.uint4,
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
    np.int64,
]


def codes_of(dtype: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    info = ml_dtypes.iinfo(dtype)
    limit = 1 << 30
    codes = rng.integers(max(int(info.min), -limit), min(int(info.max), limit), shape, endpoint=True)
    return codes.astype(dtype)


def formula(tensor: Tensor) -> np.ndarray:
    """scale * (code - zero_point) + offset, one float32 operation at a time, one element at a time."""
    quantization = tensor.quantization
    assert quantization is not None
    codes = tensor.codes()
    scale = quantization.scale.numpy()
    zero_point = quantization.zero_point.numpy() if quantization.zero_point else None
    offset = quantization.offset.numpy() if quantization.offset else None
    values = np.empty(tensor.shape, np.float32)
    for index in product(*map(range, tensor.shape)):
        block = [i // b for i, b in zip(index, quantization.block_shape, strict=True)]
        if quantization.group_index is not None:
            axis = quantization.group_index.axis
            block[axis] = int(quantization.group_index.index.numpy()[index[axis]])
        at = tuple(block)
        code = codes[index]
        if quantization.codebook is not None:
            code = quantization.codebook.numpy()[code]
        if zero_point is None:
            difference = np.float32(code)
        elif zero_point.dtype.kind == "f":
            difference = np.float32(code) - np.float32(zero_point[at])
        else:
            difference = np.float32(int(code) - int(zero_point[at]))
        value = difference * np.float32(scale[at])
        values[index] = value + np.float32(offset[at]) if offset is not None else value
    return values


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    block_shape = tuple(draw(st.integers(1, size)) for size in shape)
    grid = grid_shape(shape, block_shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    zero_point = draw(st.sampled_from([None, dtype, np.dtype(np.int8), np.dtype(np.int64), np.dtype(np.float32)]))
    scale_dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]))

    def parameter(name: str, array: np.ndarray) -> Tensor:
        return Tensor.from_array(name, array)

    zeros = None
    if zero_point is not None:
        zeros = rng.normal(size=grid).astype(np.float32) if zero_point.kind == "f" else codes_of(zero_point, grid, rng)
    return Tensor.from_array(
        "w",
        codes_of(dtype, shape, rng),
        Quantization(
            parameter("scale", rng.normal(size=grid).astype(scale_dtype)),
            block_shape,
            None if zeros is None else parameter("zero_point", zeros),
            parameter("offset", rng.normal(size=grid).astype(np.float32)) if draw(st.booleans()) else None,
        ),
    )


HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@settings(max_examples=100)
@given(tensors(), st.sampled_from(HALVES))
def test_a_library_rounds_its_values_once_and_float32_is_before_that(tensor: Tensor, dtype: np.dtype[Any]) -> None:
    plain = formula(tensor)
    rounding = replace(tensor, quantization=replace(tensor.quantization, value_dtype=dtype))
    other = HALVES[1 - HALVES.index(dtype)]
    with np.errstate(over="ignore"):
        library = plain.astype(dtype)
        np.testing.assert_array_equal(rounding.dequantize(np.float32), plain)
        np.testing.assert_array_equal(rounding.dequantize(dtype), library)
        np.testing.assert_array_equal(rounding.dequantize(other), library.astype(other))


def test_what_a_format_cannot_round_to_is_a_loss_and_its_float32_values_stay() -> None:
    scale = Tensor.from_array("s", np.float16([[0.1], [0.3]]))
    quantization = Quantization(scale, (1, 4), value_dtype=np.dtype(np.float16))
    tensor = Tensor.from_array("w", np.arange(8, dtype=np.int8).reshape(2, 4), quantization)
    model = stage.compute_in_float32(Model({"w": tensor}))
    assert [str(loss) for loss in model.losses] == [
        "changed: w: its values are computed in float32 and not rounded to float16, as its producer rounds them"
    ]
    changed = model["w"].quantization
    assert changed is not None
    assert changed.value_dtype is None
    np.testing.assert_array_equal(model["w"].dequantize(), tensor.dequantize())


def test_a_library_that_computes_in_16_bits_rounds_no_more_in_the_end() -> None:
    scale = Tensor.from_array("s", np.ones((1,), np.float32))
    for compute_dtype, value_dtype in ((*HALVES,), (np.dtype(np.float32), np.dtype(np.float32))):
        with pytest.raises(CorruptFile, match="in the end"):
            Quantization(scale, (1,), compute_dtype=compute_dtype, value_dtype=value_dtype)


@settings(max_examples=300)
@given(tensors())
def test_values_are_the_formulas_bit_for_bit(tensor: Tensor) -> None:
    np.testing.assert_array_equal(tensor.dequantize(np.float32), formula(tensor))


@settings(max_examples=100)
@given(tensors(), st.integers(1, 6), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_small_pieces_give_the_same_values(tensor: Tensor, elements: int, dtype: type) -> None:
    whole = tensor.dequantize(dtype)
    parts = [part.dequantize(dtype).reshape(-1) for part in tensor.parts(elements)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.reshape(-1))
    lazy = tensor.dequantized(dtype)
    pieces = [part.codes().reshape(-1) for part in lazy.parts(elements * 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole.reshape(-1))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.int2, np.int8])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tensors_of_many_pieces(dtype: type, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir, "_PART_ELEMENTS", 1 << 10)
    monkeypatch.setattr(decoding, "_PIECE_ELEMENTS", 1 << 7)
    rng = np.random.default_rng(0)
    shape = (6, 35, 17)
    for block_shape in (per_tensor(shape), per_axis(shape, axis), blocked(shape, axis, 4)):
        grid = grid_shape(shape, block_shape)
        quantization = Quantization(
            Tensor.from_array("scale", rng.normal(size=grid).astype(np.float32)),
            block_shape,
            Tensor.from_array("zero_point", rng.integers(-2, 2, grid).astype(np.int8)),
        )
        tensor = Tensor.from_array("w", codes_of(dtype, shape, rng), quantization)
        np.testing.assert_array_equal(tensor.dequantize(np.float32), formula(tensor))


def test_codebook_with_offset_and_short_last_block() -> None:
    rng = np.random.default_rng(1)
    for dtype in (ml_dtypes.uint2, ml_dtypes.uint4, np.uint8):
        entries = 1 << ml_dtypes.iinfo(dtype).bits
        shape, block_shape = (3, 7), (1, 4)
        quantization = Quantization(
            Tensor.from_array("scale", rng.normal(size=(3, 2)).astype(np.float16)),
            block_shape,
            offset=Tensor.from_array("offset", rng.normal(size=(3, 2)).astype(np.float32)),
            codebook=Tensor.from_array("codebook", rng.normal(size=entries).astype(np.float32)),
        )
        tensor = Tensor.from_array("w", codes_of(dtype, shape, rng), quantization)
        np.testing.assert_array_equal(tensor.dequantize(np.float32), formula(tensor))


@pytest.mark.parametrize("axis", [0, 1])
def test_group_index_chooses_the_parameters(axis: int) -> None:
    rng = np.random.default_rng(2)
    shape = (8, 6)
    grid = [8, 6]
    grid[axis] = 3
    block_shape = tuple(2 if a == axis else 1 for a in range(2))
    quantization = Quantization(
        Tensor.from_array("scale", rng.normal(size=grid).astype(np.float32)),
        block_shape,
        Tensor.from_array("zero_point", rng.integers(-3, 3, grid).astype(np.int8)),
        group_index=GroupIndex(axis, Tensor.from_array("index", rng.integers(0, 3, shape[axis]).astype(np.int32))),
    )
    tensor = Tensor.from_array("w", codes_of(ml_dtypes.int4, shape, rng), quantization)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), formula(tensor))
    parts = [part.dequantize(np.float32) for part in tensor.parts(3)]
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), formula(tensor))


def test_second_level_scale_is_decoded_first_and_flattens_to_the_same_values() -> None:
    rng = np.random.default_rng(3)
    outer = Quantization(Tensor.from_array("s2", np.array([[0.37]], np.float32)), (4, 2))
    inner = Tensor.from_array("s1", rng.normal(size=(4, 2)).astype(ml_dtypes.float8_e4m3fn), outer)
    tensor = Tensor.from_array(
        "w", rng.integers(0, 16, (4, 32)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn), Quantization(inner, (1, 16))
    )
    scale = inner.numpy().astype(np.float32) * np.float32(0.37)
    expected = tensor.numpy().astype(np.float32) * np.repeat(scale, 16, axis=1)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), expected)
    flat = stage.flatten_scales(Model({"w": tensor}))
    assert flat["w"].quantization is not None
    assert flat["w"].quantization.scale.quantization is None
    np.testing.assert_array_equal(flat["w"].dequantize(np.float32), expected)
    assert [loss.kind for loss in flat.losses] == ["widened"]


def test_wide_codes_are_subtracted_as_integers() -> None:
    codes = np.array([2**24 + 1, -(2**24) - 1], np.int32)
    quantization = Quantization(
        Tensor.from_array("scale", np.array([1.0], np.float32)),
        (2,),
        Tensor.from_array("zero_point", np.array([2**24], np.int64)),
    )
    tensor = Tensor.from_array("bias", codes, quantization)
    assert tensor.dequantize(np.float32).tolist() == [1.0, float(np.float32(-(2**25) - 1))]


@pytest.mark.parametrize("zero_point", [-128, 127, 1000, -1000])
def test_zero_points_far_outside_the_codes_range(zero_point: int) -> None:
    for dtype in (ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8):
        quantization = Quantization(
            Tensor.from_array("scale", np.array([0.1], np.float32)),
            (5,),
            Tensor.from_array("zero_point", np.array([zero_point], np.int64)),
        )
        tensor = Tensor.from_array("w", np.array([0, 1, 2, 3, 4]).astype(dtype), quantization)
        np.testing.assert_array_equal(tensor.dequantize(np.float32), formula(tensor))


def test_float16_is_rounded_once_and_overflows_to_infinity() -> None:
    quantization = Quantization(Tensor.from_array("scale", np.array([20000.3], np.float32)), (3,))
    tensor = Tensor.from_array("w", np.array([1, 3, 7], ml_dtypes.int4), quantization)
    exact = tensor.dequantize(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(tensor.dequantize(np.float16), exact.astype(np.float16))
    assert np.isinf(tensor.dequantize(np.float16)[2])
    np.testing.assert_array_equal(tensor.dequantize(ml_dtypes.bfloat16), exact.astype(ml_dtypes.bfloat16))


def test_plain_tensors_are_cast() -> None:
    for array in (
        np.array([True, False]),
        np.array([1.5, np.nan], np.float64),
        np.array([3, -3], np.int64),
        np.array([1, -2], ml_dtypes.int4),
        np.array([0.5, -6], ml_dtypes.float4_e2m1fn),
        np.array([0.5, -448], ml_dtypes.float8_e4m3fn),
    ):
        np.testing.assert_array_equal(
            Tensor.from_array("x", array).dequantize(np.float32), array.astype(np.float32), strict=True
        )


def test_a_zero_point_that_is_a_signalling_nan_is_one() -> None:
    """Found by random damage: NumPy's `any` warned of it."""
    zero_point = np.array([0x7C01, 0x3C00], np.uint16).view(np.float16)
    quantization = Quantization(
        Tensor.from_array("scale", np.ones((2, 1), np.float32)),
        (1, 2),
        Tensor.from_array("zero_point", zero_point.reshape(2, 1)),
    )
    tensor = Tensor.from_array("w", np.array([[1, 2], [3, 4]], np.int8), quantization)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), [[np.nan, np.nan], [2, 3]])


def test_scalars_and_empty_tensors() -> None:
    scale = Tensor.from_array("scale", np.array(0.5, np.float32))
    assert Tensor.from_array("w", np.array(-3, np.int8), Quantization(scale, ())).dequantize(np.float32) == -1.5
    scale = Tensor.from_array("scale", np.ones((1, 3), np.float32))
    empty = Tensor.from_array("w", np.zeros((0, 3), ml_dtypes.int4), Quantization(scale, (1, 1)))
    assert empty.dequantize(np.float32).shape == (0, 3)


def test_refusals_name_the_tensor() -> None:
    with pytest.raises(Unsupported, match="tensor 'z': complex64"):
        Tensor.from_array("z", np.zeros(2, np.complex64)).dequantize(np.float32)
    with pytest.raises(UsageError, match="tensor 'x': dtype float64: values come as float32, float16, bfloat16"):
        Tensor.from_array("x", np.zeros(2, np.float32)).dequantize(np.float64)


def test_dequantize_model_leaves_out_what_was_only_a_parameter() -> None:
    scale = Tensor("w_scales", (1,), np.dtype(np.float32), Tensor.from_array("s", np.ones(1, np.float32)).data,
                   parameter_of="w")  # fmt: skip
    tensor = Tensor.from_array("w", np.array([1, 2], ml_dtypes.int4), Quantization(scale, (2,)))
    plain = Tensor.from_array("b", np.array([1.0], np.float32))
    model = stage.dequantize_model(Model({"w": tensor, "w_scales": scale, "b": plain}), np.dtype(np.float16))
    assert list(model) == ["w", "b"]
    assert model["w"].dtype == np.float16
    assert model["w"].quantization is None
    assert model["b"].dtype == np.float32
    assert model["w"].numpy().tolist() == [1, 2]


def test_a_factor_is_multiplied_last_and_folds_into_scales() -> None:
    factor, codes = float(np.float32(1 / 127)), np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    scale = Tensor.from_array("scale", np.array([[0.37], [1.9]], np.float32))
    tensor = Tensor.from_array("w", codes, Quantization(scale, (1, 128), factor=factor))
    expected = codes.astype(np.float32) * scale.numpy() * np.float32(factor)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), expected)
    folded = stage.fold_factors(Model({"w": tensor}))
    assert [loss.kind for loss in folded.losses] == ["rounded"]
    np.testing.assert_array_equal(
        folded["w"].dequantize(np.float32), codes.astype(np.float32) * (scale.numpy() * np.float32(factor))
    )


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e39])
def test_a_factor_that_is_no_float32_is_refused(factor: float) -> None:
    with pytest.raises(CorruptFile, match="finite float32"):
        Quantization(Tensor.from_array("scale", np.ones((1,), np.float32)), (4,), factor=factor)
