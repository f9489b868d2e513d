"""float32 values as the shortest C literals that read back as the same float32: `-1.2345678e-02f`, many at a time.

A decimal reads back as x when it lies nearer to x than to x's neighbours. Rounded to 9 significant digits every float32
does, and how few are enough is found by trying. The arithmetic is in float64, whose error is eight orders of
magnitude below the gap between float32 neighbours: a margin excludes the decimals that it could misjudge, and those
that lie halfway, so that no compiler's rounding of ties matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nibblecast.formats.cheader.literals.digits import (
    COMMA,
    POINT,
    ZERO,
    blank_records,
    group_layout,
    groups,
    put_groups,
    record_type,
    signs,
    windows,
    zeros_at_end,
)

#: Characters of one literal with its comma, the longest: "-1.23456789e-38f,".
WIDTH = 17

NAN, INFINITY = b"NIBBLECAST_NAN", b"NIBBLECAST_INF"

_MAX_DIGITS = 9
_MARGIN = 1e-12
_TIE = 1e-6  # of the last of 9 digits
_MANTISSA_BITS, _BIAS, _NOT_FINITE = 23, 127, 255
_MANTISSA = np.uint32((1 << _MANTISSA_BITS) - 1)
_SMALLEST_NORMAL = np.uint32(1 << _MANTISSA_BITS)
_LEAST_EXPONENT, _MOST_EXPONENT = -45, 38
_POWER_BIAS = 60

#: All nine digits, with room for a window that ends at the second, and for what is written over the last digits.
_RECORD = record_type({"sign": (8, "u1"), "first": (9, "u1"), "point": (10, "u1"), **group_layout(11, 2)}, 25)
_LITERAL = record_type({"exponent": (11, "u4"), "suffix": (15, "u1"), "comma": (16, "u1")}, WIDTH)


def literals(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """ASCII of each value of shape (n,), right-aligned and with a comma: shape (n, WIDTH).

    NaN and the infinities, for which C has no literals, become the macros NIBBLECAST_NAN and NIBBLECAST_INF.
    """
    finite, negative = np.isfinite(values), np.signbit(values)
    all_finite = bool(finite.all())
    digits, exponent = _shortest(np.abs(values if all_finite else np.where(finite, values, np.float32(0))))
    first, *others = groups(digits, 2)
    text = blank_records(values.size, _RECORD)
    text["sign"] = signs(negative)
    text["first"] = first + np.uint32(ZERO)
    text["point"] = POINT
    put_groups(text, others)
    count = np.maximum(_MAX_DIGITS - zeros_at_end(others), 2)  # "1.0"
    out = windows(text, count - 1, WIDTH).view(_LITERAL)
    out["exponent"] = np.take(_exponents(), exponent - _LEAST_EXPONENT)
    out["suffix"] = ord("f")
    out["comma"] = COMMA
    characters = out.view(np.uint8).reshape(values.size, WIDTH)
    if not all_finite:
        for rows, name in ((np.isnan(values), NAN), (np.isinf(values), INFINITY)):
            characters[rows & ~negative] = np.frombuffer(name.rjust(WIDTH - 1) + b",", np.uint8)
            characters[rows & negative] = np.frombuffer((b"-" + name).rjust(WIDTH - 1) + b",", np.uint8)
    return characters


@cache
def _exponents() -> NDArray[np.uint32]:
    """The text of every decimal exponent."""
    exponents = range(_LEAST_EXPONENT, _MOST_EXPONENT + 1)
    return np.array([f"e{exponent:+03}".encode() for exponent in exponents]).view(np.uint32)


def _shortest(values: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """For finite values >= 0: 9 significant digits as one integer, of which only the zeros at the end are no part of
    the shortest decimal, and the decimal exponent of the first; each of shape (n,)."""
    bits = values.view(np.uint32)
    binary = bits >> np.uint32(_MANTISSA_BITS)
    powers = _powers()
    row = binary * np.uint32(2) + (bits >= np.take(powers.next_decade, binary))
    scaled = values.astype(np.float64) * np.take(powers.scale, row)
    reach = np.take(powers.half_gap, row) - scaled * _MARGIN
    digits = np.rint(scaled)
    special = (bits & _MANTISSA == 0) | (bits < _SMALLEST_NORMAL)
    for unit in (10.0, 100.0, 1000.0):  # shorter ones are those of 6 digits without the zeros at the end
        rounded = np.rint(scaled / unit) * unit
        off = np.abs(rounded - scaled)
        digits = np.where(off < reach, rounded, digits)
        special |= off > unit / 2 - _TIE
    exponent = np.take(powers.exponent, row)
    rows = np.flatnonzero(special)
    rows = rows[bits[rows] > 0]
    if rows.size:
        digits[rows], exponent[rows] = _shortest_by_trying(values[rows])
    rounded_up = digits == 10.0**_MAX_DIGITS  # of 9.9999999
    digits[rounded_up] /= 10
    return digits.astype(np.int32).view(np.uint32), exponent + rounded_up


@dataclass(frozen=True, slots=True)
class _Powers:
    """By a float32's exponent bits, the bits of the least float32 from the next power of ten on. By twice the exponent
    bits, and 1 more for a float32 from there on: its decimal exponent, what makes 9 digits before the point of it, and
    half the gap to its neighbours, scaled likewise."""

    next_decade: NDArray[np.uint32]
    exponent: NDArray[np.int64]
    scale: NDArray[np.float64]
    half_gap: NDArray[np.float64]


@cache
def _powers() -> _Powers:
    """The tables; zeros for 0, for subnormal numbers and for what is not finite."""
    next_decade = np.zeros(_NOT_FINITE + 1, np.float32)
    exponents, scale, half_gap = (np.zeros(2 * (_NOT_FINITE + 1)) for _ in range(3))
    next_decade[[0, _NOT_FINITE]] = np.inf
    for bits in range(1, _NOT_FINITE):
        least = math.floor((bits - _BIAS) * math.log10(2))
        power = float(f"1e{least + 1}")
        nearest = np.float32(power if least < _MOST_EXPONENT else np.inf)
        next_decade[bits] = nearest if float(nearest) >= power else np.nextafter(nearest, np.float32(np.inf))
        for row, exponent in enumerate((least, least + 1), 2 * bits):
            exponents[row], scale[row] = exponent, float(f"1e{_MAX_DIGITS - 1 - exponent}")
            half_gap[row] = scale[row] * 2.0 ** (bits - _BIAS - _MANTISSA_BITS - 1)
    return _Powers(next_decade.view(np.uint32), exponents.astype(np.int64), scale, half_gap)


def _shortest_by_trying(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The same for any values, more slowly: for powers of two, whose neighbours are not equally far; for subnormal
    numbers, which may have fewer than 6 digits; and for those halfway between two decimals, where scaling twice would
    round twice. 10^9 stands for 10^8 of the next exponent."""
    x = values.astype(np.float64)
    exponent = np.floor(np.log10(x)).astype(np.int64)
    exponent -= x < _power(exponent)
    exponent += x >= _power(exponent + 1)
    lower, upper = _interval(values, x)
    digits = np.rint(x * _power(_MAX_DIGITS - 1 - exponent))
    for count in range(_MAX_DIGITS - 1, 0, -1):
        shift = count - 1 - exponent
        rounded = np.rint(x * _power(shift))
        decimal = rounded * _power(-shift)
        digits = np.where((lower < decimal) & (decimal < upper), rounded * 10.0 ** (_MAX_DIGITS - count), digits)
    return digits, exponent


def _interval(values: NDArray[np.float32], x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bounds between which a decimal reads back as `values`, drawn in by the margin."""
    below = np.nextafter(values, np.float32(0)).astype(np.float64)
    above = np.nextafter(values, np.float32(np.inf)).astype(np.float64)
    return (x + below) / 2 + x * _MARGIN, (x + above) / 2 - x * _MARGIN


@cache
def _all_powers() -> NDArray[np.float64]:
    return np.array([float(f"1e{exponent}") for exponent in range(-_POWER_BIAS, _POWER_BIAS + 1)])


def _power(exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take(_all_powers(), exponent + _POWER_BIAS)
