"""Codes of float weights: the rounding of PyTorch, in whatever pieces they are read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Tensor, per_axis, per_tensor
from nibblecast.formats.encodings.values.fake_quantize import quantized


def tensor(values, dtype=np.float32, name="w"):
    return Tensor.from_array(name, np.asarray(values, dtype))


def test_ties_go_to_the_even_number_before_the_zero_point_is_added():
    weight = tensor([0.5, 1.5, 2.5, -0.5, -1.5, 99, -99, np.inf, -np.inf])
    codes = quantized(weight, tensor([1.0]), tensor([1], np.int32), per_tensor(weight.shape), -8, 7)
    assert codes.dtype == ml_dtypes.int4
    # torch 2.13: fake_quantize_per_tensor_affine(x, 1.0, 1, -8, 7) + 1
    np.testing.assert_array_equal(codes.codes(), [1, 3, 3, 1, -1, 7, -8, 7, -8])


def test_float_zero_points_are_added_before_rounding():
    weight = tensor([0.5, 1.5, 2.5, -0.5, 0.0])
    codes = quantized(weight, tensor([1.0] * 5), tensor([2.5] * 5), (1,), -8, 7)
    # torch 2.13: fake_quantize_per_channel_affine(x, ones, 2.5, 0, -8, 7) + 2.5
    np.testing.assert_array_equal(codes.codes(), [3, 4, 5, 2, 2])


def test_the_inverse_is_rounded_first():
    weight, scale = np.float32(0.245), np.float32(0.07)
    assert np.rint(weight / scale) == 4  # exactly 3.5 when divided
    codes = quantized(tensor([weight]), tensor([scale]), None, (1,), -8, 7)
    expected = np.rint(weight * (np.float32(1) / scale))
    np.testing.assert_array_equal(codes.codes(), [expected])


def test_bfloat16_rounds_each_operation():
    weight = tensor(np.linspace(-3, 3, 64), ml_dtypes.bfloat16)
    scale = tensor([0.41], ml_dtypes.bfloat16)
    inverse = ml_dtypes.bfloat16(1 / np.float32(scale.numpy()[0]))
    products = (weight.numpy().astype(np.float32) * np.float32(inverse)).astype(ml_dtypes.bfloat16)
    codes = quantized(weight, scale, None, (64,), -8, 7, compute_dtype=np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(codes.codes(), np.clip(np.rint(products.astype(np.float32)), -8, 7))


def test_nan_has_no_code():
    codes = quantized(tensor([1.0, np.nan]), tensor([1.0]), None, (2,), 0, 15)
    with pytest.raises(Unsupported, match="tensor 'w': holds NaN"):
        codes.codes()


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(CorruptFile, match="tensor 'w': scale of shape"):
        quantized(tensor([[1.0, 2.0]]), tensor([[1.0, 1.0, 1.0]]), None, (1, 1), 0, 15)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_blocks_along_an_axis_that_they_do_not_divide(block):
    count = -(-5 // block)
    scale, zero_point = tensor([np.arange(count) + 1.0]), tensor([np.arange(count)], np.int8)
    codes = quantized(tensor([[30.0] * 5]), scale, zero_point, (1, block), -128, 127)
    expected = [np.rint(np.float32(30) * (np.float32(1) / np.float32(i // block + 1))) + i // block for i in range(5)]
    np.testing.assert_array_equal(codes.codes(), [expected])


@settings(max_examples=60)
@given(st.data())
def test_any_range_of_bytes_is_the_same(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=0, max_size=4)))
    limits = data.draw(st.sampled_from([(-8, 7), (0, 15), (-2, 1), (-127, 127), (0, 255), (-32768, 32767)]))
    blocks = [per_tensor(shape), *(per_axis(shape, axis) for axis in range(len(shape)))]
    blocks.append(tuple(data.draw(st.integers(1, max(1, size))) for size in shape))
    block_shape = data.draw(st.sampled_from(blocks))
    grid = tuple(max(1, -(-size // block)) for size, block in zip(shape, block_shape, strict=True))
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    weight = tensor(random.normal(0, 3, shape))
    scale, zero_point = tensor(random.uniform(0.1, 2, grid)), tensor(random.integers(0, 3, grid), np.int8)
    found = quantized(weight, scale, zero_point, block_shape, *limits)
    whole = found.packed()
    assert whole.size == found.nbytes
    start = data.draw(st.integers(0, found.nbytes))
    stop = data.draw(st.integers(start, found.nbytes))
    np.testing.assert_array_equal(found.data.read(start, stop), whole[start:stop])
    spread = [np.asarray(p.numpy(), np.float32) for p in (scale, zero_point)]
    for axis, (size, block) in enumerate(zip(shape, block_shape, strict=True)):
        spread = [p.repeat(block, axis).take(range(size), axis) for p in spread]
    expected = np.clip(np.rint(weight.numpy() * (np.float32(1) / spread[0])) + spread[1], *limits)
    np.testing.assert_array_equal(found.codes(), expected)
