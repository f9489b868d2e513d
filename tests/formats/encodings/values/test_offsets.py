from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.mlx.write import encode
from nibblecast.formats.encodings.values.offsets import offsets_as_zero_points
from tests.formats.encodings.checkpoints import FIXTURES

FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]


def weight_of(scale, offset=None, zero_point=None, dtype=ml_dtypes.uint4, **more):
    codes = np.tile(np.arange(16, dtype=np.uint8).view(dtype), scale.shape)
    parameters = {"offset": offset, "zero_point": zero_point}
    tensors = {role: Tensor.from_array(role, array) for role, array in parameters.items() if array is not None}
    return Tensor.from_array("w", codes, Quantization(Tensor.from_array("scale", scale), (1, 16), **tensors, **more))


@settings(max_examples=60)
@given(
    scale_dtype=st.sampled_from(FLOATS),
    compute=st.sampled_from([None, np.dtype(np.float32)]),
    dtype=st.sampled_from([ml_dtypes.uint4, ml_dtypes.int4]),
    signs=st.booleans(),
    seed=st.integers(0, 999),
)
def test_what_went_to_mlx_comes_back(scale_dtype, compute, dtype, signs, seed):
    random = np.random.default_rng(seed)
    scale = random.normal(0.01 if not signs else 0, 0.002, (3, 2)).astype(scale_dtype)
    zero_point = random.integers(-20, 20, scale.shape).astype(np.int8)
    codes = np.tile(np.arange(16, dtype=np.uint8).view(dtype), (3, 4))
    parameters = (Tensor.from_array(role, array) for role, array in (("scale", scale), ("zero_point", zero_point)))
    source = Tensor.from_array("m.weight", codes)
    quantization = Quantization(next(parameters), (1, 32), next(parameters), compute_dtype=compute or scale_dtype)
    source = replace(source, quantization=quantization)
    back, _ = offsets_as_zero_points(encode(source).weight)
    shift = 8 if dtype == ml_dtypes.int4 else 0
    np.testing.assert_array_equal(back.quantization.zero_point.numpy(), zero_point + shift)
    assert back.quantization.offset is None
    if compute is not None and scale_dtype != np.float32:  # nothing was rounded on the way
        np.testing.assert_array_equal(back.dequantize(), source.dequantize())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mlx_s_own_weights_have_zero_points(dtype):
    model = nibblecast.load(FIXTURES / "mlx")
    found = 0
    for name, weight in model.items():
        quantization = weight.quantization
        if quantization is None or quantization.offset is None or quantization.compute_dtype != dtype:
            continue
        of_8_bits = name.startswith("layers.6")
        if name.startswith("layers.0") or (of_8_bits and dtype == ml_dtypes.bfloat16):  # layers.0 are of 1 bit
            with pytest.raises(Unsupported, match="not multiples"):
                offsets_as_zero_points(weight)
            continue
        changed, losses = offsets_as_zero_points(weight)
        difference = np.abs(changed.dequantize().astype(np.float64) - weight.dequantize()).max()
        for loss in losses:
            assert difference <= float(loss.detail.partition("at most ")[2].split()[0]) * 1.05
        if not losses:
            assert difference == 0
        np.testing.assert_array_equal(changed.codes(), weight.codes())
        found += 1
    assert found >= 5


def test_an_offset_is_added_to_the_zero_point_that_there_is():
    scale, offset = np.full((1, 2), 0.5, np.float32), np.array([[1.5, -4]], np.float32)
    weight = weight_of(scale, offset, np.full((1, 2), 8, np.int8))
    changed, losses = offsets_as_zero_points(weight)  # torchao's tinygemm
    np.testing.assert_array_equal(changed.quantization.zero_point.numpy(), [[5, 16]])
    assert losses == ()
    np.testing.assert_array_equal(changed.dequantize(), weight.dequantize())


def test_weights_without_offsets_stay():
    weight = weight_of(np.ones((1, 2), np.float32), None, np.full((1, 2), 8, np.int8))
    assert offsets_as_zero_points(weight) == (weight, ())


def test_a_last_place_that_is_half_a_step_is_no_rounding():
    scale = np.full((1, 1), 1, ml_dtypes.bfloat16)
    offset = np.full((1, 1), -127.5, ml_dtypes.bfloat16)  # its last place
    with pytest.raises(Unsupported, match="not multiples"):
        offsets_as_zero_points(weight_of(scale, offset))
    changed, _ = offsets_as_zero_points(weight_of(scale, np.full((1, 1), -127, ml_dtypes.bfloat16)))
    assert changed.quantization.zero_point.numpy().item() == 127


def test_zero_scales():
    weight = weight_of(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
    changed, losses = offsets_as_zero_points(weight)
    np.testing.assert_array_equal(changed.quantization.zero_point.numpy(), [[0, 0]])
    assert losses == ()


@pytest.mark.parametrize(
    ("scale", "offset", "zero_point", "message"),
    [
        (0.5, 0.3, None, "0.30000001192092896 where the scale is 0.5"),
        (0.5, np.nan, None, "nan"),
        (np.nan, 0.5, None, "nan"),
        (0.0, 0.5, None, "where the scale is 0.0"),
        (1e-6, 1.0, None, "not multiples"),  # beyond any zero point
        (0.5, 100.25, None, "100.25"),
        (0.5, 1.0, 7.5, "not integers"),
    ],
)
def test_others_are_refused(scale, offset, zero_point, message):
    arrays = [None if value is None else np.full((2, 2), value, np.float32) for value in (scale, offset, zero_point)]
    with pytest.raises(Unsupported, match=message) as caught:
        offsets_as_zero_points(weight_of(*arrays))
    assert caught.value.tensor == "w"
