import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Unsupported
from tests.formats.encodings.checkpoints_in_memory import decoded, refused

FLOAT8 = ml_dtypes.float8_e4m3fn
FLOAT4 = ml_dtypes.float4_e2m1fn


def config(algorithm="", **more):
    return {"quant_method": "modelopt", **({"quant_algo": algorithm} if algorithm else {}), **more}


def int4_checkpoint(leading=(), outputs=6, inputs=10, size=5, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (*leading, outputs, inputs))
    rows = np.zeros((*leading, outputs // 2, inputs), np.uint8)
    for row in range(outputs):
        rows[..., row // 2, :] |= ((codes[..., row, :] & 15) << (4 if row % 2 else 0)).astype(np.uint8)
    scale = random.random((*leading, outputs, inputs // size)).astype(dtype)
    return {"m.weight": rows, "m.weight_scale": scale, "m.pre_quant_scale": np.ones(inputs, np.float32)}, codes


@settings(max_examples=30)
@given(
    leading=st.sampled_from([(), (1,), (3,)]),
    pairs=st.integers(1, 6),
    groups=st.integers(1, 4),
    size=st.integers(1, 8),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    seed=st.integers(0, 99),
)
def test_int4_codes_are_those_that_were_packed(leading, pairs, groups, size, dtype, seed):
    arrays, codes = int4_checkpoint(leading, pairs * 2, groups * size, size, dtype, seed)
    tensors = decoded(arrays, config("W4A16_AWQ", group_size=size, pre_quant_scale=True))
    assert list(tensors) == ["m.weight", "m.pre_quant_scale"]
    np.testing.assert_array_equal(tensors["m.weight"].codes(), codes)
    wanted = codes.astype(np.float32) * arrays["m.weight_scale"].astype(np.float32).repeat(size, -1)
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), wanted)


def nvfp4_checkpoint(leading=(), outer=()):
    random = np.random.default_rng(0)
    return {
        "m.weight": random.integers(0, 256, (*leading, 3, 16), np.uint8),
        "m.weight_scale": random.random((*leading, 3, 2)).astype(FLOAT8),
        "m.weight_scale_2": random.random(outer).astype(np.float32) if outer else np.float32(0.3).reshape(()),
        "m.input_scale": np.ones((), np.float32),
    }


@pytest.mark.parametrize(("leading", "outer"), [((), ()), ((), (1,)), ((4,), ()), ((4,), (4,)), ((4,), (4, 1, 1))])
@pytest.mark.parametrize("algorithm", ["NVFP4", "NVFP4_AWQ", "MIXED_PRECISION", ""])
def test_nvfp4_values(leading, outer, algorithm):
    arrays = nvfp4_checkpoint(leading, outer)
    tensors = decoded(arrays, config(algorithm, group_size=16))
    assert list(tensors) == ["m.weight", "m.input_scale"]
    weight = arrays["m.weight"]
    codes = np.stack((weight & 15, weight >> 4), -1).reshape(*weight.shape[:-1], 32)
    np.testing.assert_array_equal(tensors["m.weight"].codes(), codes)
    of_expert = arrays["m.weight_scale_2"].reshape((-1, 1, 1) if leading else ())
    scale = arrays["m.weight_scale"].astype(np.float32) * of_expert
    wanted = codes.view(FLOAT4).astype(np.float32) * scale.repeat(16, -1)
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), wanted)


def test_mxfp4_and_mxfp8():
    exponents = np.array([[120, 130]], np.uint8)
    arrays = {"m.weight": np.full((1, 32), 0x22, np.uint8), "m.weight_scale": exponents}
    values = decoded(arrays, config("W4A8_MXFP4_FP8", group_size=32))["m.weight"].dequantize(np.float32)
    np.testing.assert_array_equal(values, np.exp2(exponents.astype(np.float32) - 127).repeat(32, 1))
    arrays["m.weight"] = np.ones((1, 64), FLOAT8)
    np.testing.assert_array_equal(decoded(arrays, config("MXFP8"))["m.weight"].dequantize(np.float32), values)


@pytest.mark.parametrize(
    ("shape", "scales", "dtype"),
    [
        ((4, 6), (), FLOAT8),
        ((4, 6), (1,), FLOAT8),
        ((4, 6), (4,), FLOAT8),
        ((4, 6), (4, 1), FLOAT8),
        ((4, 6), (2, 3), FLOAT8),
        ((4, 6), (2, 1, 3, 1), FLOAT8),
        ((3, 4, 6), (3,), FLOAT8),
        ((3, 4, 6), (3, 4), FLOAT8),
        ((4, 6), (4,), np.int8),
    ],
)
def test_codes_of_a_byte(shape, scales, dtype):
    random = np.random.default_rng(0)
    codes = random.integers(0, 100, shape).astype(np.int8).view(dtype)
    scale = random.random(scales).astype(np.float32).reshape(scales)
    tensors = decoded({"m.weight": codes, "m.weight_scale": scale}, config("FP8" if dtype == FLOAT8 else "W8A16"))
    spread = (
        scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim)) if len(scales) < 2 or len(shape) > 2 else scale
    )
    if scale.size == 6:
        spread = scale.reshape(2, 3).repeat(2, 0).repeat(2, 1)
    elif len(shape) == 3 and scale.ndim == 1:
        spread = scale.reshape(3, 1, 1)
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), codes.astype(np.float32) * spread)


@pytest.mark.parametrize(
    ("arrays", "told", "word"),
    [
        (nvfp4_checkpoint(), config("FP8"), "'FP8'"),
        (nvfp4_checkpoint(), config("NVFP4", group_size=32), "32"),
        (nvfp4_checkpoint(), config("MIXED_PRECISION", quantized_layers={"m": {"quant_algo": "FP8"}}), "'FP8'"),
        (nvfp4_checkpoint() | {"m.weight_scale": np.ones((3, 3), FLOAT8)}, config(), "(3, 3)"),
        (nvfp4_checkpoint() | {"m.weight_scale_2": np.ones(2, np.float32)}, config(), "(2,)"),
        (nvfp4_checkpoint() | {"m.weight_scale_2": np.ones((), np.int32)}, config(), "int32"),
        (nvfp4_checkpoint() | {"m.weight": np.ones(16, np.uint8)}, config(), "(16,)"),
        ({k: v for k, v in nvfp4_checkpoint().items() if k != "m.weight_scale_2"}, config(), "weight_scale_2"),
        (int4_checkpoint()[0], config("W4A16_AWQ", group_size=2), "groups"),
        (int4_checkpoint()[0], config("W4A16_AWQ", group_size="5"), "'5'"),
        (int4_checkpoint()[0], config("NVFP4"), "'NVFP4'"),
        (int4_checkpoint()[0] | {"m.weight_scale": np.ones((3, 2), np.float32)}, config(), "(3, 2)"),
        (int4_checkpoint()[0] | {"m.weight_scale": np.ones((), np.float32)}, config(), "()"),
        (int4_checkpoint()[0] | {"m.weight_scale": np.ones((6, 2), np.int32)}, config(), "int32"),
        ({"m.weight": np.ones((4, 6), FLOAT8), "m.weight_scale": np.ones(6, np.float32)}, config(), "(6,)"),
        (int4_checkpoint()[0], {"quant_method": "awq"}, "awq"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, told, word):
    refused(arrays, told, word, kind=CorruptFile)


def test_codes_that_are_quantized_twice_are_refused_by_name():
    arrays = int4_checkpoint()[0] | {"m.weight_scale_2": np.ones((), np.float32)}
    refused(arrays, config("W4A8_AWQ"), "W4A8_AWQ", kind=Unsupported)


def test_weights_that_are_floats_beside_their_scales_stay_as_they_are():
    arrays = {"m.weight": np.ones((3, 16), np.float16), "m.weight_scale": np.ones((3, 1), np.float32)}
    for algorithm in ("FP8", "W8A16", ""):
        tensors = decoded(arrays, config(algorithm))
        assert {name: tensor.quantization for name, tensor in tensors.items()} == dict.fromkeys(arrays)
