"""Facts about the dtypes of elements: their names, their bits, and the integers that they hold.

NumPy lacks types narrower than a byte, and bfloat16. ml_dtypes adds them, but `np.iinfo`, `itemsize` and `kind` give
wrong answers for them. So all code asks here, and gets one answer for both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

BOOL = np.dtype(np.bool_)
INT2, UINT2 = np.dtype(ml_dtypes.int2), np.dtype(ml_dtypes.uint2)
INT4, UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
INT16, UINT16 = np.dtype(np.int16), np.dtype(np.uint16)
INT32, UINT32 = np.dtype(np.int32), np.dtype(np.uint32)
INT64, UINT64 = np.dtype(np.int64), np.dtype(np.uint64)
FLOAT4 = np.dtype(ml_dtypes.float4_e2m1fn)
FLOAT6_E2M3, FLOAT6_E3M2 = np.dtype(ml_dtypes.float6_e2m3fn), np.dtype(ml_dtypes.float6_e3m2fn)
FLOAT8_E4M3, FLOAT8_E4M3FNUZ = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e4m3fnuz)
FLOAT8_E5M2, FLOAT8_E5M2FNUZ = np.dtype(ml_dtypes.float8_e5m2), np.dtype(ml_dtypes.float8_e5m2fnuz)
FLOAT8_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)

#: The dtypes narrower than a byte: bits of one element, and the NumPy dtype that `packing.unpack` gives for it.
SUB_BYTE: Mapping[np.dtype[Any], tuple[int, np.dtype[Any]]] = MappingProxyType(
    {INT2: (2, INT8), UINT2: (2, UINT8), INT4: (4, INT8), UINT4: (4, UINT8), FLOAT4: (4, UINT8)}
)
#: The dtype of unsigned codes, by their bits.
UNSIGNED: Mapping[int, np.dtype[Any]] = MappingProxyType({2: UINT2, 4: UINT4, 8: UINT8})
#: The dtypes that values can be decoded to, by name.
FLOAT_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
)
FLOAT8S = frozenset((FLOAT8_E4M3, FLOAT8_E4M3FNUZ, FLOAT8_E5M2, FLOAT8_E5M2FNUZ, FLOAT8_E8M0))
#: The floating-point dtypes narrower than float32 that NumPy lacks.
SMALL_FLOATS = FLOAT8S | {BFLOAT16, FLOAT6_E2M3, FLOAT6_E3M2, FLOAT4}


def bits_of(dtype: np.dtype[Any]) -> int:
    """Bits that one element takes in canonical bytes: 2 or 4 for the sub-byte dtypes, else 8 times the item size."""
    return SUB_BYTE[dtype][0] if dtype in SUB_BYTE else 8 * dtype.itemsize


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is a real floating-point type, ml_dtypes' included."""
    return dtype.kind == "f" or dtype in SMALL_FLOATS


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is an integer type, int2/uint2/int4/uint4 included, bool not."""
    return dtype.kind in "iu" or (dtype in SUB_BYTE and dtype not in SMALL_FLOATS)


def is_signed(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is a signed integer type, int2 and int4 included."""
    return (SUB_BYTE[dtype][1] if dtype in SUB_BYTE else dtype).kind == "i"


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer of `bits` bits."""
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def code_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The smallest and the largest integer that `dtype`, an integer type, holds."""
    return integer_range(bits_of(dtype), is_signed(dtype))


def in_range(value: int, dtype: np.dtype[Any]) -> bool:
    """Whether `dtype`, an integer type, holds `value`."""
    lowest, highest = code_range(dtype)
    return lowest <= value <= highest


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a dtype. Elements that are whole blocks, not decoded here, have a structured dtype; its only field
    has the name of their type."""
    return dtype.names[0] if dtype.names else dtype.name
