"""Small models that try the arithmetic of C on what tests/zoo.py has and more: each integer dtype in each granularity,
all bit patterns of the narrow dtypes, the extremes of the wide ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of, is_integer
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.ir import (
    GroupIndex,
    Model,
    Quantization,
    Tensor,
    blocked,
    grid_shape,
    per_axis,
    per_tensor,
)
from nibblecast.converters.metadata import Activation, Use
from nibblecast.converters.storage import InMemory
from tests import zoo
from tests.formats.cheader.c_harness import model_of

INTEGERS = "int2 uint2 int4 uint4 int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()
FLOATS = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float6_e2m3fn float6_e3m2fn float4_e2m1fn"
).split()
BLOCK_SHAPES = {
    "per-tensor": lambda shape: per_tensor(shape),
    "per-axis 0": lambda shape: per_axis(shape, 0),
    "per-axis 1": lambda shape: per_axis(shape, 1),
    "blocks of 4, the last ragged": lambda shape: blocked(shape, 1, 4),
    "blocks along two axes": lambda shape: (2, 3),
}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, None) or getattr(np, name))


def random_codes(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator, **quantized: Any
) -> Tensor:
    """Any bits at all, in canonical order; padding, be it of the last byte or of 6-bit floats, is zero."""
    count = int(np.prod(shape))
    bits = bits_of(dtype)
    data = rng.integers(0, 64 if "float6" in dtype.name else 256, packed_size(count, bits), dtype=np.uint8)
    if dtype in SUB_BYTE and count * bits % 8:
        data[-1] &= (1 << count * bits % 8) - 1
    return Tensor(name, shape, dtype, InMemory(data), Quantization(**quantized) if quantized else None)


def int8(name: str, count: int) -> Tensor:
    """Plain values of one axis, others for every name and every count."""
    return Tensor.from_array(name, np.random.default_rng([count, *name.encode()]).integers(-128, 128, count, np.int8))


def floats(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any = np.float32) -> Tensor:
    return Tensor.from_array("parameter", (rng.normal(0, 0.05, shape)).astype(dtype))


def integers(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any = np.int8) -> Tensor:
    return Tensor.from_array("parameter", rng.integers(0, 4, shape).astype(dtype))


def quantized_integers() -> Model:
    """Every integer dtype, quantized in every granularity, with and without zero points and offsets."""
    rng = np.random.default_rng(1)
    tensors = []
    shape = (5, 7)
    for dtype in INTEGERS:
        for label, block_of in BLOCK_SHAPES.items():
            grid = grid_shape(shape, block_of(shape))
            parameters = {"scale": floats(grid, rng), "block_shape": block_of(shape)}
            options = {
                "": {},
                " zp": {"zero_point": integers(grid, rng, ml_dtypes.uint4)},
                " zp off": {"zero_point": integers(grid, rng, np.int64), "offset": floats(grid, rng)},
                " real zp": {"zero_point": floats(grid, rng, np.float16), "scale": floats(grid, rng, np.float16)},
                " off": {"offset": floats(grid, rng, ml_dtypes.bfloat16)},
            }
            for name, option in options.items():
                whole = f"{dtype} {label}{name}"
                tensors.append(random_codes(whole, shape, dtype_of(dtype), rng, **(parameters | option)))
        far = Tensor.from_array("zp", np.array([[2**31 - 1], [-(2**31)], [2**24 + 1], [0], [-(2**24) - 3]], np.int64))
        parameters = {"scale": floats((5, 1), rng), "zero_point": far, "block_shape": per_axis(shape, 0)}
        tensors.append(random_codes(f"{dtype} far zero points", shape, dtype_of(dtype), rng, **parameters))
    return model_of(*tensors)


def plain_values() -> Model:
    """Every dtype as plain values: all bit patterns of the narrow ones, the extremes of the wide ones."""
    rng = np.random.default_rng(2)
    tensors = [random_codes(name, (3, 11), dtype_of(name), rng) for name in (*INTEGERS, *FLOATS)]
    for name in (*INTEGERS, *FLOATS):
        dtype = dtype_of(name)
        if dtype.itemsize < 3:
            patterns = np.arange(1 << (6 if "float6" in name else 8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
            data = InMemory(patterns.view(np.uint8))
            tensors.append(Tensor(f"all {name}", (data.nbytes * 8 // bits_of(dtype),), dtype, data))
        elif dtype.kind in "iu":
            info = np.iinfo(dtype)
            array = np.array([info.min, info.min + 1, info.max, 0, -(2**31) if info.min < 0 else 2**31], dtype)
            tensors.append(Tensor.from_array(f"extreme {name}", array))
    tiny = [0.0, -0.0, 1e-45, 1.1754944e-38, 3.4028235e38, 0.1, np.inf, -np.inf, np.nan, 16777216.0]
    tensors += [
        Tensor.from_array("float32 edge", np.array(tiny, np.float32)),
        Tensor.from_array("float64 edge", np.array([*tiny, 1e-300, 1e300, 1 / 3, 1 + 2**-24], np.float64)),
        Tensor.from_array("bool", np.array([[True, False, True]])),
    ]
    return model_of(*tensors)


def odd_shapes() -> Model:
    """No elements, no axes, one element, odd counts, many axes."""
    rng = np.random.default_rng(3)
    tensors = []
    for dtype in ("int4", "uint2", "int8", "float32", "int64"):
        for shape in ((), (0,), (3, 0), (1,), (1, 1, 1), (3,), (2, 3, 1, 5)):
            name = f"{dtype} {shape}"
            tensors.append(random_codes(name, shape, dtype_of(dtype), rng))
            if dtype != "float32":
                block_shape = per_tensor(shape)
                scale = floats(grid_shape(shape, block_shape), rng)
                parameters = {"scale": scale, "block_shape": block_shape}
                tensors.append(random_codes(f"{name} quantized", shape, dtype_of(dtype), rng, **parameters))
    blocks = (1, 2, 1, 3)
    grid = grid_shape((2, 3, 1, 5), blocks)
    quantized = {"scale": floats(grid, rng), "zero_point": integers(grid, rng), "block_shape": blocks}
    tensors.append(random_codes("int4 blocks of four axes", (2, 3, 1, 5), dtype_of("int4"), rng, **quantized))
    return model_of(*tensors)


def schemes() -> Model:
    """Codebooks, act-order, quantized small floats, second-level parameters."""
    rng = np.random.default_rng(4)
    shape = (6, 9)
    grid = grid_shape(shape, (1, 4))
    tensors = []
    for dtype, entries in (("uint2", 4), ("uint4", 16), ("uint8", 256)):
        codebook = floats((entries,), rng)
        parameters = {"scale": floats(grid, rng), "block_shape": (1, 4), "codebook": codebook}
        tensors.append(random_codes(f"codebook {dtype}", shape, dtype_of(dtype), rng, **parameters))
        parameters |= {"offset": floats(grid, rng), "zero_point": integers(grid, rng)}
        tensors.append(random_codes(f"codebook offset {dtype}", shape, dtype_of(dtype), rng, **parameters))
    for axis in (0, 1):
        for index_dtype in (np.int32, np.int64, np.uint8):
            index = Tensor.from_array("index", rng.integers(0, 3, shape[axis]).astype(index_dtype))
            grid_of_groups = (3, 9) if axis == 0 else (6, 3)
            parameters = {
                "scale": floats(grid_of_groups, rng),
                "zero_point": integers(grid_of_groups, rng),
                "block_shape": (2, 1) if axis == 0 else (1, 3),
                "group_index": GroupIndex(axis, index),
            }
            name = f"group index {axis} {np.dtype(index_dtype)}"
            tensors.append(random_codes(name, shape, dtype_of("uint4"), rng, **parameters))
    for dtype in ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float6_e3m2fn"):
        for scale in (floats(grid, rng), random_codes("scale", grid, dtype_of("float8_e8m0fnu"), rng)):
            parameters = {"scale": scale, "block_shape": (1, 4)}
            name = f"{dtype} by {scale.dtype}"
            moved = parameters | {"zero_point": integers(grid, rng)}
            tensors.append(random_codes(f"{name} less zero points", shape, dtype_of(dtype), rng, **moved))
            tensors.append(random_codes(name, shape, dtype_of(dtype), rng, **parameters))
    second = Quantization(floats((1, 1), rng), per_tensor(grid))
    zero_point = Tensor("zero_point", grid, np.dtype(np.uint8), integers(grid, rng, np.uint8).data, second)
    parameters = {"scale": floats(grid, rng), "zero_point": zero_point, "block_shape": (1, 4)}
    tensors.append(random_codes("quantized zero points", shape, dtype_of("uint4"), rng, **parameters))
    return model_of(*tensors)


def common_zoo() -> Model:
    """The models of all writers, without the zero points that int32_t cannot hold."""
    return model_of(*(tensor for tensor in zoo.zoo().values() if not _has_far_zero_point(tensor)))


def _has_far_zero_point(tensor: Tensor) -> bool:
    zero_point = None if tensor.quantization is None else tensor.quantization.zero_point
    if zero_point is None or not is_integer(zero_point.dtype):
        return False
    return bool((zero_point.codes().astype(object) != zero_point.codes().astype(np.int32)).any())


ZOO = {
    "quantized integers": quantized_integers,
    "plain values": plain_values,
    "odd shapes": odd_shapes,
    "schemes": schemes,
    "the zoo of all writers": common_zoo,
    "no tensors": model_of,
}

HOSTILE_NAMES = [
    "*/ int x = 1; /*",
    "/*",
    "ends in a backslash\\",
    "backslash newline\\\nint y;",
    "trigraphs ??/ ??/\n ??=define Z ??)",
    "\"quotes\" 'and' \x00 control \x1b[31m",
    "static",
    "and_eq",
    "__reserved__",
    "tensors",
    "TENSOR",
    "FLASH",
    "tensör/重み/🎯",
    "\ud800 lone surrogate",
    "a" * 500,
    "ä" * 500,
    "a/b",
    "a.b",
    "a_b",
    "A_B",
    "",
    "/",
    "1digit",
    "%s%n",
    "$prefix ${base}",
    "PROGMEM",
    "a_b_scale",
    "a_b_SCALE",
    "// comment \\",
]

AXES = {"CONV_2D": 0, "TRANSPOSE_CONV": 0, "FULLY_CONNECTED": 0, "DEPTHWISE_CONV_2D": 3}
SHAPES = {"FULLY_CONNECTED": (4, 6), "DEPTHWISE_CONV_2D": (1, 3, 3, 6)}
CHANNELS = 6


def activation(dtype=np.int8, channels=CHANNELS):
    return Activation(np.dtype(dtype), (1, 4, 4, channels), 0.5, 0)


def weight(
    operator="CONV_2D", dtype=ml_dtypes.int4, *, per_channel=True, activations=np.int8, shape=None, channels=CHANNELS,
    zero_points=None, block_shape=None, name="w", **parts
):  # fmt: skip
    shape = shape or SHAPES.get(operator, (4, 3, 3, 6))
    axis = AXES[operator]
    block_shape = block_shape or (per_axis(shape, axis) if per_channel else per_tensor(shape))
    grid = [max(1, -(-size // block)) for size, block in zip(shape, block_shape, strict=True)]
    scale = Tensor.from_array("scale", np.ones(grid, np.float32))
    zero_point = None if zero_points is None else Tensor.from_array("zp", np.resize(np.int64(zero_points), grid))
    quantization = Quantization(scale, block_shape, zero_point, **parts)
    runtime = None if activations is None else activation(activations, channels)
    codes = Tensor.from_array(name, np.zeros(shape, np.int8).astype(dtype), quantization)
    return replace(codes, uses=(Use(operator, 1, axis, runtime, runtime),))
