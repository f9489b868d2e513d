"""float32 values as the shortest C literals that read back as the same float32: `-1.2345678e-02f`, many at a time.

A decimal reads back as x when it lies nearer to x than to x's neighbours. Rounded to 9 significant digits every float32
does, and how few are enough is found by trying. The arithmetic is in float64, whose error is eight orders of
magnitude below the gap between float32 neighbours: a margin excludes the decimals that it could misjudge, and those
that lie halfway, so that no compiler's rounding of ties matters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Characters of one literal with its comma, the longest: "-1.23456789e-38f,".
WIDTH = 17

NAN, INFINITY = b"NIBBLECAST_NAN", b"NIBBLECAST_INF"

_MAX_DIGITS = 9
_FEWEST_TRIED = 6  # a normal float32's shortest decimal of fewer digits is the 6-digit one without its trailing zeros
_MARGIN = 1e-12
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
_POWER_BIAS = 60
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(-_POWER_BIAS, _POWER_BIAS + 1)])
_MANTISSA_END = 11  # then "e", a sign, two digits, "f", ","


def literals(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """ASCII of each value of shape (n,), right-aligned and with a comma: shape (n, WIDTH).

    NaN and the infinities, for which C has no literals, become the macros NIBBLECAST_NAN and NIBBLECAST_INF.
    """
    finite = np.isfinite(values)
    digits, count, exponent = _shortest(np.abs(np.where(finite, values, np.float32(0))))
    out = np.full((values.size, WIDTH), ord(" "), np.uint8)
    for k in range(2, _MAX_DIGITS + 1):
        rows = np.flatnonzero(count == k)
        if rows.size:
            out[rows, _MANTISSA_END - k - 1 :] = _literals_of(digits[rows], k, exponent[rows])
    negative = np.flatnonzero(np.signbit(values))
    out[negative, _MANTISSA_END - 2 - count[negative]] = ord("-")
    for row in np.flatnonzero(~finite).tolist():
        out[row] = np.frombuffer(_name_of(values[row]).rjust(WIDTH - 1) + b",", np.uint8)
    return out


def _name_of(value: np.float32) -> bytes:
    name = NAN if np.isnan(value) else INFINITY
    return b"-" + name if np.signbit(value) else name


def _shortest(values: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """For finite values >= 0: the significant digits as one integer, how many they are (at least 2), and the decimal
    exponent of the first digit; each of shape (n,)."""
    x = values.astype(np.float64)
    nonzero = x > 0
    exponent = np.floor(np.log10(x, where=nonzero, out=np.zeros_like(x))).astype(np.int64)
    exponent -= nonzero & (x < _power(exponent))
    exponent += x >= _power(exponent + 1)
    lower, upper = _interval(values, x)
    digits = np.zeros(values.shape)
    count = np.where(nonzero, 0, 1)
    subnormal = nonzero & (x < _SMALLEST_NORMAL)
    for k in range(1 if subnormal.any() else _FEWEST_TRIED, _MAX_DIGITS + 1):
        rows = np.flatnonzero((count == 0) & (subnormal | (k >= _FEWEST_TRIED)))
        if not rows.size:
            continue
        shift = k - 1 - exponent[rows]
        rounded = np.rint(x[rows] * _power(shift))
        decimal = rounded * _power(-shift)
        found = ((lower[rows] < decimal) & (decimal < upper[rows])) | (k == _MAX_DIGITS)
        digits[rows[found]], count[rows[found]] = rounded[found], k
    return _normal_form(digits.astype(np.uint32), count, exponent)


def _interval(values: NDArray[np.float32], x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bounds between which a decimal reads back as `values`, drawn in by the margin."""
    below = np.nextafter(values, np.float32(0)).astype(np.float64)
    with np.errstate(over="ignore"):
        above = np.nextafter(values, np.float32(np.inf)).astype(np.float64)
    above[np.isinf(above)] = 2.0**128
    return (x + below) / 2 + x * _MARGIN, (x + above) / 2 - x * _MARGIN


def _normal_form(
    digits: NDArray[np.uint32], count: NDArray[np.int64], exponent: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """Without trailing zeros, save the one that makes two digits of one ("1.0")."""
    exponent = exponent + (digits == 10**count)  # 9.9999999 was rounded up to 10
    rows = np.flatnonzero((digits % 10 == 0) & (digits > 0))
    while rows.size:
        digits[rows] //= 10
        count[rows] -= 1
        rows = rows[digits[rows] % 10 == 0]
    single = digits < 10
    return np.where(single, digits * 10, digits).astype(np.uint32), np.where(single, 2, count), exponent


def _literals_of(digits: NDArray[np.uint32], k: int, exponent: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Unsigned literals of exactly `k` significant digits: shape (n, k + 7)."""
    out = np.empty((digits.size, k + 7), np.uint8)
    for column in range(k, 1, -1):
        digits, digit = np.divmod(digits, np.uint32(10))
        out[:, column] = digit + ord("0")
    out[:, 0] = digits + ord("0")
    out[:, 1] = ord(".")
    tail = out[:, k + 1 :]
    tail[:, 0] = ord("e")
    tail[:, 1] = np.where(exponent < 0, ord("-"), ord("+"))
    tail[:, 2], tail[:, 3] = np.abs(exponent) // 10 + ord("0"), np.abs(exponent) % 10 + ord("0")
    tail[:, 4], tail[:, 5] = ord("f"), ord(",")
    return out


def _power(exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    return _POWERS[exponent + _POWER_BIAS]
