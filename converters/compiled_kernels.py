"""The loops over codes, compiled by numba when this module is imported, and kept on the disk for the next time.

Operations are neither contracted nor reordered: each gives the bits that NumPy's gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import boolean, float32, int64, njit, types, uint16

#: How elements are stored, operations, and what their results are rounded to: numbers that `decode` takes.
TABLE, UNSIGNED4, SIGNED4, UNSIGNED8, SIGNED8 = range(5)
SUBTRACT, MULTIPLY, ADD = range(3)
KEPT, FLOAT16, BFLOAT16 = range(3)

_CHUNK = 1024  # elements: what is computed stays in the first-level cache
_SIGN, _INFINITY = np.uint32(0x80000000), np.uint32(0x7F800000)
#: float32's bits of 0.5, of 2 ** -14, float16's least normal number, and of 2 ** 16, beyond its largest.
_HALF, _LEAST, _BEYOND = np.uint32(0x3F000000), np.uint32(0x38800000), np.uint32(0x47800000)
#: What makes float32's exponent float16's, and rounds to the nearest.
_REBIASED = np.uint32(0xC8000FFF)
_ONE, _13, _16 = np.uint32(1), np.uint32(13), np.uint32(16)

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_TABLE = types.Array(types.float32, 1, "C", readonly=True)


@njit(cache=True, nogil=True)
def _widen_nibbles(packed: Any, first: int, excess: int, values: Any, count: int) -> None:
    """Codes of 4 bits from element `first` on: unsigned ones, or signed ones where `excess` is 8."""
    part = packed[first // 2 : (first + count) // 2]  # indexes that begin with 0 are known not to be negative
    for i in range(count // 2):
        byte = np.int32(part[i])
        values[2 * i] = np.float32(((byte & 15) ^ excess) - excess)
        values[2 * i + 1] = np.float32(((byte >> 4) ^ excess) - excess)


@njit(cache=True, nogil=True)
def _widen_bytes(packed: Any, first: int, excess: int, values: Any, count: int) -> None:
    """Likewise codes of 8 bits, whose `excess` is 128."""
    part = packed[first : first + count]
    for i in range(count):
        values[i] = np.float32((np.int32(part[i]) ^ excess) - excess)


@njit(cache=True, nogil=True)
def _look_up(packed: Any, first: int, table: Any, per_byte: int, values: Any, count: int) -> None:
    part = packed[first // per_byte : (first + count) // per_byte]
    if per_byte == 2:
        for i in range(count // 2):
            byte = np.uint32(part[i])
            values[2 * i] = table[2 * byte]
            values[2 * i + 1] = table[2 * byte + 1]
        return
    for i in range(count // per_byte):
        byte = np.uint32(part[i])
        for j in range(per_byte):
            values[i * per_byte + j] = table[byte * per_byte + j]


@njit(cache=True, nogil=True)
def _apply(operation: int, parameters: Any, number: int, block: int, values: Any, count: int) -> None:
    """`parameters` from `number` on for blocks of `block` values; less than a block where `count` is."""
    for start in range(0, count, block):
        parameter = parameters[number + start // block]
        stop = min(start + block, count)
        if operation == SUBTRACT:
            for i in range(start, stop):
                values[i] = values[i] - parameter
        elif operation == MULTIPLY:
            for i in range(start, stop):
                values[i] = values[i] * parameter
        else:
            for i in range(start, stop):
                values[i] = values[i] + parameter


@njit(cache=True, nogil=True)
def _has_nan(bits: Any, count: int) -> bool:
    largest = np.uint32(0)
    for i in range(count):
        largest = max(largest, bits[i] & ~_SIGN)
    return bool(largest > _INFINITY)


@njit(cache=True, nogil=True)
def _to_float16(values: Any, bits: Any, spare: Any, spare_bits: Any, out: Any, first: int, count: int) -> None:
    """Writes float16's bits of values, none of which is NaN, to `out`, from `first` on; `bits` are those of `values`,
    as `spare_bits` those of `spare`."""
    part = out[first : first + count]
    for i in range(count):
        spare[i] = abs(values[i]) + np.float32(0.5)  # rounds what is below the least normal number
    for i in range(count):
        sign = bits[i] & _SIGN
        size = bits[i] ^ sign
        rounded = (size + _REBIASED + ((size >> _13) & _ONE)) >> _13
        rounded = rounded if size >= _LEAST else spare_bits[i] - _HALF
        rounded = rounded if size < _BEYOND else np.uint32(0x7C00)
        part[i] = np.uint16(rounded | (sign >> _16))


@njit(cache=True, nogil=True)
def _from_float16(half: Any, values: Any, bits: Any, count: int) -> None:
    """The inverse of it."""
    for i in range(count):
        size = np.uint32(half[i] & np.uint16(0x7FFF))
        sign = np.uint32(half[i] & np.uint16(0x8000)) << _16
        values[i] = np.float32(size) * np.float32(2.0**-24)  # right for what is below the least normal number
        wide = bits[i] if size < np.uint32(0x0400) else (size << _13) + np.uint32(0x38000000)
        bits[i] = sign | (wide if size < np.uint32(0x7C00) else _INFINITY)


@njit(cache=True, nogil=True)
def _to_bfloat16(bits: Any, out: Any, first: int, count: int) -> None:
    part = out[first : first + count]
    for i in range(count):
        part[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + ((bits[i] >> _16) & _ONE)) >> _16)


@njit(cache=True, nogil=True)
def _write(dtype: int, values: Any, bits: Any, spare: Any, spare_bits: Any, out: Any, first: int, count: int) -> None:
    """Writes the bits that values have as FLOAT16 or BFLOAT16."""
    if dtype == FLOAT16:
        _to_float16(values, bits, spare, spare_bits, out, first, count)
    else:
        _to_bfloat16(bits, out, first, count)


@njit(cache=True, nogil=True)
def _read(dtype: int, half: Any, values: Any, bits: Any, count: int) -> None:
    """Reads them again."""
    if dtype == FLOAT16:
        _from_float16(half, values, bits, count)
    else:
        for i in range(count):
            bits[i] = np.uint32(half[i]) << _16


@njit(
    boolean(
        _BYTES, int64, _TABLE, int64, int64[::1], float32[:, ::1], int64[::1], int64, int64, float32[::1], uint16[::1]
    ),
    cache=True,
    nogil=True,
)
def decode(
    packed: Any,
    stored: int,
    table: Any,
    per_byte: int,
    operations: Any,
    parameters: Any,
    rounded_to: Any,
    block: int,
    given_as: int,
    out32: Any,
    out16: Any,
) -> bool:
    """Writes the values of `packed` codes to `out32` or, as bits of the dtype `given_as`, to `out16`: `parameters` has
    for each operation one of each block of `block` elements, and its result is rounded. False where one is NaN: what
    was written is worth nothing then."""
    values, spare, half = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.uint16)
    bits, spare_bits = values.view(np.uint32), spare.view(np.uint32)
    size = parameters.shape[1] * block
    whole = _CHUNK // block * block if block <= _CHUNK else _CHUNK
    first = 0
    while first < size:
        count = min(whole, size - first)
        if block > _CHUNK:
            count = min(count, block - first % block)
        if stored == TABLE:
            _look_up(packed, first, table, per_byte, values, count)
        elif stored <= SIGNED4:
            _widen_nibbles(packed, first, 8 * (stored == SIGNED4), values, count)
        else:
            _widen_bytes(packed, first, 128 * (stored == SIGNED8), values, count)
        for step in range(operations.size):
            _apply(operations[step], parameters[step], first // block, block, values, count)
            if rounded_to[step] != KEPT:
                if _has_nan(bits, count):
                    return False
                _write(rounded_to[step], values, bits, spare, spare_bits, half, 0, count)
                _read(rounded_to[step], half, values, bits, count)
        if given_as == KEPT:
            part = out32[first : first + count]
            for i in range(count):
                part[i] = values[i]
        elif _has_nan(bits, count):
            return False
        else:
            _write(given_as, values, bits, spare, spare_bits, out16, first, count)
        first += count
    return True
