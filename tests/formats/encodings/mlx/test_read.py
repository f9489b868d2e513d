import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Unsupported
from tests.formats.encodings.checkpoints_in_memory import FIXTURES, check_fixture, decoded, refused

CONFIG = {"quant_method": "mlx", "group_size": 32, "bits": 4}


def packed(codes, bits):
    rows = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    return np.array(
        [[row >> 32 * i & 0xFFFFFFFF for i in range(codes.shape[1] * bits // 32)] for row in rows], np.uint32
    )


def checkpoint(bits=4, rows=3, groups=2, size=32, dtype=np.float16, seed=0):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, groups * size))
    scales, biases = (random.normal(size=(rows, groups)).astype(dtype) for _ in range(2))
    return {"m.weight": packed(codes, bits), "m.scales": scales, "m.biases": biases}, codes


def test_values_are_those_of_the_library():
    model = check_fixture(FIXTURES / "mlx")
    assert model["layers.2.group32.weight"].dtype == ml_dtypes.uint4  # 3 bits
    assert model["layers.4.group32.weight"].dtype == np.uint8  # 5 bits


@settings(max_examples=40)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64]),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]),
    seed=st.integers(0, 99),
)
def test_codes_and_values_are_those_that_were_packed(bits, rows, groups, size, dtype, seed):
    arrays, codes = checkpoint(bits, rows, groups, size, dtype, seed)
    tensors = decoded(arrays, CONFIG | {"bits": bits, "group_size": size})
    assert list(tensors) == ["m.weight"]
    np.testing.assert_array_equal(tensors["m.weight"].codes(), codes)
    scale, bias = (arrays[f"m.{part}"].astype(np.float32).repeat(size, 1) for part in ("scales", "biases"))
    product = (codes.astype(np.float32) * scale).astype(dtype).astype(np.float32)
    wanted = (product + bias).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), wanted)


def test_a_module_has_settings_of_its_own():
    arrays, codes = checkpoint(bits=8)
    refused(arrays, CONFIG, "4 bits", kind=CorruptFile)
    tensors = decoded(arrays, CONFIG | {"m": {"bits": 8, "group_size": 32}})
    np.testing.assert_array_equal(tensors["m.weight"].codes(), codes)
    arrays, codes = checkpoint()
    np.testing.assert_array_equal(decoded(arrays, CONFIG | {"m": True})["m.weight"].codes(), codes)


def float_mode(mode, size):
    random = np.random.default_rng(0)
    arrays = {
        "m.weight": random.integers(0, 1 << 32, (2, 8), np.uint32),
        "m.scales": np.full((2, 64 // size), 127 if mode != "nvfp4" else 0x38, np.uint8),
    }
    return arrays, CONFIG | {"mode": mode, "group_size": size, "bits": 4}


@pytest.mark.parametrize(("mode", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_float_modes(mode, size):
    arrays, config = float_mode(mode, size)
    weight = decoded(arrays, config)["m.weight"]
    low_first = np.stack((arrays["m.weight"].view(np.uint8) & 15, arrays["m.weight"].view(np.uint8) >> 4), -1)
    np.testing.assert_array_equal(weight.codes(), low_first.reshape(2, 64))
    values = low_first.reshape(2, 64).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(weight.dequantize(np.float32), values)


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("weight", np.zeros((3, 9), np.uint32), "9 words"),
        ("weight", np.zeros(8, np.uint32), "(8,)"),
        ("weight", np.zeros((2, 8), np.uint32), "(2, 8)"),
        ("scales", np.zeros((3, 3), np.float16), "3 groups"),
        ("scales", np.zeros((), np.float16), "()"),
        ("scales", np.zeros((3, 2), np.int32), "int32"),
        ("biases", np.zeros((3, 1), np.float16), "(3, 1)"),
        ("biases", np.zeros((3, 2), np.float32), "float32"),
        ("biases", np.zeros((3, 2), np.int8), "int8"),
    ],
)
def test_wrong_parts_are_refused(part, value, word):
    refused(checkpoint()[0] | {f"m.{part}": value}, CONFIG, word, kind=CorruptFile)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"group_size": 64}, "group_size of 64"),
        ({"group_size": "32"}, "'32'"),
        ({"bits": 7}, "7 bits"),
        ({"bits": 0}, "bits 0"),
        ({"bits": True}, "True"),
        ({"mode": "mxfp4"}, "biases"),
        ({"m": False}, "not"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_contradicting_configurations_are_refused(changed, word):
    refused(checkpoint()[0], CONFIG | changed, word, kind=CorruptFile)


def test_what_the_tensors_cannot_say_is_not_guessed():
    refused(checkpoint()[0], {}, "config.json", kind=CorruptFile)
    arrays, config = float_mode("mxfp4", 32)
    refused(arrays, config | {"mode": ["mxfp4"]}, "mode", kind=Unsupported)
    refused(arrays, config | {"mode": "mxfp5"}, "'mxfp5'", kind=Unsupported)
    refused(arrays, config | {"group_size": 16}, "mxfp4", kind=CorruptFile)
    refused(arrays, CONFIG, "no biases", kind=CorruptFile)
    refused(arrays | {"m.scales": arrays["m.scales"].astype(np.float16)}, config, "float16", kind=CorruptFile)
    refused(arrays | {"m.global_scale": np.ones(1, np.float32)}, config, "global_scale", kind=Unsupported)
