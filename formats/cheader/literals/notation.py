"""How the elements of each dtype are spelled in C: the array's element type, and literals of one fixed width.

No literal needs a narrowing conversion (an error in C++): packed codes and bit patterns are unsigned and hexadecimal,
signed integers decimal. The most negative int32 and int64 have no literal in C and get <stdint.h>'s names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE
from nibblecast.formats.cheader.literals import digits, doubles, floats

_MANY = 1 << 16


@dataclass(frozen=True, slots=True)
class Notation:
    """The literals of one kind of array.

    `c_type` is the array's element type, `dtype` the same for NumPy; a literal and its comma take `width` characters,
    right-aligned, and `per_line` of them make a line between `before` and `after`. `encode` turns elements of shape
    (n,) and `dtype` into ASCII, uint8 of shape (n, width); it is fastest with `at_once` of them, or with as many as
    there are.
    """

    c_type: str
    dtype: np.dtype[Any]
    width: int
    per_line: int
    encode: Callable[[NDArray[Any]], NDArray[np.uint8]]
    before: bytes = b"    "
    after: bytes = b"\n"
    at_once: int = 1 << 20

    @property
    def nbytes(self) -> int:
        """Bytes of flash that one element takes."""
        return self.dtype.itemsize


@cache
def _table(format: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The literal of every element of a dtype of one or two bytes, by its bit pattern; each an opaque item."""
    count = 1 << (8 * dtype.itemsize)
    patterns = np.arange(count, dtype=f"u{dtype.itemsize}")
    text = (format * count) % tuple(patterns.view(dtype).tolist())
    return np.frombuffer(text.encode(), f"V{len(text) // count}")


@cache
def _table_of_pairs(format: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The two literals of every pair of elements of one byte, by the pair's little-endian bit pattern."""
    one = _table(format, dtype).view(np.uint8).reshape(256, -1)
    pairs = np.empty((256, 256, 2, one.shape[1]), np.uint8)
    pairs[:, :, 0], pairs[:, :, 1] = one, one[:, None]
    return pairs.reshape(-1).view(f"V{2 * one.shape[1]}")


def _look_up(format: str, elements: NDArray[Any]) -> NDArray[np.uint8]:
    itemsize = elements.dtype.itemsize
    literals: NDArray[Any]
    if itemsize == 1 and elements.size >= _MANY and elements.size % 2 == 0:  # twice as fast
        literals = np.take(_table_of_pairs(format, elements.dtype), elements.view("<u2"))
    else:
        literals = np.take(_table(format, elements.dtype), elements.view(f"u{itemsize}"))
    return literals.view(np.uint8).reshape(elements.size, -1)


def _signed(least: bytes, elements: NDArray[Any]) -> NDArray[np.uint8]:
    """Decimals of signed integers; `least` is what C calls the least one."""
    magnitudes = np.abs(elements).view(f"u{elements.dtype.itemsize}")
    literals = digits.right_aligned(magnitudes, elements < 0, len(least) - 1, len(least))
    literals[:, -1] = digits.COMMA
    literals[elements == np.iinfo(elements.dtype).min] = np.frombuffer(least, np.uint8)
    return literals


def _halves(start: bytes, elements: NDArray[Any]) -> NDArray[np.uint8]:
    """A macro of two 32-bit literals in place of one of 64 bits."""
    halves = elements.astype(elements.dtype.newbyteorder("<"), copy=False).view("<u4").reshape(elements.size, 2)
    literals = _hexadecimal(np.ascontiguousarray(halves[:, ::-1]).reshape(-1)).reshape(elements.size, -1)
    around = (np.frombuffer(text, np.uint8) for text in (start, b"),"))
    before, after = (np.broadcast_to(text, (elements.size, text.size)) for text in around)
    return np.concatenate([before, literals[:, :-1], after], axis=1)


def by_table(c_type: str, dtype: type[np.generic], format: str, per_line: int) -> Notation:
    """The notation of a dtype of one or two bytes whose literals, commas included, `format` makes."""
    return Notation(c_type, np.dtype(dtype), len(format % 0), per_line, partial(_look_up, format))


@cache
def _digits() -> NDArray[np.uint32]:
    """The four hexadecimal digits of every 16-bit number."""
    return _table("%04x", np.dtype(np.uint16)).view(np.uint32)


def _hexadecimal(elements: NDArray[Any]) -> NDArray[np.uint8]:
    quarters = elements.astype(elements.dtype.newbyteorder("<"), copy=False).view("<u2").reshape(elements.size, -1)
    count = quarters.shape[1]
    layout = {  # a structure whose members lie where the parts of a literal do: five times as fast as a 2-D array
        "names": ["0x", *map(str, range(count)), "u,"],
        "formats": ["S2", *["u4"] * count, "S2"],
        "offsets": [0, *range(2, 2 + 4 * count, 4), 2 + 4 * count],
    }
    literals: NDArray[Any] = np.empty(elements.size, np.dtype(cast("Any", layout)))
    literals["0x"], literals["u,"] = b"0x", b"u,"
    for place in range(count):
        literals[str(place)] = np.take(_digits(), quarters[:, count - 1 - place])
    return literals.view(np.uint8).reshape(elements.size, -1)


def _by_digits(c_type: str, dtype: type[np.generic], per_line: int) -> Notation:
    return Notation(c_type, np.dtype(dtype), 2 * np.dtype(dtype).itemsize + 4, per_line, _hexadecimal)


def _by_decimals(c_type: str, dtype: type[np.generic], least: bytes, per_line: int) -> Notation:
    return Notation(c_type, np.dtype(dtype), len(least), per_line, partial(_signed, least), at_once=digits.AT_ONCE)


UINT8 = by_table("uint8_t", np.uint8, "0x%02x,", 16)
INT8 = by_table("int8_t", np.int8, "%4d,", 16)
UINT16 = by_table("uint16_t", np.uint16, "0x%04x,", 12)
INT16 = by_table("int16_t", np.int16, "%6d,", 12)
UINT32 = _by_digits("uint32_t", np.uint32, 8)
INT32 = _by_decimals("int32_t", np.int32, b"  INT32_MIN,", 8)
UINT64 = _by_digits("uint64_t", np.uint64, 4)
INT64 = _by_decimals("int64_t", np.int64, b"           INT64_MIN,", 4)
FLOAT32 = Notation("float", np.dtype(np.float32), floats.WIDTH, 6, floats.literals, at_once=digits.AT_ONCE)
FLOAT64 = Notation("double", np.dtype(np.float64), doubles.WIDTH, 4, doubles.literals, at_once=digits.AT_ONCE)

#: The notations of 64-bit integers in C90, which has no literals for them.
WITHOUT_LONG_LITERALS: Mapping[np.dtype[Any], Notation] = MappingProxyType(
    {
        spelling.dtype: replace(
            spelling, width=len(start) + 2 * UINT32.width + 1, per_line=2, encode=partial(_halves, start)
        )
        for spelling, start in ((UINT64, b"NIBBLECAST_UINT64("), (INT64, b"NIBBLECAST_INT64("))
    }
)

#: The notation of each dtype that a tensor may have. What is narrower than a byte goes as packed bytes, what C has no
#: type for as bit patterns.
NOTATIONS: Mapping[np.dtype[Any], Notation] = MappingProxyType(
    {
        **dict.fromkeys(SUB_BYTE, UINT8),
        **{notation.dtype: notation for notation in (UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64)},
        **{notation.dtype: notation for notation in (FLOAT32, FLOAT64)},
        np.dtype(np.bool_): UINT8,
        np.dtype(np.float16): UINT16,
        np.dtype(ml_dtypes.bfloat16): UINT16,
        np.dtype(ml_dtypes.float8_e4m3fn): UINT8,
        np.dtype(ml_dtypes.float8_e4m3fnuz): UINT8,
        np.dtype(ml_dtypes.float8_e5m2): UINT8,
        np.dtype(ml_dtypes.float8_e5m2fnuz): UINT8,
        np.dtype(ml_dtypes.float8_e8m0fnu): UINT8,
        np.dtype(ml_dtypes.float6_e2m3fn): UINT8,
        np.dtype(ml_dtypes.float6_e3m2fn): UINT8,
    }
)
