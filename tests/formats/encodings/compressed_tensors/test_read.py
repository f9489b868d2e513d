import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from tests.formats.encodings.checkpoints import library_values
from tests.formats.encodings.checkpoints_in_memory import FIXTURES, check_fixture, decoded, refused

CASES = sorted(FIXTURES.glob("compressed_tensors_*"))


def config(layout="pack-quantized", version="0.20.0", **weights):
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": weights, "format": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "version": version,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(codes, bits, dense=True):
    """Each row's fields as one long number, or as many whole fields as a word has room for."""
    words = []
    for row in codes + (1 << bits - 1):
        if dense:
            number = sum(int(field) << bits * i for i, field in enumerate(row))
            count = -(-len(row) * bits // 32)
            words.append([number >> 32 * i & 0xFFFFFFFF for i in range(count)])
        else:
            per = 32 // bits
            parts = [row[i : i + per] for i in range(0, len(row), per)]
            words.append([sum(int(field) << bits * i for i, field in enumerate(part)) for part in parts])
    return np.array(words, np.uint32).view(np.int32)


def test_there_are_cases():
    assert len(CASES) == 12


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_codes_and_values_are_those_of_the_library(folder):
    check_fixture(folder)


@settings(max_examples=60)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    dense=st.booleans(),
    asymmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@example(bits=3, rows=11, columns=1, dense=False, asymmetric=True, seed=0)  # only the zero points fill a word
def test_codes_and_zero_points_are_those_that_were_packed(bits, rows, columns, dense, asymmetric, seed):
    random = np.random.default_rng(seed)
    low = 1 << bits - 1
    codes = random.integers(-low, low, (rows, columns)).astype(np.int8)
    zeros = random.integers(-low, low, (rows, 1)).astype(np.int8)
    arrays = {
        "m.weight_packed": packed(codes.astype(int), bits, dense),
        "m.weight_scale": random.random((rows, 1)).astype(np.float32),
        "m.weight_shape": np.array([rows, columns]),
    }
    if asymmetric:
        arrays["m.weight_zero_point"] = np.ascontiguousarray(packed(zeros.T.astype(int), bits, dense).T)
    told = config(num_bits=bits, symmetric=not asymmetric, version="0.18.0" if dense else "0.17.1")
    weight = decoded(arrays, told)["m.weight"]
    np.testing.assert_array_equal(weight.codes(), codes)
    if asymmetric:
        np.testing.assert_array_equal(weight.quantization.zero_point.codes(), zeros)
    wanted = (codes.astype(np.float32) - (zeros if asymmetric else 0)) * arrays["m.weight_scale"]
    np.testing.assert_array_equal(weight.dequantize(np.float32), wanted)


def int4(rows=6, columns=64, groups=4):
    random = np.random.default_rng(0)
    return {
        "m.weight_packed": random.integers(-(1 << 31), 1 << 31, (rows, columns // 8), np.int32),
        "m.weight_scale": random.random((rows, groups)).astype(np.float16),
        "m.weight_shape": np.array([rows, columns]),
    }


GROUPS = {"strategy": "group", "group_size": 16}


def test_codes_are_read_without_copying_all_of_them():
    weight = decoded(int4(), config(**GROUPS))["m.weight"]
    assert weight.dtype == ml_dtypes.int4
    assert weight.quantization.block_shape == (1, 16)
    assert weight.data.read(7, 9).size == 2


def test_experts_are_packed_expert_by_expert():
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (3, 10, 24))
    zeros = random.integers(-8, 8, (3, 10, 2))
    arrays = {
        "m.weight_packed": np.stack([packed(expert, 4) for expert in codes]),
        "m.weight_scale": random.random((3, 10, 2)).astype(ml_dtypes.bfloat16),
        "m.weight_shape": np.array([3, 10, 24]),
        "m.weight_zero_point": np.stack([packed(expert.T, 4).T for expert in zeros]),
    }
    weight = decoded(arrays, config(strategy="group", group_size=12, symmetric=False))["m.weight"]
    np.testing.assert_array_equal(weight.codes(), codes)
    np.testing.assert_array_equal(weight.quantization.zero_point.codes(), zeros)
    scale = arrays["m.weight_scale"].astype(np.float32).repeat(12, axis=2)
    wanted = (codes - zeros.repeat(12, axis=2)).astype(np.float32) * scale
    np.testing.assert_array_equal(weight.dequantize(np.float32), wanted)
    np.testing.assert_array_equal(library_values(weight), wanted.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_zero_points_that_are_not_packed():
    zeros = np.arange(24, dtype=np.int8).reshape(6, 4) % 8
    weight = decoded(int4() | {"m.weight_zero_point": zeros}, config(symmetric=False, **GROUPS))["m.weight"]
    np.testing.assert_array_equal(weight.quantization.zero_point.numpy(), zeros)


def test_act_order_may_be_switched_off():
    arrays = int4() | {"m.weight_g_idx": np.full(64, -1, np.int32)}
    assert decoded(arrays, config(**GROUPS))["m.weight"].quantization.group_index is None


def test_without_a_configuration_the_tensors_must_say_everything():
    weight = decoded(int4())["m.weight"]
    assert (weight.dtype, weight.quantization.block_shape) == (ml_dtypes.int4, (1, 16))
    small = int4(columns=8, groups=1) | {"m.weight_shape": np.array([6, 5])}
    refused(small, {}, "number of bits", kind=CorruptFile)


def test_one_of_several_groups_is_found_by_name_then_by_shape():
    told = config(**GROUPS)
    told["config_groups"]["group_1"] = {"targets": ["re:.*"], "weights": {"num_bits": 8, "strategy": "channel"}}
    told["config_groups"]["group_2"] = {"targets": ["n"], "weights": {"num_bits": 4, "group_size": 8}}
    assert decoded(int4(), told)["m.weight"].quantization.block_shape == (1, 16)
    refused({key.replace("m.", "n."): array for key, array in int4().items()}, told, "group_size 8")


def test_groups_for_modules_by_name_are_for_no_other():
    told = config(**GROUPS)
    told["config_groups"]["group_1"] = {"targets": ["a.b", "n"], "weights": {"num_bits": 2, "strategy": "channel"}}
    small = int4(columns=8, groups=1) | {"m.weight_shape": np.array([6, 8])}  # 2 bits would be one word, too
    others = {f"n.{key.removeprefix('m.')}": array for key, array in small.items()}
    tensors = decoded(small | others, told)
    assert [tensors["m.weight"].dtype, tensors["n.weight"].dtype] == [ml_dtypes.int4, ml_dtypes.int2]


def test_nvfp4_scales_are_divided_and_not_multiplied_by_a_reciprocal():
    scales = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(126, 1)
    arrays = {
        "m.weight_packed": np.full((126, 8), 0x22, np.uint8),
        "m.weight_scale": scales,
        "m.weight_global_scale": np.array([1811.3], np.float32),
    }
    told = config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    tensors, losses = decode_checkpoint(
        Checkpoint({key: Tensor.from_array(key, array) for key, array in arrays.items()}, told)
    )
    divided = scales.astype(np.float32) / np.float32(1811.3)
    assert (divided != scales.astype(np.float32) * (np.float32(1) / np.float32(1811.3))).any()
    np.testing.assert_array_equal(tensors["m.weight"].quantization.scale.numpy(), divided)
    assert [(loss.tensor, loss.kind) for loss in losses] == [("m.weight", "widened")]


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", ""])
def test_float8_of_other_libraries(method):
    codes = np.arange(32, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(4, 8)
    arrays = {"m.weight": codes, "m.weight_scale": np.full((4, 1), 0.5, np.float32), "m.input_scale": np.ones(1)}
    tensors = decoded(arrays, {"quant_method": method} if method else {})
    assert list(tensors) == ["m.weight", "m.input_scale"]
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), codes.astype(np.float32) * 0.5)


def test_weights_that_are_floats_beside_their_scales_stay_as_they_are():
    arrays = {"m.weight": np.ones((2, 3), np.float32), "m.weight_scale": np.ones((2, 1), np.float32)}
    assert decoded(arrays, config("dense"))["m.weight"].quantization is None


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("weight_packed", np.zeros((6, 8), np.int64), "int64"),
        ("weight_packed", np.zeros(8, np.int32), "(8,)"),
        ("weight_packed", np.zeros((6, 9), np.int32), "(6, 9)"),
        ("weight_packed", np.zeros((5, 8), np.int32), "(5, 8)"),
        ("weight_shape", np.array([6, 1 << 60]), "shape"),
        ("weight_shape", np.array([6, -64]), "-64"),
        ("weight_shape", np.array([6, 64, 1]), "(3,)"),
        ("weight_shape", np.array([6.0, 64.0]), "float64"),
        ("weight_scale", np.ones((6, 3), np.float16), "(6, 3)"),
        ("weight_scale", np.ones((6, 4), np.int32), "int32"),
        ("weight_scale", np.ones((6, 4), np.float64), "float64"),
        ("weight_zero_point", np.ones((2, 4), np.int32), "(2, 4)"),
        ("weight_zero_point", np.ones((6, 3), np.int8), "(6, 3)"),
        ("weight_zero_point", np.ones((6, 4), np.uint32), "uint32"),
        ("weight_g_idx", np.full(64, 4, np.int32), "4 groups"),
        ("weight_g_idx", np.zeros(63, np.int32), "(63,)"),
        ("weight_g_idx", np.zeros(64, np.float32), "float32"),
    ],
)
def test_wrong_parts_are_refused(part, value, word):
    refused(int4() | {f"m.{part}": value}, config(**GROUPS), word, kind=CorruptFile)


@pytest.mark.parametrize("part", ["weight_shape", "weight_scale"])
def test_missing_parts_are_refused(part):
    arrays = int4()
    del arrays[f"m.{part}"]
    refused(arrays, config(**GROUPS), f"m.{part}", kind=CorruptFile)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (config(strategy="group", group_size=32), "group_size 32"),
        (config(num_bits=8, **GROUPS), "number of bits"),
        (config(num_bits="4"), "'4'"),
        (config(num_bits=True), "True"),
        (config(num_bits=-4), "-4"),
        (config(strategy=["group"]), "['group']"),
        (config(group_size=1.5, strategy="group"), "1.5"),
        (config("int-quantized", **GROUPS), "int-quantized"),
        (config("nvfp4-pack-quantized", **GROUPS), "nvfp4"),
        (config(**GROUPS) | {"ignore": ["m"]}, "ignores"),
        (config(**GROUPS) | {"config_groups": [1]}, "[1]"),
        (config(**GROUPS) | {"config_groups": {}}, "none"),
        (config(**GROUPS) | {"config_groups": {"a": {"weights": 3}}}, "3"),
        (config(**GROUPS) | {"config_groups": {"a": None}}, "none"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_contradicting_configurations_are_refused(told, word):
    refused(int4(), told, word, kind=CorruptFile)


def test_targets_that_are_regular_expressions_are_not_run():
    told = config(**GROUPS)
    told["config_groups"]["group_0"]["targets"] = ["re:(a+)+$"]
    assert "m.weight" in decoded(int4(), told)


@pytest.mark.parametrize(
    ("arrays", "told", "word"),
    [
        (int4(), config("marlin-24"), "'marlin-24'"),
        ({"m.weight_packed": np.zeros((4, 8), np.int32), "m.meta": np.zeros((2, 2), np.int16)}, {}, "'marlin-24'"),
        ({"m.weight.bitmask": np.zeros(4, np.uint8), "m.weight.compressed": np.zeros(4, np.float32)}, {}, "sparse"),
    ],
)
def test_other_layouts_are_refused_by_name(arrays, told, word):
    refused(arrays, told, word, kind=Unsupported)


def float4(scale=None):
    scale = np.ones((4, 2), ml_dtypes.float8_e4m3fn) if scale is None else scale
    return {
        "m.weight_packed": np.zeros((4, 16), np.uint8),
        "m.weight_scale": scale,
        "m.weight_global_scale": np.ones(1, np.float32),
    }


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        (float4(np.ones((4, 3), ml_dtypes.float8_e4m3fn)), "(4, 3)"),
        (float4(np.ones((), ml_dtypes.float8_e4m3fn)), "()"),
        (float4(np.ones((4, 2), np.uint8)), "(4, 2)"),
        (float4(np.ones((4, 2), np.float32)), "float32"),
        (float4() | {"m.weight_global_scale": np.ones(2, np.float32)}, "(2,)"),
        (float4() | {"m.weight_global_scale": np.ones(1, np.int32)}, "int32"),
        ({key: array for key, array in float4().items() if "global" not in key}, "weight_global_scale"),
        (float4() | {"m.weight_zero_point": np.ones((4, 2), np.int8)}, "zero points"),
    ],
)
def test_wrong_parts_of_float4_are_refused(arrays, word):
    refused(arrays, {}, word)


def test_codes_beyond_the_bits_that_the_configuration_says_are_refused_when_they_are_read():
    arrays = {"m.weight": np.full((2, 2), 8, np.int8), "m.weight_scale": np.ones((2, 1), np.float32)}
    refused(arrays, config("naive-quantized"), "code 8", kind=CorruptFile)
    refused(arrays, config("naive-quantized", num_bits=16), "int16", kind=CorruptFile)


def test_a_folder_is_a_model():
    model = nibblecast.load(FIXTURES / "compressed_tensors_mixed")
    assert model.metadata.producer == "compressed-tensors"
