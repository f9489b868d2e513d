"""Sub-byte codes <-> packed bytes, in the one canonical order.

Row-major over the logical shape as one flat stream, low bits first, no padding between rows, the last byte padded with
zeros: element i of a 4-bit tensor is in byte i // 2, in the low nibble when i is even. TFLite (schema.fbs 3d, INT4 and
INT2), ONNX (TensorProto.raw_data since IR 10) and CMSIS-NN (the s4 kernels) store exactly this.

Why one order for all tensors. With N orders in memory, each pair of formats needs its own conversion; with one, each
format converts to and from it only. Most tensors are in this order on disk already, so they are copied, not repacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE

#: How the elements of a byte spread over the bytes of a wider word: (shift left and merge, then mask), in this order.
_SPREAD = {4: ((4, 0x0F0F),), 2: ((12, 0x000F000F), (6, 0x03030303))}

#: The word with one byte for each element of a packed byte; below, the mask of its code bits after spreading.
_WORDS: Mapping[int, np.dtype[Any]] = MappingProxyType({4: np.dtype("<u2"), 2: np.dtype("<u4")})
_CODES = {bits: shifts[-1][1] for bits, shifts in _SPREAD.items()}
_PIECE = 1 << 16


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` elements of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


class Workspace:
    """Memory for unpacking up to `nbytes` canonical bytes at a time: allocating it anew costs as much as the work."""

    def __init__(self, dtype: np.dtype[Any], nbytes: int) -> None:
        self._words = np.empty((2, nbytes), _WORDS[SUB_BYTE[dtype][0]])

    def of(self, nbytes: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Two arrays of shape (nbytes,)."""
        return self._words[0, :nbytes], self._words[1, :nbytes]


def unpack(
    packed: NDArray[np.uint8], dtype: np.dtype[Any], count: int, workspace: Workspace | None = None
) -> NDArray[Any]:
    """The first `count` elements of canonical bytes as small integers.

    `packed` has shape (ceil(count * bits / 8),); the result has shape (count,) and dtype int8 (int4, int2) or uint8
    (uint4, uint2, and the bit patterns of float4_e2m1fn). Unused bits of the last byte are ignored. With a `workspace`
    the result is a part of it, valid until the next call; else it is a new array.
    """
    bits, storage = SUB_BYTE[dtype]
    wide, shifted = (workspace or Workspace(dtype, packed.size)).of(packed.size)
    wide[...] = packed
    for shift, mask in _SPREAD[bits]:  # at the end every element has its own byte
        np.left_shift(wide, shift, out=shifted)
        np.bitwise_or(wide, shifted, out=wide)
        np.bitwise_and(wide, mask, out=wide)
    codes: NDArray[Any] = wide.view(storage)
    if storage == np.int8:  # two's complement: the highest bit of a code is its sign
        codes ^= np.int8(1 << (bits - 1))
        codes -= np.int8(1 << (bits - 1))
    return codes[:count]


@cache
def byte_table(dtype: np.dtype[Any]) -> NDArray[Any]:
    """The elements of each of the 256 bytes: shape (256, 8 // bits), int8 or uint8 as `SUB_BYTE` says; read-only."""
    per_byte = 8 // SUB_BYTE[dtype][0]
    table = unpack(np.arange(256, dtype=np.uint8), dtype, 256 * per_byte).reshape(256, per_byte)
    table.setflags(write=False)
    return table


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Integers of `bits` (2 or 4) bits as canonical bytes: any shape in, shape (ceil(size * bits / 8),) out.

    Only the low `bits` bits of each element count, so signed and unsigned codes are packed alike.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    flat = flat.view(np.uint8) if flat.dtype.itemsize == 1 else flat.astype(np.uint8)
    missing = -flat.size % (8 // bits)
    if missing:
        flat = np.concatenate([flat, np.zeros(missing, np.uint8)])
    packed = np.empty(packed_size(flat.size, bits), np.uint8)
    words = flat.view(_WORDS[bits])
    for start in range(0, words.size, _PIECE):  # pieces stay in the processor's cache
        wide = words[start : start + _PIECE] & _WORDS[bits].type(_CODES[bits])
        for shift, _ in reversed(_SPREAD[bits]):  # at the end a word's lowest byte holds all of its elements
            wide |= wide >> shift
        packed[start : start + _PIECE] = wide
    return packed
