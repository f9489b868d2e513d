"""float32 rounded to float16 by NumPy's vectorised operations, because NumPy's own cast is not vectorised.

The result equals `astype` bit for bit: to nearest, ties to even, infinity beyond the largest, subnormal numbers.
A number of exponent e is rounded to the 11 bits of float16 by adding 1.5 * 2 ** (e + 13) and subtracting it again: the
sum has no room for more bits, whatever the number's sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIGN16, _SIGN = np.uint16(0x8000), np.uint32(0x80000000)
_EXPONENT = np.uint32(0x7F800000)
#: float16's least normal number, 2 ** -14 (subnormal numbers have the same last place), and 2 ** 15, near the largest.
_LEAST, _NEAR_LARGEST = np.uint32(0x38800000), np.uint32(0x47000000)
_SHIFT = np.float32(1.5 * 2**13)
#: The exponent bias of float16 is 112 less than that of float32, and its mantissa is 13 bits shorter.
_LESS, _BITS_LESS = np.float32(2.0**-112), np.uint32(13)
_PIECE = 1 << 15  # with the intermediate arrays, half of a common second-level cache


class Float16:
    """Rounds float32 numbers, with intermediate arrays that are allocated once."""

    def __init__(self) -> None:
        self._exponents, self._rounded = np.empty((2, _PIECE), np.uint32)
        self._signs = np.empty(_PIECE, np.uint16)
        self._least = np.full(_PIECE, _LEAST)  # NumPy's maximum with a single number is slow

    def cast(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        """Writes `values`, shape (n,), to `out`, float16 of that shape."""
        for start in range(0, values.size, _PIECE):
            self._cast_piece(values[start : start + _PIECE], out[start : start + _PIECE])

    def round(self, values: NDArray[np.float32]) -> None:
        """Rounds `values`, shape (n,), in place: each becomes the nearest float16 number, still as float32."""
        for start in range(0, values.size, _PIECE):
            self._round_piece(values[start : start + _PIECE])

    def _cast_piece(self, values: NDArray[np.float32], out: NDArray[Any]) -> None:
        if not self._round(values):
            with np.errstate(over="ignore", invalid="ignore"):
                out[...] = values
            return
        wide, signs, result = self._rounded[: values.size], self._signs[: values.size], out.view(np.uint16)
        number = wide.view(np.float32)
        np.multiply(number, _LESS, out=number)
        np.right_shift(wide, _BITS_LESS, out=wide)
        result[...] = wide
        np.right_shift(values.view(np.uint32), np.uint32(16), out=wide)
        signs[...] = wide  # those of zeros as well
        np.bitwise_and(signs, _SIGN16, out=signs)
        np.bitwise_or(result, signs, out=result)

    def _round_piece(self, values: NDArray[np.float32]) -> None:
        if not self._round(values):
            with np.errstate(over="ignore", invalid="ignore"):
                values[...] = values.astype(np.float16)
            return
        bits = values.view(np.uint32)
        np.bitwise_and(bits, _SIGN, out=bits)
        np.bitwise_or(bits, self._rounded[: values.size], out=bits)

    def _round(self, values: NDArray[np.float32]) -> bool:
        """Rounds the values into `_rounded`, except for the sign of zeros. False, without rounding, if any of them
        is near the largest number or beyond it."""
        exponents, least = self._exponents[: values.size], self._least[: values.size]
        np.bitwise_and(values.view(np.uint32), _EXPONENT, out=exponents)
        if exponents.max(initial=0) >= _NEAR_LARGEST:
            return False
        np.maximum(exponents, least, out=exponents)
        shift, number = exponents.view(np.float32), self._rounded[: values.size].view(np.float32)
        np.multiply(shift, _SHIFT, out=shift)
        np.add(values, shift, out=number)
        np.subtract(number, shift, out=number)
        return True
