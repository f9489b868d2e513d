"""Codes that are stored in wider elements than they need: one in a byte, most often."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    INT2,
    INT4,
    INT8,
    INT16,
    INT32,
    SUB_BYTE,
    UINT2,
    UINT4,
    UINT8,
    UINT16,
    bits_of,
    code_range,
)
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Computed, Data

#: What codes can be, narrowest first.
_CODES = (INT2, UINT2, INT4, UINT4, INT8, UINT8, INT16, UINT16, INT32)


def dtype_for(lowest: int, highest: int) -> np.dtype[Any]:
    """The narrowest dtype for codes from `lowest` to `highest` (quant_min and quant_max): int4 for -7 to 7, uint4 for 0
    to 15. Raises CorruptFile for a range that is none, or that no dtype holds."""
    for dtype in _CODES:
        low, high = code_range(dtype)
        if low <= lowest <= highest <= high and (low == 0) == (lowest >= 0):
            return dtype
    raise CorruptFile(f"has codes from {brief(lowest)} to {brief(highest)}, a range that no code dtype holds")


def narrowed(codes: Tensor, dtype: np.dtype[Any]) -> Data:
    """The elements of `codes` (any integer dtype) as the canonical bytes of `dtype`, made when they are read. Reading
    raises CorruptFile for a code that does not fit."""
    if codes.dtype == dtype:
        return codes.data
    low, high = code_range(dtype)
    bits, itemsize = bits_of(dtype), codes.dtype.itemsize

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start * 8 // bits, min(stop * 8 // bits, codes.size)
        wide = codes.data.read(first * itemsize, last * itemsize).view(codes.dtype)
        if wide.size and (wide.min() < low or wide.max() > high):
            seen = int(wide.min() if wide.min() < low else wide.max())
            raise CorruptFile(f"has the code {seen}, where {low} to {high} are possible", tensor=codes.name)
        return pack(wide, bits) if bits < 8 else wide.astype(dtype).view(np.uint8)

    return Computed(packed_size(codes.size, bits), read, (codes.data,))


def widened(codes: Tensor, dtype: np.dtype[Any]) -> Data:
    """The elements of `codes`, integers of 2, 4 or 8 bits, as the canonical bytes of `dtype`, which has at least as
    many and holds them all; made when they are read."""
    if codes.dtype not in SUB_BYTE or codes.dtype == dtype:
        return codes.data
    narrow, bits = codes.bits, bits_of(dtype)

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start * 8 // bits, min(stop * 8 // bits, codes.size)
        begin, end = first * narrow // 8, packed_size(last, narrow)
        skipped = first - begin * 8 // narrow
        elements = unpack(codes.data.read(begin, end), codes.dtype, skipped + last - first)[skipped:]
        return pack(elements, bits) if bits < 8 else elements.view(np.uint8)

    return Computed(packed_size(codes.size, bits), read, (codes.data,))
