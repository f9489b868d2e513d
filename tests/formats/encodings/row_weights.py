"""Random matrices of integer codes, in every form of codes and parameters that can be stored in rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, grid_shape
from nibblecast.converters.storage import Data

SIGNED = (np.dtype(ml_dtypes.int2), np.dtype(ml_dtypes.int4), np.dtype(np.int8))
FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))


def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The smallest and the largest code."""
    bits = bits_of(dtype)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype in SIGNED else (0, (1 << bits) - 1)


def weight(
    shape: tuple[int, int],
    dtype: Any = ml_dtypes.int4,
    block_shape: tuple[int, int] = (1, 32),
    *,
    scale: Any = np.float16,
    zeros: Any = None,
    at: int | None = None,
    compute: Any = None,
    seed: int = 0,
    name: str = "model.layers.0.self_attn.q_proj.weight",
) -> Tensor:
    """A weight; `zeros` is the dtype of its zero points (None: it has none), `at` the value of all of them."""
    random, dtype = np.random.default_rng(seed), np.dtype(dtype)
    low, high = limits(dtype)
    grid = grid_shape(shape, block_shape)
    zero_point = None
    if zeros is not None:
        values = random.integers(low, high + 1, grid) if at is None else np.full(grid, at)
        zero_point = Tensor.from_array("zero_point", _as(values, np.dtype(zeros)))
    scales = (random.random(grid) / 50 + 0.001).astype(scale)
    quantization = Quantization(
        Tensor.from_array("scale", scales), block_shape, zero_point, compute_dtype=np.dtype(compute or scale)
    )
    return Tensor.from_array(name, _as(random.integers(low, high + 1, shape), dtype), quantization)


def _as(values: Any, dtype: np.dtype[Any]) -> Any:
    return values.astype(SUB_BYTE[dtype][1]).view(dtype) if dtype in SUB_BYTE else values.astype(dtype)


def with_index(tensor: Tensor, index: Any, axis: int = 1) -> Tensor:
    """The weight with a group index."""
    assert tensor.quantization is not None
    found = GroupIndex(axis, Tensor.from_array("index", np.asarray(index)))
    return replace(tensor, quantization=replace(tensor.quantization, group_index=found))


def changed(tensor: Tensor, **parameters: Any) -> Tensor:
    """The weight with other parameters."""
    assert tensor.quantization is not None
    return replace(tensor, quantization=replace(tensor.quantization, **parameters))


class Unread(Data):
    """Data that must not be read yet."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def read(self, start: int, stop: int) -> Any:
        raise AssertionError(f"bytes {start} to {stop} are read at planning")


def unread(tensor: Tensor) -> Tensor:
    """The weight with codes that must not be read."""
    return replace(tensor, data=Unread(tensor.nbytes))
