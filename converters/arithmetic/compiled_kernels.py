"""The loops over codes, compiled by numba when this module is imported, and cached on disk.

Operations are neither contracted nor reordered, so each gives the same bits as NumPy's. The processor converts to
float16 itself, rounding as in IEEE 754. Importing raises ImportError if the processor cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import float32, int64, njit, types, uint16, void
from numba.extending import intrinsic

#: Numbers that `decode` takes: how elements are stored, the operations, and what their results are rounded to.
TABLE, UNSIGNED4, SIGNED4, UNSIGNED8, SIGNED8 = range(5)
SUBTRACT, MULTIPLY, ADD = range(3)
KEPT, FLOAT16, BFLOAT16 = range(3)

_CHUNK = 1024  # elements at a time, which stay in the first-level cache
_SIGN, _INFINITY, _NAN = np.uint32(0x80000000), np.uint32(0x7F800000), np.uint32(0x7FC00000)
_ONE, _16, _ROUNDING, _HIGH = np.uint32(1), np.uint32(16), np.uint32(0x7FFF), np.uint32(0xFFFF0000)

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_TABLE = types.Array(types.float32, 1, "C", readonly=True)

if binding.get_default_triple().startswith("x86_64") and not binding.get_host_cpu_features().get("f16c"):
    raise ImportError("the processor has no instructions for float16")


def _float16_of(_: Any, value: Any) -> Any:
    """The bits of a float32 rounded to float16."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), code


def _float32_of(_: Any, bits: Any) -> Any:
    """The float32 of the same value as these float16 bits."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


_to_float16: Any = intrinsic(_float16_of)
_from_float16: Any = intrinsic(_float32_of)


@njit(inline="always")
def _rounded_to_bfloat16(bits: Any) -> Any:
    """The float32 bits of the nearest bfloat16; `bits` are those of a float32. All NaN become one, with their sign."""
    size = bits & ~_SIGN
    rounded = (bits + _ROUNDING + ((bits >> _16) & _ONE)) & _HIGH
    return rounded if size <= _INFINITY else (bits & _SIGN) | _NAN


@njit(cache=True, nogil=True)
def _widen_nibbles(packed: Any, first: int, excess: int, values: Any, count: int) -> None:
    """Writes codes of 4 bits from element `first` on to `values`; `excess` is 8 for signed codes, else 0."""
    part = packed[first // 2 : (first + count) // 2]  # indices from 0 on need no test for negative ones, so it is fast
    for i in range(count // 2):
        byte = np.int32(part[i])
        values[2 * i] = np.float32(((byte & 15) ^ excess) - excess)
        values[2 * i + 1] = np.float32(((byte >> 4) ^ excess) - excess)


@njit(cache=True, nogil=True)
def _widen_bytes(packed: Any, first: int, excess: int, values: Any, count: int) -> None:
    """Writes codes of 8 bits from element `first` on to `values`; `excess` is 128 for signed codes, else 0."""
    part = packed[first : first + count]
    for i in range(count):
        values[i] = np.float32((np.int32(part[i]) ^ excess) - excess)


@njit(cache=True, nogil=True)
def _look_up(packed: Any, first: int, table: Any, per_byte: int, values: Any, count: int) -> None:
    """Writes the entries of `table` for each byte to `values`: `per_byte` of them, copied in pairs."""
    part = packed[first // per_byte : (first + count) // per_byte]
    if per_byte == 1:
        for i in range(count):
            values[i] = table[part[i]]
        return
    pairs, table_pairs = values.view(np.uint64), table.view(np.uint64)
    if per_byte == 2:
        for i in range(part.size):
            pairs[i] = table_pairs[part[i]]
        return
    each = np.uint64(per_byte // 2)
    for i in range(np.uint64(part.size)):
        for j in range(each):
            pairs[i * each + j] = table_pairs[part[i] * each + j]


@njit(cache=True, nogil=True)
def _apply(operation: int, parameters: Any, number: int, block: int, values: Any, count: int) -> None:
    """Applies one operation to `count` values; `parameters` from `number` on are those of blocks of `block` values."""
    for start in range(0, count, block):
        parameter = parameters[number]
        number += 1
        part = values[start : min(start + block, count)]
        if operation == SUBTRACT:
            for i in range(part.size):
                part[i] = part[i] - parameter
        elif operation == MULTIPLY:
            for i in range(part.size):
                part[i] = part[i] * parameter
        else:
            for i in range(part.size):
                part[i] = part[i] + parameter


@njit(cache=True, nogil=True)
def _round(dtype: int, values: Any, bits: Any, count: int) -> None:
    """Rounds `values` to FLOAT16 or BFLOAT16; `bits` is a view of the same memory."""
    if dtype == FLOAT16:
        for i in range(count):
            values[i] = _from_float16(_to_float16(values[i]))
    elif dtype == BFLOAT16:
        for i in range(count):
            bits[i] = _rounded_to_bfloat16(bits[i])


@njit(cache=True, nogil=True)
def _write(dtype: int, values: Any, bits: Any, out32: Any, out16: Any, first: int, count: int) -> None:
    """Writes values to `out32` or, as bits of a dtype of 16 bits, to `out16`, from `first` on."""
    if dtype == KEPT:
        part32 = out32[first : first + count]
        for i in range(count):
            part32[i] = values[i]
        return
    part = out16[first : first + count]
    if dtype == FLOAT16:
        for i in range(count):
            part[i] = _to_float16(values[i])
    else:
        for i in range(count):
            part[i] = np.uint16(_rounded_to_bfloat16(bits[i]) >> _16)


@njit(
    void(
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
) -> None:
    """Writes the values of `packed` codes to `out32` or, as bits of the dtype `given_as`, to `out16`. `parameters` has
    a row for each operation, with one parameter per block of `block` elements. `rounded_to` has each result's dtype."""
    values = np.empty(_CHUNK, np.float32)
    bits = values.view(np.uint32)
    size = parameters.shape[1] * block
    whole = _CHUNK // block * block if block <= _CHUNK else _CHUNK
    first = 0
    while first < size:
        count = min(whole, size - first)
        number = first // block
        if block > _CHUNK:
            count = min(count, block - first % block)
        if stored == TABLE:
            _look_up(packed, first, table, per_byte, values, count)
        elif stored <= SIGNED4:
            _widen_nibbles(packed, first, 8 * (stored == SIGNED4), values, count)
        else:
            _widen_bytes(packed, first, 128 * (stored == SIGNED8), values, count)
        for step in range(operations.size):
            _apply(operations[step], parameters[step], number, block, values, count)
            _round(rounded_to[step], values, bits, count)
        _write(given_as, values, bits, out32, out16, first, count)
        first += count
