"""float16 as NumPy's cast rounds to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.arithmetic.float16 import Float16


def check(bits: np.ndarray) -> None:
    values = bits.astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wanted = values.astype(np.float16)
        got, rounded = np.empty_like(wanted), values.copy()
        rounding = Float16()
        rounding.cast(values, got)
        rounding.round(rounded)
    np.testing.assert_array_equal(got.view(np.uint16), wanted.view(np.uint16))
    is_number = ~np.isnan(values)
    np.testing.assert_array_equal(
        rounded[is_number].view(np.uint32), wanted[is_number].astype(np.float32).view(np.uint32)
    )
    assert np.isnan(rounded[~is_number]).all()


#: From a float16 number, in float32's last places: itself, around half of its last place, around the whole.
@pytest.mark.parametrize("beside", [0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, -0x0FFF, -0x1000, -0x1001, 0x0800])
def test_beside_every_float16_number(beside: int) -> None:
    with np.errstate(invalid="ignore"):
        numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    # apart, because a piece that has one beyond the largest is done in another way
    for piece in np.array_split(numbers.astype(np.int64) + beside, 32):
        check(piece & 0xFFFFFFFF)


@pytest.mark.parametrize("fraction", range(1, 32, 5))
def test_halves_of_subnormal_numbers(fraction: int) -> None:
    """In units of 2 ** -29, of which 32 are the last place of a subnormal number."""
    values = (np.arange(1 << 10) * 32 + fraction).astype(np.float32) * np.float32(2.0**-29)
    around = values.view(np.uint32)[:, None].astype(np.int64) + np.arange(-2, 3)
    check(around.reshape(-1))


@settings(max_examples=50)
@given(st.integers(0, (1 << 32) - 1), st.integers(1, 1 << 20), st.integers(0, 100_000))
def test_strides_through_all_float32_numbers(first: int, step: int, count: int) -> None:
    check((first + np.arange(count, dtype=np.int64) * step) & 0xFFFFFFFF)
