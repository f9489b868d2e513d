"""Random quantized weights, for what writes them."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.random import Generator

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3, FLOAT8_E8M0
from nibblecast.converters.ir import Quantization, Tensor, grid_shape
from nibblecast.converters.storage import InMemory
from nibblecast.formats.encodings.values.parameters import value_dtype

CODES = tuple(
    np.dtype(t) for t in (ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8)
)
FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))


def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The range of codes of an integer dtype."""
    information = ml_dtypes.iinfo(dtype)
    return int(information.min), int(information.max)


def integers(
    random: Generator,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    *,
    zero_points: str = "none",
    scale: np.dtype[Any] = FLOATS[2],
    compute: np.dtype[Any] | None = None,
    value: np.dtype[Any] | None = None,
) -> Tensor:
    """Codes over their whole range. `zero_points` are "none", "codes" (of their dtype), "int8", "lowest", "highest" or
    "middle"."""
    low, high = limits(dtype)
    grid = grid_shape(shape, block_shape)
    codes = random.integers(low, high + 1, shape).astype(np.int16).astype(dtype)
    chosen = {
        "codes": lambda: random.integers(low, high + 1, grid).astype(np.int16).astype(dtype),
        "int8": lambda: random.integers(max(low, -128), min(high, 127) + 1, grid).astype(np.int8),
        "lowest": lambda: np.full(grid, low, np.int16).astype(dtype),
        "highest": lambda: np.full(grid, high, np.int16).astype(dtype),
        "middle": lambda: np.full(grid, (low + high + 1) // 2, np.int16).astype(dtype),
    }
    quantization = Quantization(
        Tensor.from_array("scale", (random.random(grid) + 0.01).astype(scale)),
        block_shape,
        None if zero_points == "none" else Tensor.from_array("zero_point", chosen[zero_points]()),
        compute_dtype=compute or scale,
        value_dtype=value,
    )
    return Tensor.from_array(name, codes, quantization)


def float8(random: Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Numbers of float8_e4m3fn, any but NaN."""
    bits = random.integers(0, 256, shape).astype(np.uint8)
    return np.where((bits & 0x7F) == 0x7F, 0, bits).astype(np.uint8).view(FLOAT8_E4M3)


def exponents(random: Generator, grid: tuple[int, ...]) -> Tensor:
    """Powers of two that float8 and float4 times them keep in float16, bfloat16 and float32."""
    return Tensor("scale", grid, FLOAT8_E8M0, InMemory(random.integers(124, 131, prod(grid)).astype(np.uint8)))


def float4(
    random: Generator, name: str, shape: tuple[int, ...], scale: Tensor, size: int, compute: np.dtype[Any] = FLOATS[2]
) -> Tensor:
    """Float4 codes in blocks of `size` along the last axis."""
    data = InMemory(random.integers(0, 256, prod(shape) // 2).astype(np.uint8))
    block_shape = (*(1,) * (len(shape) - 1), size)
    return Tensor(name, shape, FLOAT4, data, Quantization(scale, block_shape, compute_dtype=compute))


def float8_scales(random: Generator, grid: tuple[int, ...], outer: float | None) -> Tensor:
    """Scales of float8, under one float32 or not."""
    scale = Tensor.from_array("scale", np.abs(float8(random, grid).astype(np.float32)).astype(FLOAT8_E4M3))
    if outer is None:
        return scale
    whole = Tensor.from_array("scale", np.full((1,) * len(grid), outer, np.float32))
    return Tensor("scale", grid, FLOAT8_E4M3, scale.data, Quantization(whole, grid))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Integers in matrices of odd shapes, in blocks of every kind, the last of which may be shorter."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 70))
    height = draw(st.sampled_from((1, 2, 7, rows)))
    width = draw(st.sampled_from((1, 8, 16, 32, columns)))
    scale = draw(st.sampled_from(FLOATS))
    arithmetic = ((scale, None), (FLOATS[2], None), (FLOATS[2], value_dtype(scale)))
    compute, value = draw(st.sampled_from(arithmetic))
    return integers(
        np.random.default_rng(draw(st.integers(0, 9))),
        "a.b.weight",
        draw(st.sampled_from(CODES)),
        (rows, columns),
        (height, width),
        zero_points=draw(st.sampled_from(("none", "codes", "int8", "lowest", "highest", "middle"))),
        scale=scale,
        compute=compute,
        value=value,
    )
