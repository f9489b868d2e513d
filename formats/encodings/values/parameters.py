"""What encodings share about the parameters of weights, and small floats in blocks with a scale each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT8_E8M0, FLOAT16, FLOAT32, bits_of, is_integer
from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import VALUE_DTYPES, GroupIndex, Quantization, Tensor, blocked
from nibblecast.converters.storage import InMemory

#: The dtypes of scales in which the libraries of checkpoints compute.
FLOATS = frozenset((FLOAT16, BFLOAT16, FLOAT32))


def float_scales(scale: Tensor) -> Tensor:
    """`scale`, which must be float16, bfloat16 or float32. Raises CorruptFile."""
    if scale.dtype not in FLOATS:
        raise CorruptFile(f"has scales of {scale.dtype}, where float16, bfloat16 or float32 is needed")
    return scale


def value_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """What values are rounded to by a library that decodes to `dtype`: nothing, where that is float32 or wider."""
    return dtype if dtype in VALUE_DTYPES else None


def exponents(scale: Tensor) -> Tensor:
    """Scales that are powers of two, stored as their biased exponents in bytes (E8M0 of the OCP MX specification)."""
    if scale.dtype not in (np.uint8, FLOAT8_E8M0):
        raise CorruptFile(f"has scales of {scale.dtype}, where exponents in uint8 are needed")
    return replace(scale, name="scale", dtype=FLOAT8_E8M0)


def small_floats(
    name: str,
    dtype: np.dtype[Any],
    stored: Tensor,
    scale: Tensor,
    size: int,
    value_dtype: np.dtype[Any] | None = None,
) -> Tensor:
    """The weight of float4 codes, two in a byte of `stored` with the first one in its low nibble, or of float8 codes:
    bytes in words or in bytes, of shape (..., n). `size` inputs share a scale. Raises CorruptFile where the shape of
    the scales is another one."""
    if not stored.shape:
        raise CorruptFile("has codes of no axis, where a matrix is needed")
    shape = (*stored.shape[:-1], stored.shape[-1] * stored.bits // bits_of(dtype))
    block_shape = blocked(shape, len(shape) - 1, size)
    return Tensor(name, shape, dtype, stored.data, Quantization(scale, block_shape, value_dtype=value_dtype))


def group_size(told: int, size: int, groups: int) -> int:
    """How many of `size` inputs share one of `groups` parameters; `told` is the configuration's size (-1: all inputs;
    0: it says nothing, and the groups must be equal). Raises CorruptFile where they do not fit."""
    if told == 0 and groups and size % groups == 0:
        return max(1, size // groups)
    found = max(1, size) if told < 0 else told
    if not found or max(1, -(-size // found)) != groups:
        raise CorruptFile(f"has {groups} groups of scales for {size} inputs in groups of {found or 'unknown size'}")
    return found


def group_index(stored: Tensor, size: int, groups: int) -> NDArray[Any]:
    """The group of each of `size` inputs, shape (size,). Raises CorruptFile for groups that there are not."""
    if stored.shape != (size,) or not is_integer(stored.dtype):
        raise CorruptFile(f"has g_idx of shape {stored.shape} and dtype {stored.dtype} for {size} inputs")
    index = stored.numpy()
    if size and (index.min() < 0 or index.max() >= groups):
        raise CorruptFile(f"has g_idx from {index.min()} to {index.max()} for {groups} groups")
    return index


def kept_index(index: NDArray[Any], axis: int) -> GroupIndex:
    """The group index along `axis`, in memory."""
    return GroupIndex(axis, Tensor("group_index", index.shape, index.dtype, InMemory.of(index)))
