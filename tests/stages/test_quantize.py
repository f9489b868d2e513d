"""The arithmetic of floats to codes, against a plain slow reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nibblecast.converters.arithmetic import blocks
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Model, Quantization, Tensor, blocked, grid_shape
from nibblecast.converters.machine import THREADS
from nibblecast.converters.stages import quantize
from nibblecast.converters.stages.quantize import accuracy, quantize_model, quantized
from nibblecast.converters.stages.scheme import CODE_DTYPES, Blocked, PerAxis, PerTensor, Scheme, parse_scheme

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
FLOAT32, FLOAT16, INT8 = (
    FIXTURES / "mlp_float32.tflite",
    FIXTURES / "mlp_float16.tflite",
    FIXTURES / "cnn_int8_full.tflite",
)
INT4 = np.dtype(ml_dtypes.int4)


def weights(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Tensor:
    return Tensor.from_array("w", np.random.default_rng(seed).normal(size=shape).astype(dtype))


def parameters(tensor: Tensor) -> Quantization:
    assert tensor.quantization is not None
    return tensor.quantization


def mean_square_error(floats: NDArray[Any], values: NDArray[Any]) -> float:
    return float(np.square(values.astype(np.float64) - floats.astype(np.float64)).mean())


def each_block(
    shape: tuple[int, ...], block_shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    for index in itertools.product(*map(range, grid_shape(shape, block_shape))):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block_shape, strict=True))


def reference(
    array: NDArray[Any], block_shape: tuple[int, ...], scheme: Scheme
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Codes, scales and zero points, block for block as docs/quantize.md has it."""
    grid = grid_shape(array.shape, block_shape)
    codes, scales, zero_points = np.zeros(array.shape, int), np.zeros(grid, np.float32), np.zeros(grid, int)
    f = np.float32
    for index, where in each_block(array.shape, block_shape):
        block = array[where].astype(f)
        low, high = min(f(0), block.min()), max(f(0), block.max())
        if not scheme.symmetric:
            scale = (high - low) / f(scheme.highest - scheme.lowest)
        elif scheme.narrow:
            scale = max(-low, high) / f(scheme.highest - scheme.middle)
        else:
            scale = (low if -low >= high else high) / f(scheme.lowest - scheme.middle)
        scale = f(f(scale).astype(scheme.scale_dtype)) or f(1)
        zero_point = scheme.middle if scheme.symmetric else round(f(scheme.lowest) - low / scale)
        zero_point = min(max(zero_point, scheme.lowest), scheme.highest)
        scales[index], zero_points[index] = scale, zero_point
        codes[where] = np.clip(np.rint(block / scale) + zero_point, scheme.lowest, scheme.highest)
    return codes, scales, zero_points


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[Any], Scheme]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = rng.normal(size=shape) + draw(st.sampled_from([0, 0, 3, -3]))
    array *= rng.random(shape) < draw(st.sampled_from([1, 0.5, 0.02]))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    granularity = draw(
        st.sampled_from([PerTensor(), PerAxis(axis)]) | st.builds(Blocked, st.integers(1, 10), st.just(axis))
    )
    scheme = Scheme(
        draw(st.sampled_from(list(CODE_DTYPES.values()))),
        granularity,
        symmetric=draw(st.booleans()),
        narrow=draw(st.booleans()),
        scales=draw(st.sampled_from(["minmax", "mse"])),  # type: ignore[arg-type]
        scale_dtype=np.dtype(draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))),
    )
    return array.astype(dtype), scheme


@pytest.fixture(params=[None, 24, 4], ids=["whole", "pieces", "small pieces"])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small tensors in one piece, or cut as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is not None:
            patch.setattr(blocks, "_PIECE_ELEMENTS", request.param)
            patch.setattr(blocks, "_SHORT", 3)
            patch.setattr(quantize, "_HELD_ELEMENTS", request.param)
        yield


@pytest.mark.usefixtures("pieces")
class TestArithmetic:
    @given(case=cases())
    @settings(max_examples=60)
    def test_equals_a_plain_reference(self, case: tuple[NDArray[Any], Scheme]) -> None:
        array, scheme = case
        scheme = replace(scheme, scales="minmax")
        tensor = quantized(Tensor.from_array("w", array), scheme)
        codes, scales, zero_points = reference(array, parameters(tensor).block_shape, scheme)
        np.testing.assert_array_equal(tensor.codes(), codes)
        np.testing.assert_array_equal(parameters(tensor).scale.dequantize(np.float32), scales)
        zero_point = parameters(tensor).zero_point
        np.testing.assert_array_equal(np.zeros(scales.shape) if zero_point is None else zero_point.codes(), zero_points)
        assert (zero_point is None) == (scheme.symmetric and not scheme.middle)

    @given(case=cases())
    @settings(max_examples=40)
    def test_any_part_read_in_any_order_is_the_same(self, case: tuple[NDArray[Any], Scheme]) -> None:
        array, scheme = case
        tensor, again = (quantized(Tensor.from_array("w", array), scheme) for _ in range(2))
        whole = tensor.packed()
        for part in (tensor, again):
            if part is tensor:
                part.release()
            for size in (1, 3, 7):
                found = [part.data.read(i, min(part.nbytes, i + size)) for i in range(0, part.nbytes, size)]
                np.testing.assert_array_equal(np.concatenate(found), whole)
        for role, parameter in parameters(tensor).parameters():
            other = dict(parameters(again).parameters())[role]
            found = [other.data.read(i, min(other.nbytes, i + 3)) for i in range(0, other.nbytes, 3)]
            np.testing.assert_array_equal(np.concatenate(found), parameter.packed(), role)
        rows = [row.dequantize(np.float32).reshape(-1) for row in again.parts(1)]
        np.testing.assert_array_equal(np.concatenate(rows), tensor.dequantize(np.float32).reshape(-1))

    @given(case=cases())
    @settings(max_examples=40)
    def test_least_error_is_never_worse_than_the_range(self, case: tuple[NDArray[Any], Scheme]) -> None:
        array, scheme = case
        plain = Tensor.from_array("w", array)
        values = [quantized(plain, replace(scheme, scales=s)).dequantize(np.float32) for s in ("mse", "minmax")]  # type: ignore[arg-type]
        block_shape = parameters(quantized(plain, scheme)).block_shape
        for _, where in each_block(array.shape, block_shape):
            least, ranged = (mean_square_error(array[where].astype(np.float32), v[where]) for v in values)
            assert least <= ranged * (1 + 1e-5) + 1e-30

    @given(case=cases())
    @settings(max_examples=40)
    def test_errors_are_measured(self, case: tuple[NDArray[Any], Scheme]) -> None:
        array, scheme = case
        model = quantize_model(Model({"w": Tensor.from_array("w", array)}), scheme)
        (unread,) = accuracy(model)
        list(model["w"].parts(1))
        (found,) = accuracy(model)
        assert found == unread
        floats = array.astype(np.float32)
        errors = np.abs(model["w"].dequantize(np.float32) - floats)
        assert found.max_error == errors.max()
        assert found.mean_square_error == pytest.approx(np.square(errors, dtype=np.float64).mean(), rel=1e-5)
        assert found.squared_values == pytest.approx(np.square(floats, dtype=np.float64).sum(), rel=1e-5)

    @given(case=cases())
    @settings(max_examples=40)
    def test_zeros_stay_zeros_and_errors_are_half_a_step_at_most(self, case: tuple[NDArray[Any], Scheme]) -> None:
        array, scheme = case
        scheme = replace(scheme, scales="minmax", scale_dtype=np.dtype(np.float32))
        tensor = quantized(Tensor.from_array("w", array), scheme)
        floats, values = array.astype(np.float32), tensor.dequantize(np.float32)
        assert not values[floats == 0].any()
        block_shape = parameters(tensor).block_shape
        scales = parameters(tensor).scale.numpy()
        # the end of a symmetric full range that has a code less may be a whole step off
        most = 1 if scheme.symmetric and not scheme.narrow else 0.5
        for index, where in each_block(array.shape, block_shape):
            rounding = 1e-6 * np.abs(floats[where]).max()  # of float32, by which a value is not quite halfway
            assert np.abs(values[where] - floats[where]).max() <= most * abs(scales[index]) * (1 + 1e-5) + rounding


@given(st.data())
def test_what_codes_decode_to_becomes_the_same_codes(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(CODE_DTYPES.values())))
    symmetric = data.draw(st.booleans())
    scheme = Scheme(dtype, Blocked(data.draw(st.sampled_from([4, 5, 20])), 1), symmetric=symmetric)
    shape = (data.draw(st.integers(1, 5)), 20)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(scheme.lowest, scheme.highest, shape, endpoint=True)
    block_shape = blocked(shape, 1, scheme.granularity.size)  # type: ignore[union-attr]
    grid = grid_shape(shape, block_shape)
    zero_points = np.full(grid, scheme.middle)
    if not symmetric:
        zero_points = rng.integers(scheme.lowest, scheme.highest, grid, endpoint=True)
    for index, where in each_block(shape, block_shape):  # the ends of the range fix its scale and its zero point
        ends = (scheme.lowest,) if symmetric else (scheme.lowest, scheme.highest)
        codes[where].reshape(-1)[: len(ends)] = ends
        assert symmetric or scheme.lowest <= zero_points[index] <= scheme.highest
    storage = np.int8 if scheme.lowest < 0 else np.uint8
    scale = (rng.integers(1, 256, grid) / 64).astype(np.float32)  # few bits, so that float32 has the values exactly
    quantization = Quantization(
        Tensor.from_array("s", scale),
        block_shape,
        Tensor.from_array("z", zero_points.astype(storage).view(dtype)) if zero_points.any() else None,
    )
    first = Tensor.from_array("w", codes.astype(storage).view(dtype), quantization)
    again = quantized(Tensor.from_array("w", first.dequantize(np.float32)), scheme)
    np.testing.assert_array_equal(again.codes(), first.codes())
    np.testing.assert_array_equal(parameters(again).scale.numpy(), scale)


def test_blocks_of_zeros_have_scale_1() -> None:
    array = np.zeros((2, 8), np.float32)
    array[1, 4:] = [1, 2, 3, 4]
    for text in ("int4,block=4", "uint4,block=4", "int8,block=4,mse", "uint2,symmetric,block=4,narrow"):
        tensor = quantized(Tensor.from_array("w", array), parse_scheme(text))
        assert parameters(tensor).scale.numpy().reshape(-1)[:3].tolist() == [1, 1, 1]
        assert not tensor.dequantize(np.float32).reshape(-1)[:12].any()


def test_the_farther_end_gets_the_lowest_code_whatever_its_sign() -> None:
    tensor = quantized(Tensor.from_array("w", np.array([[8, -4, 1], [-8, 4, 1]], np.float32)), parse_scheme("int4"))
    assert tensor.codes().tolist() == [[-8, 4, -1], [-8, 4, 1]]
    assert parameters(tensor).scale.numpy().tolist() == [[-1], [1]]


def test_a_narrow_range_has_no_negative_scale() -> None:
    tensor = quantized(Tensor.from_array("w", np.array([[7, -3], [-7, 3]], np.float32)), parse_scheme("int4,narrow"))
    assert tensor.codes().tolist() == [[7, -3], [-7, 3]]
    assert parameters(tensor).scale.numpy().tolist() == [[1], [1]]


def test_ties_go_to_the_even_code() -> None:
    array = np.array([[-8, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert quantized(Tensor.from_array("w", array), parse_scheme("int4")).codes().tolist() == [[-8, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["int4,block=4", "int4,per-tensor,mse", "uint8", "int4,axis=1"])
def test_what_is_no_number_is_refused_by_name(wrong: float, text: str) -> None:
    array = np.ones((4, 8), np.float32)
    array[3, 5] = wrong
    tensor = quantized(Tensor.from_array("layer/w", array), parse_scheme(text), Path("model.bin"))
    for read in (tensor.packed, parameters(tensor).scale.packed):
        with pytest.raises(Unsupported) as caught:
            read()
        assert str(caught.value).startswith("model.bin: tensor 'layer/w': holds NaN or infinity")


@pytest.mark.parametrize(
    ("value", "dtype", "text", "why"),
    [
        (1e300, np.float64, "int4", "holds NaN or infinity"),
        (1e30, np.float32, "int4,scale=float16", "needs a scale that float16 cannot hold: choose another with scale="),
        (3e38, np.float32, "int4,asymmetric", "needs a scale that float32 cannot hold"),
    ],
)
def test_values_beyond_what_scales_can_hold(value: float, dtype: Any, text: str, why: str) -> None:
    tensor = quantized(Tensor.from_array("w", np.array([[value, -value]], dtype)), parse_scheme(text))
    with pytest.raises(Unsupported, match=why):
        tensor.packed()


def test_tiny_and_huge_values_are_measured() -> None:
    for unit in (1e-44, 1e-30, 1e30):
        tensor = quantized(
            Tensor.from_array("w", np.array([[-8, 2.5, 7]], np.float32) * np.float32(unit)), Scheme(INT4)
        )
        (found,) = accuracy(Model({"w": tensor}))
        assert np.isfinite(found.mean_square_error)
        assert 0 < found.max_error <= 8 * unit * 1.1


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = weights((300, 1000))
    for text in ("int4,block=32,mse", "uint4,axis=1", "int8,per-tensor,mse", "int4,block=7,axis=0"):
        found = []
        for threads in (1, 5):
            monkeypatch.setattr(quantize, "_MOST_THREADS", threads)
            monkeypatch.setenv(THREADS, "8")
            tensor = quantized(plain, parse_scheme(text))
            found.append(
                (tensor.packed().tobytes(), parameters(tensor).scale.packed().tobytes(), accuracy(Model({"w": tensor})))
            )
        assert found[0] == found[1], text
