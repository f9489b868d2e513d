"""float64 values as the shortest decimals that read back as the same float64, spelled as Python's repr does: `0.05`,
`-1e-05`, `12.0`; many at a time.

A value is m * 2^b with 1 <= m < 2. Times a power of ten it is m * P with 17 digits before the point, where
P = 2^b * 10^(16 - e) is kept in three parts of 26, 26 and 53 bits: the products that count are exact, and the digits
are known to a few millionths of the last one. The shortest decimal is the 15-, 16- or 17-digit one that is nearest to
the value and less than half a gap between neighbours away from it. Where the few millionths could decide, repr does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

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
    right_aligned,
    signs,
    windows,
    zeros_at_end,
)
from nibblecast.formats.cheader.literals.floats import INFINITY, NAN

#: Characters of one literal with its comma, the longest: "-1.2345678901234567e-300,".
WIDTH = 25

_TEXT = WIDTH - 1
_DIGITS = 17
_MARGIN = 2.0**-16
_MANTISSA_BITS = 52
_MANTISSA = np.uint64((1 << _MANTISSA_BITS) - 1)
_UPPER_HALF = ~np.uint64((1 << 27) - 1)
_ONE = np.float64(1).view(np.uint64)
_BIAS, _NOT_FINITE = 1023, 2047
_MOST_EXPONENT = 308

#: All digits, with room for a window that ends at the first, and for what is written over the last ones.
_FRACTION = record_type({"start": (16, "u8"), "first": (24, "u1"), **group_layout(25, 4)}, 42)
_FIXED_POINT = record_type({"whole": (5, f"V{_DIGITS}"), "point": (22, "u1"), **group_layout(23, 4)}, 40)
_SCIENTIFIC = record_type({"sign": (23, "u1"), "first": (24, "u1"), "point": (25, "u1"), **group_layout(26, 4)}, 48)


@dataclass(frozen=True, slots=True)
class _Decimals:
    """17 significant digits as one integer, of which only the zeros at the end are no part of the shortest decimal, the
    decimal exponent of the first, and the sign; each of shape (n,)."""

    digits: NDArray[np.uint64]
    exponent: NDArray[np.int64]
    negative: NDArray[np.bool_]

    def of(self, rows: NDArray[np.int64]) -> _Decimals:
        """Those of these rows."""
        return _Decimals(self.digits[rows], self.exponent[rows], self.negative[rows])


def literals(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """ASCII of each value of shape (n,), right-aligned and with a comma: shape (n, WIDTH).

    NaN and the infinities, for which C has no literals, become the macros NIBBLECAST_NAN and NIBBLECAST_INF.
    """
    decimals, unsure = _shortest(values)
    characters = _of_all_kinds(decimals).view(np.uint8).reshape(values.size, WIDTH)
    characters[:, _TEXT] = COMMA
    _put_names(characters, values)
    rows = np.flatnonzero(unsure)
    if rows.size:
        distinct, which = np.unique(values[rows].view(np.uint64), return_inverse=True)
        text = "".join(f"{value!r:>{_TEXT}}," for value in distinct.view(np.float64).tolist())
        characters[rows] = np.frombuffer(text.encode(), np.uint8).reshape(-1, WIDTH)[which]
    return characters


def _of_all_kinds(decimals: _Decimals) -> NDArray[Any]:
    exponent = decimals.exponent
    fixed, wide = (exponent >= -4) & (exponent < 16), np.abs(exponent) >= 100
    out = np.empty(exponent.size, f"V{WIDTH}")
    for chosen, text_of in (
        (fixed & (exponent < 0), _fractions),
        (fixed & (exponent >= 0), _fixed_point),
        (~fixed & ~wide, _scientific),
        (wide, _scientific),
    ):
        rows = np.flatnonzero(chosen)
        if rows.size == exponent.size:
            return text_of(decimals)
        if rows.size:
            out[rows] = text_of(decimals.of(rows))
    return out


def _put_names(characters: NDArray[np.uint8], values: NDArray[np.float64]) -> None:
    if np.isfinite(values).all():
        return
    for rows, name in (
        (np.isnan(values), NAN),
        (values == np.inf, INFINITY),
        (values == -np.inf, b"-" + INFINITY),
    ):
        characters[rows] = np.frombuffer(name.rjust(_TEXT) + b",", np.uint8)


def _shortest(values: NDArray[np.float64]) -> tuple[_Decimals, NDArray[np.bool_]]:
    """The decimals, and for which of them repr must be asked. What is not finite counts as 0."""
    bits = np.abs(values).view(np.uint64)
    binary = (bits >> np.uint64(_MANTISSA_BITS)).astype(np.int64)
    mantissa = bits & _MANTISSA
    powers = _powers()
    row = 2 * binary + (bits >= np.take(powers.next_decade, binary))
    m = (mantissa | _ONE).view(np.float64)
    m_high = ((mantissa | _ONE) & _UPPER_HALF).view(np.float64)
    m_low = m - m_high
    high, middle, low = (np.take(part, row) for part in (powers.high, powers.middle, powers.low))
    rest = (m_high * middle + m_low * high) + (m_low * middle + m * low)
    nearest = np.rint(rest)
    fraction = rest - nearest
    number = (m_high * high).astype(np.int64) + nearest.astype(np.int64)  # the first product is a whole number
    hundreds = number // 100 * 100

    last_two = number - hundreds
    exact = last_two + fraction
    of_16, of_15 = np.rint(exact * 0.1) * 10, np.rint(exact * 0.01) * 100
    off_16, off_15 = np.abs(exact - of_16), np.abs(exact - of_15)
    half_gap = high * 2.0 ** -(_MANTISSA_BITS + 1)
    chosen = np.where(off_15 < half_gap, of_15, np.where(off_16 < half_gap, of_16, np.rint(exact)))
    unsure = (np.abs(off_15 - half_gap) < _MARGIN) | (np.abs(off_16 - half_gap) < _MARGIN)
    unsure |= (off_16 > 5 - _MARGIN) & (half_gap > 5 - _MARGIN)  # halfway between two decimals
    unsure |= np.abs(fraction) > 0.5 - _MARGIN
    unsure |= (mantissa == 0) & (off_15 > half_gap / 2 - _MARGIN)  # the gap below a power of two is half as wide
    unsure &= (binary > 0) & (binary < _NOT_FINITE)
    unsure |= (binary == 0) & (bits > 0)

    digits = (hundreds + chosen.astype(np.int64)).view(np.uint64)
    rounded_up = digits == 10**_DIGITS  # of 9.99999
    digits[rounded_up] //= np.uint64(10)
    return _Decimals(digits, np.take(powers.exponent, row) + rounded_up, np.signbit(values)), unsure


@dataclass(frozen=True, slots=True)
class _Powers:
    """By a float64's exponent bits, the bits of the least power of ten above its power of two. By twice the exponent
    bits, and 1 more for a float64 from there on: its decimal exponent, and P in three parts."""

    next_decade: NDArray[np.uint64]
    exponent: NDArray[np.int64]
    high: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]


@cache
def _powers() -> _Powers:
    """The tables; zeros for 0 and for what is not finite."""
    next_decade, rows = [math.inf], [(0, 0.0, 0.0, 0.0)] * 2
    for binary in range(1 - _BIAS, _NOT_FINITE - _BIAS):
        least = math.floor(binary * math.log10(2))
        next_decade.append(float(f"1e{least + 1}"))
        rows += [(exponent, *_power(binary, exponent)) for exponent in (least, least + 1)]
    next_decade.append(math.inf)
    rows += rows[:2]
    exponent, high, middle, low = zip(*rows, strict=True)
    return _Powers(np.array(next_decade).view(np.uint64), *map(np.array, (exponent, high, middle, low)))


def _power(binary: int, exponent: int) -> tuple[float, float, float]:
    """2^binary * 10^(16 - exponent) in parts of 26, 26 and 53 bits."""
    scale = _DIGITS - 1 - exponent
    bits = 50  # after the point
    above = 10 ** max(scale, 0) << max(binary + bits, 0)
    power = above // (10 ** max(-scale, 0) << max(-binary - bits, 0))
    parts = []
    for _ in range(2):
        below = max(power.bit_length() - 26, 0)
        parts.append(math.ldexp(power >> below, below - bits))
        power &= (1 << below) - 1
    return parts[0], parts[1], math.ldexp(power, -bits)


def _fractions(decimals: _Decimals) -> NDArray[Any]:
    """`-0.0123`: exponents from -4 to -1."""
    text = blank_records(decimals.digits.size, _FRACTION)
    text["start"] = np.take(_starts(), -1 - decimals.exponent + 4 * decimals.negative)
    return windows(text, _put_digits(text, decimals.digits), WIDTH)


@cache
def _starts() -> NDArray[np.uint64]:
    """What comes before the first digit that counts."""
    starts = [f"{sign}0.{'0' * zeros}" for sign in ("", "-") for zeros in range(4)]
    return np.array([start.rjust(8).encode() for start in starts]).view(np.uint64)


def _fixed_point(decimals: _Decimals) -> NDArray[Any]:
    """`-12.0`: exponents from 0 to 15."""
    exponent = decimals.exponent
    powers = 10 ** np.arange(_DIGITS, dtype=np.uint64)
    unit = np.take(powers, _DIGITS - 1 - exponent)
    whole = decimals.digits // unit
    fraction = (decimals.digits - whole * unit) * np.take(powers, exponent)
    text = blank_records(whole.size, _FIXED_POINT)
    text["whole"] = right_aligned(whole, decimals.negative, _DIGITS, _DIGITS).view(f"V{_DIGITS}").reshape(-1)
    text["point"] = POINT
    parts = groups(fraction, 3)
    put_groups(text, parts)
    return windows(text, np.maximum(_DIGITS - 2 - zeros_at_end(parts), 0), WIDTH)


def _scientific(decimals: _Decimals) -> NDArray[Any]:
    """`-1.2e-05`: other exponents, all of them of two digits, or all of three."""
    exponents = _exponents(4 if abs(int(decimals.exponent[0])) < 100 else 5)
    text = blank_records(decimals.digits.size, _SCIENTIFIC)
    text["sign"] = signs(decimals.negative)
    text["point"] = POINT
    count = _put_digits(text, decimals.digits)
    end = np.where(count > 1, 25 + count, 25)
    place = _TEXT - exponents.itemsize
    out = windows(text, end - place, WIDTH)
    ends = out.view(record_type({"exponent": (place, exponents.dtype.str)}, WIDTH))
    ends["exponent"] = np.take(exponents, decimals.exponent + _MOST_EXPONENT)
    return out


@cache
def _exponents(width: int) -> NDArray[Any]:
    """The text of every exponent; of use where it has this width."""
    exponents = range(-_MOST_EXPONENT, _MOST_EXPONENT + 1)
    return np.array([f"e{exponent:+03}".encode().ljust(width)[:width] for exponent in exponents]).view(f"V{width}")


def _put_digits(text: NDArray[Any], digits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Puts the digits into records; how many there are without zeros at the end, but at least one."""
    first, *others = groups(digits, 4)
    text["first"] = first + np.uint64(ZERO)
    put_groups(text, others)
    return _DIGITS - zeros_at_end(others)
