"""Parts of any dtype and shape, and configurations of any value: one-line errors or a weight, and nothing else."""

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import Error
from tests.formats.encodings.checkpoints_in_memory import decoded

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.uint32, np.int64, np.float16, np.float32, np.float64, np.bool_]
DTYPES += [np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]
PARTS = ["weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_shape", "weight_zero_point"]
PARTS += [
    "weight_g_idx",
    "weight_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "biases",
    "g_idx",
    "x_blocks",
    "x_scales",
]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32])
NAMES = ["", "awq", "gptq", "gptq_v2", "compressed-tensors", "modelopt", "mxfp4", "mlx", "gemm", "pack-quantized"]
NAMES += ["nvfp4-pack-quantized", "naive-quantized", "group", "channel", "tensor", "block", "int", "float", "NVFP4"]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 64), st.floats(), st.sampled_from(NAMES))
KEYS = ["bits", "group_size", "version", "mode", "format", "quant_algo", "checkpoint_format", "ignore", "m"]
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
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6, unique=True))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    found = {}
    for part in parts:
        dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(shapes)
        content = random.integers(0, draw(st.sampled_from([2, 40, 256])), (*shape, dtype.itemsize), np.uint8)
        found[f"m.{part}"] = content.view(np.bool_ if dtype == np.bool_ else dtype).reshape(shape)
    return found


@settings(deadline=None, max_examples=600, suppress_health_check=list(HealthCheck))
@given(
    arrays=arrays(),
    method=st.sampled_from(NAMES[:8]),
    config=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
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
