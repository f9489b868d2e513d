"""Parts of any dtype and shape, and configurations of any value: one-line errors or a weight, and nothing else."""

import json
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import Error
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from nibblecast.formats.encodings.configuration import model_config, quantization_config
from nibblecast.formats.encodings.torchao.safetensors_keys import describes
from nibblecast.formats.encodings.torchao.safetensors_keys import grouped as grouped_by_torchao
from nibblecast.formats.safetensors.shards import open_checkpoint
from tests.formats.encodings.checkpoints_in_memory import FIXTURES, decoded
from tests.growth import assert_linear

pytestmark = pytest.mark.slow

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.uint32, np.int64, np.float16, np.float32, np.float64, np.bool_]
DTYPES += [np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]
DTYPES += [ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn]
#: Parts of one weight by the encodings that have them.
FAMILIES = (
    ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    ("weight", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_scale_inv", "scale", "qscale_weight"),
    ("qweight", "qzeros", "scales", "g_idx", "bias"),
    ("weight", "scales", "biases", "zeros", "SCB", "weight_format"),
    ("x", "x_blocks", "x_scales", "x_weight_scale", "x_weight_scale_2", "x_scale_inv"),
    ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"),
    ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "compute_dtype"),
    ("weight._data", "weight._data._data", "weight._scale", "weight._shift", "bias", "input_scale"),
)
PARTS = sorted({part for family in FAMILIES for part in family})
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32])
METHODS = ["", "awq", "gptq", "compressed-tensors", "modelopt", "mxfp4", "mlx", "fp8", "bitsandbytes", "hqq", "quanto"]
NAMES = [*METHODS, "gptq_v2", "gemm", "pack-quantized", "float-quantized", "mxfp6-pack-quantized"]
NAMES += ["nvfp4-pack-quantized", "naive-quantized", "group", "channel", "tensor", "block", "int", "float", "NVFP4"]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 64), st.floats(), st.sampled_from(NAMES))
KEYS = ["bits", "group_size", "version", "mode", "format", "quant_algo", "checkpoint_format", "ignore", "m", "modules"]
KEYS += ["weight_block_size", "quantized_layers", "load_in_8bit"]
WEIGHTS = ["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric"]


@st.composite
def arrays(draw):
    rows, columns, groups = draw(SIZES), draw(SIZES), draw(SIZES)
    shapes = st.sampled_from(
        [
            (rows, columns),
            (rows, groups),
            (groups, rows),
            (rows, columns * 8),
            (columns,),
            (2,),
            (1,),
            (),
            (columns * 8, rows),
            (rows, columns, groups),
            (2, rows, columns),
            (rows, groups, 16),
            (rows * 2, columns),
        ]
    )
    among = st.sampled_from(draw(st.sampled_from([*FAMILIES, PARTS])))
    parts = draw(st.lists(among, min_size=1, max_size=8, unique=True))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    found = {}
    for part in parts:
        dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(shapes)
        content = random.integers(0, draw(st.sampled_from([2, 40, 256])), (*shape, dtype.itemsize), np.uint8)
        found[f"m.{part}"] = content.view(np.bool_ if dtype == np.bool_ else dtype).reshape(shape)
    return found


@settings(max_examples=600)
@given(
    arrays=arrays(),
    method=st.sampled_from(METHODS),
    config=st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(VALUES, max_size=3), max_size=4),
    weights=st.one_of(VALUES, st.dictionaries(st.sampled_from(WEIGHTS), VALUES | st.lists(VALUES, max_size=3))),
    grouped=st.booleans(),
)
def test_nothing_but_errors(arrays, method, config, weights, grouped):
    config = config | ({"quant_method": method} if method else {})
    if grouped:
        config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    try:
        for tensor in decoded(arrays, config).values():
            if tensor.dtype.kind != "c":
                assert tensor.dequantize(np.float32).shape == tensor.shape
    except Error as error:
        assert "\n" not in str(error)


@cache
def real_weights():
    """The tensors of each module of the fixtures, with the configuration beside them."""
    found = []
    for case in sorted(FIXTURES.glob("*/model.safetensors")):
        entries = open_checkpoint(case)[0].entries
        plain = {key: Tensor(key, entry.shape, entry.dtype, entry.data).numpy() for key, entry in entries.items()}
        config, architecture = quantization_config(case.parent), model_config(case.parent)
        modules = dict.fromkeys(key.partition(".weight")[0].rpartition(".")[0] or key for key in plain)
        modules |= dict.fromkeys(key.partition(".weight")[0] for key in plain if ".weight" in key)
        found += [({k: v for k, v in plain.items() if k.startswith(m)}, config, architecture) for m in modules]
    return found


@st.composite
def damaged(draw):
    """A real weight with a part that is gone, of another shape or dtype, or with other bytes."""
    parts, config, architecture = draw(st.sampled_from(real_weights()))
    key = draw(st.sampled_from(sorted(parts)))
    array = parts[key]
    dtype = np.dtype(draw(st.sampled_from([array.dtype, *DTYPES])))
    shape = list(array.shape)
    for _ in range(draw(st.integers(0, 2))):
        axis = draw(st.integers(0, max(0, len(shape) - 1)))
        shape[axis : axis + 1] = draw(st.sampled_from([[], [1], [0], [3], [33], [1, 2], [*shape[axis : axis + 1], 1]]))
    content = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    changed = (content[..., 0] > 127) if dtype == np.bool_ else content.view(dtype).reshape(shape)
    kept = {name: part for name, part in parts.items() if name != key}
    told = draw(st.one_of(st.just({}), st.dictionaries(st.sampled_from([*KEYS, *config]), VALUES, max_size=1)))
    return kept | ({key: changed} if draw(st.integers(0, 9)) else {}), config | told, architecture


@settings(max_examples=400)
@given(damaged())
def test_a_real_weight_that_is_damaged_is_read_or_refused(checkpoint):
    parts, config, architecture = checkpoint
    tensors = {key: Tensor.from_array(key, array) for key, array in parts.items()}
    try:
        for tensor in decode_checkpoint(Checkpoint(tensors, config, architecture))[0].values():
            if tensor.dtype.kind != "c":
                values = tensor.dequantize(np.float32)
                pieces = [part.dequantize(np.float32).reshape(-1) for part in tensor.parts(64)]
                np.testing.assert_array_equal(np.concatenate([values.reshape(-1)[:0], *pieces]), values.reshape(-1))
    except Error as error:
        assert "\n" not in str(error)


HUGE = 10**4000
INT4 = {
    "m.weight_packed": np.zeros((4, 8), np.int32),
    "m.weight_scale": np.ones((4, 2), np.float16),
    "m.weight_shape": np.array([4, 64]),
}
MLX = {
    "m.weight": np.zeros((4, 8), np.uint32),
    "m.scales": np.ones((4, 2), np.float16),
    "m.biases": np.ones((4, 2), np.float16),
}
FP8 = {"m.weight": np.zeros((4, 4), ml_dtypes.float8_e4m3fn), "m.weight_scale_inv": np.ones((2, 2), np.float32)}
GPTQ = {
    "m.qweight": np.zeros((8, 8), np.int32),
    "m.qzeros": np.zeros((1, 1), np.int32),
    "m.scales": np.ones((1, 8), np.float16),
}
QUANTO = {
    "k_proj.weight._data._data": np.zeros((4, 32), np.uint8),
    "k_proj.weight._scale": np.ones((8, 1), np.float16),
    "k_proj.weight._shift": np.ones((8, 1), np.float16),
}
NVFP4 = {
    "m.weight": np.zeros((4, 8), np.uint8),
    "m.weight_scale": np.ones((4, 1), ml_dtypes.float8_e4m3fn),
    "m.weight_scale_2": np.ones((), np.float32),
}


def grouped(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("arrays", "config", "architecture", "message"),
    [
        (
            INT4,
            grouped(num_bits=HUGE, group_size=32),
            {},
            "config group 'g': bits, group size and block must be numbers",
        ),
        (INT4, grouped(num_bits=4, group_size=HUGE), {}, "an integer of 13288 bits"),
        (INT4, grouped(num_bits=4, group_size=-HUGE), {}, "an integer of 13288 bits"),
        (
            INT4,
            grouped(num_bits=4, block_structure=[HUGE, 1]),
            {},
            "config group 'g': bits, group size and block must be numbers",
        ),
        (INT4, grouped(num_bits=4, strategy=["group"]), {}, "has the strategy"),
        (INT4, {"quant_method": "compressed-tensors", "config_groups": {str(n): {} for n in range(2000)}}, {}, "2000"),
        (MLX, {"quant_method": "mlx", "bits": 4, "group_size": HUGE}, {}, "an integer of 13288 bits"),
        (MLX, {"quant_method": "mlx", "bits": HUGE, "group_size": HUGE}, {}, "an integer of 13288 bits"),
        (MLX, {"quant_method": "mlx", "bits": 4, "group_size": 32, "mode": [["affine"]]}, {}, "mode"),
        (FP8, {"quant_method": "fp8", "weight_block_size": [HUGE, HUGE]}, {}, "an integer of 13288 bits"),
        (GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": HUGE}, {}, "an integer of 13288 bits"),
        (GPTQ, {"quant_method": "gptq", "bits": HUGE}, {}, "an integer of 13288 bits"),
        (GPTQ, {"quant_method": [[["gptq"] * 9] * 9] * 9}, {}, "quant_method"),
        (QUANTO, {"quant_method": "quanto"}, {"num_attention_heads": 10**4299, "head_dim": 10**9}, "tells of how"),
        (QUANTO, {"quant_method": "quanto"}, {"num_attention_heads": 1, "hidden_size": HUGE}, "tells of how"),
        (QUANTO, {"quant_method": "quanto", "modules": {"k_proj": {"weights": ["qint4"]}}}, {}, "has weights of"),
        (NVFP4, {"quant_method": "modelopt", "quantized_layers": {"m": {"quant_algo": ["NVFP4"]}}}, {}, "quant_algo"),
        (NVFP4, {"quant_method": "modelopt", "quantized_layers": {"m": {"group_size": HUGE}}}, {}, "an integer of"),
    ],
)
def test_settings_that_are_none_are_one_short_line(arrays, config, architecture, message):
    tensors = {key: Tensor.from_array(key, array) for key, array in arrays.items()}
    with pytest.raises(Error, match=message) as caught:
        decode_checkpoint(Checkpoint(tensors, config, architecture))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_configurations_of_many_modules_take_time_in_proportion():
    """Each weight is looked for among those that a group names, and those that are ignored."""

    def make(count):
        codes, scale = np.zeros((1, 4), np.int8), np.ones((1, 1), np.float16)
        tensors = {f"m{i}.weight": Tensor.from_array(f"m{i}.weight", codes) for i in range(count)}
        tensors |= {f"m{i}.weight_scale": Tensor.from_array(f"m{i}.weight_scale", scale) for i in range(count)}
        config = grouped(num_bits=8, strategy="channel")
        config["config_groups"]["g"]["targets"] = [f"m{i}" for i in range(20 * count)]
        config["ignore"] = [f"n{i}" for i in range(20 * count)]
        return lambda: decode_checkpoint(Checkpoint(tensors, config))

    assert_linear(make, 500)


def test_names_that_metadata_have_again_and_again_are_looked_at_once():
    """torchao's list of names, each of which has a text of its own to be read."""

    def make(count):
        metadata = {"tensor_names": json.dumps(["m"] * count), "m": json.dumps({"_type": "Tensor", "x": "y" * count})}
        stored = {"m": Tensor.from_array("m", np.zeros(1, np.float32))}

        def run():
            assert describes(metadata)
            assert list(grouped_by_torchao(stored, metadata)[0]) == ["m"]

        return run

    assert_linear(make, 20_000)
