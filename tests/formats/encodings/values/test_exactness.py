from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.values.exactness import largest_change
from nibblecast.formats.encodings.values.refit import elements, flat, from_elements

FLOAT32 = np.dtype(np.float32)


def every_code(dtype, scale, zero_point=None, offset=None, **more):
    """A weight in which every block has all the codes of a dtype of 4 bits."""
    scale = np.asarray(scale)
    codes = np.tile(np.arange(16, dtype=np.uint8).view(dtype), (scale.shape[0], scale.shape[1]))
    parameters = {"zero_point": zero_point, "offset": offset}
    tensors = {role: Tensor.from_array(role, array) for role, array in parameters.items() if array is not None}
    quantization = Quantization(Tensor.from_array("scale", scale), (1, 16), **tensors, **more)
    return Tensor.from_array("w", codes, quantization)


def with_scale(scale_of):
    """A function that changes the scales."""

    def function(weight):
        scale = from_elements("scale", {"scale": weight.quantization.scale}, FLOAT32, scale_of)
        return replace(weight, quantization=replace(weight.quantization, scale=scale))

    return function


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn]),
    zeros=st.sampled_from([None, ml_dtypes.uint4, np.int16]),
    offsets=st.booleans(),
    scale_dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    repeated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_largest_change_of_a_weight_that_has_every_code(dtype, zeros, offsets, scale_dtype, repeated, seed):
    random = np.random.default_rng(seed)
    grid = (3, 5)
    scale = (np.full(grid, 0.3) if repeated else random.normal(size=grid)).astype(scale_dtype)
    zero_point = None if zeros is None else random.integers(0, 16, grid).astype(np.uint8).astype(zeros)
    offset = random.normal(size=grid).astype(np.float32) if offsets else None
    weight = every_code(dtype, scale, zero_point, offset)
    function = with_scale(lambda scale: scale.astype(np.float32) * np.float32(1.001))
    wanted = np.abs(weight.dequantize(np.float32).astype(np.float64) - function(weight).dequantize(np.float32))
    assert largest_change(weight, function, FLOAT32) == wanted.max()


def test_one_block_among_many_is_found():
    scale = np.full((1 << 18, 2), 0.5, np.float32)  # more blocks than are looked at together
    scale[-1, -1] = 0.25
    codes = Tensor.from_array("w", np.zeros((1 << 18, 4), np.uint8).view(ml_dtypes.uint4))
    weight = replace(codes, quantization=Quantization(Tensor.from_array("scale", scale), (1, 2)))
    function = with_scale(lambda scale: np.where(scale == 0.25, np.float32(0.5), scale))
    assert largest_change(weight, function, FLOAT32) == 15 * 0.25


def test_what_does_not_change_is_zero():
    weight = every_code(ml_dtypes.uint4, np.array([[0.0, np.nan, np.inf]], np.float32))
    assert largest_change(weight, lambda same: same, FLOAT32) == 0
    # the sign of zero is none
    weight = every_code(ml_dtypes.uint4, np.zeros((1, 1), np.float32))
    assert largest_change(weight, with_scale(lambda scale: -scale), FLOAT32) == 0


def test_a_number_that_becomes_none_is_infinity():
    weight = every_code(ml_dtypes.uint4, np.ones((2, 2), np.float32))
    for lost in (np.inf, np.nan):
        assert largest_change(weight, with_scale(lambda scale, lost=lost: scale * np.float32(lost)), FLOAT32) == np.inf


def test_changes_are_those_of_the_dtype_that_is_asked_for():
    weight = every_code(ml_dtypes.uint4, np.ones((1, 1), np.float32))
    function = with_scale(lambda scale: scale * np.float32(1.00001))
    assert largest_change(weight, function, FLOAT32) > 0
    assert largest_change(weight, function, np.dtype(np.float16)) == 0


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(7,), (1, 9), (3, 5), (2, 3, 4), (1, 1, 6), ()]),
    nested=st.booleans(),
    dtype=st.sampled_from([ml_dtypes.uint4, ml_dtypes.int2, np.int8]),
    start=st.integers(0, 96),
    length=st.integers(0, 96),
)
def test_a_part_of_a_parameter_is_that_part_of_the_whole(shape, nested, dtype, start, length):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(np.int8).astype(dtype)
    quantization = None
    if nested:
        blocks = (*(1 for _ in shape[:-1]), 2) if shape else ()
        grid = (*shape[:-1], -(-shape[-1] // 2)) if shape else ()
        scale = Tensor.from_array("scale", np.random.default_rng(1).normal(size=grid).astype(np.float32))
        quantization = Quantization(scale, blocks)
    parameter = Tensor.from_array("zero_point", values, quantization)
    whole = parameter.dequantize(np.float32)
    np.testing.assert_array_equal(flat(parameter).dequantize(np.float32), whole)
    doubled = from_elements("doubled", {"one": parameter, "two": parameter}, FLOAT32, lambda one, two: one + two)
    stop = min(start + length, doubled.nbytes)
    start = min(start, stop)
    np.testing.assert_array_equal(doubled.data.read(start, stop), (whole * 2).reshape(-1).view(np.uint8)[start:stop])
    first = start // 16 * 4
    np.testing.assert_array_equal(
        elements(flat(parameter), first, parameter.size).astype(np.float32), whole.reshape(-1)[first:]
    )


def test_wide_parameters_are_all_tried():
    scale = np.full((2, 2), 0.1)  # float64
    offset = np.array([[0, 0], [0, 1]], np.float64)
    weight = every_code(ml_dtypes.uint4, scale, None, offset, compute_dtype=np.dtype(np.float64))

    def function(given):
        quantization = given.quantization
        return replace(
            given,
            quantization=replace(quantization, offset=Tensor.from_array("offset", np.zeros(quantization.scale.shape))),
        )

    assert largest_change(weight, function, FLOAT32) == pytest.approx(1)
