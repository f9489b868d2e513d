"""Weights for MLX: random ones in each of its modes, and those of other libraries' fixtures."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

import nibblecast
from nibblecast.converters.ir import Quantization, Tensor, blocked, grid_shape
from tests.formats.encodings.checkpoints import FIXTURES

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT4, E4M3, E8M0 = (np.dtype(t) for t in (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu))
FLOATS = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}
#: What other libraries made.
SOURCES = [
    *sorted(path for path in FIXTURES.iterdir() if path.is_dir()),
    *sorted(FIXTURES.parent.glob("torchao/*.safetensors")),
    FIXTURES.parent / "gguf" / "types.gguf",
]
#: Those of which nothing can be held: codebooks, other sizes of groups, scales that are no powers of two.
OF_NONE = frozenset(
    (
        "bitsandbytes_fp4_bf16",
        "bitsandbytes_int8",
        "bitsandbytes_nf4",
        "bitsandbytes_nf4_double",
        "bitsandbytes_nf4_storage",
        "float8.safetensors",
        "int4_tile_packed.safetensors",
        "int8.safetensors",
        "intx.safetensors",
        "quanto_qfloat8",
    )
)


def quantized(shape, dtype, block_shape=None, *, scale=np.float32, zero_point=None, offset=None, seed=0, **more):
    """A weight `m.weight` of random codes; `zero_point` is a dtype, or an array for each block."""
    random = np.random.default_rng(seed)
    dtype, count = np.dtype(dtype), int(np.prod(shape))
    bits = Tensor.from_array("", np.zeros(1, np.uint8).view(dtype)).bits
    codes = random.integers(0, 1 << bits, count).astype(np.uint8).view(dtype).reshape(shape)
    block_shape = block_shape or blocked(shape, len(shape) - 1, 32)
    grid = grid_shape(shape, block_shape)
    scales = np.asarray(random.normal(0.01, 0.002, grid) if not isinstance(scale, np.ndarray) else scale)
    parameters = {
        "scale": Tensor.from_array("scale", scales if isinstance(scale, np.ndarray) else scales.astype(scale))
    }
    if zero_point is not None:
        zeros = random.integers(0, 1 << min(bits, 7), grid).astype(np.uint8)
        parameters["zero_point"] = Tensor.from_array("zero_point", zeros.astype(zero_point))
    if offset is not None:
        parameters["offset"] = Tensor.from_array("offset", random.normal(size=grid).astype(offset))
    return Tensor.from_array("m.weight", codes, Quantization(block_shape=block_shape, **parameters, **more))


FLOAT_MODES = {"mxfp4": (FLOAT4, E8M0, 32), "mxfp8": (E4M3, E8M0, 32), "nvfp4": (FLOAT4, E4M3, 16)}


def fixture_weights(path):
    """The quantized weights of a file, with names as MLX has them."""
    pickled = path / "model.pt"
    model = nibblecast.load(pickled if pickled.exists() else path)
    for name, tensor in model.items():
        if tensor.quantization is not None:
            yield tensor if name.endswith(".weight") else replace(tensor, name=f"{name}.weight")
