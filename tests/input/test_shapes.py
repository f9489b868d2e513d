"""Shapes out of files: refused before anything multiplies their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.input.shapes import MOST_DIMENSIONS, MOST_ELEMENTS, checked_shape


@pytest.mark.parametrize(
    "sizes", [[], [0], [1] * MOST_DIMENSIONS, [MOST_ELEMENTS], [0, MOST_ELEMENTS], [1 << 29, 1 << 29], [3, 0, 4]]
)
def test_shapes_that_can_be(sizes: Sequence[int]) -> None:
    assert checked_shape(sizes) == tuple(sizes)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ([1] * 33, Unsupported, "has 33 dimensions; 32 are the most"),
        ([1 << 62] * 100_000, Unsupported, "has 100000 dimensions"),
        ([2, -1], CorruptFile, r"shape \(2, -1\) has a negative size"),
        ([-(10**400)], CorruptFile, r"shape \(an integer of 1329 bits,\) has a negative size"),
        ([MOST_ELEMENTS + 1], CorruptFile, "larger than any memory"),
        ([1 << 30, 1 << 29], CorruptFile, "larger than any memory"),
        ([0, 1 << 30, 1 << 29], CorruptFile, "larger than any memory"),
        ([10**310], CorruptFile, "larger than any memory"),
        ([10**5000] * 32, CorruptFile, "larger than any memory"),
    ],
)
def test_shapes_that_cannot_be_are_one_line(sizes: Sequence[int], kind: type[Error], message: str) -> None:
    with pytest.raises(kind, match=message) as seen:
        checked_shape(sizes, tensor="w")
    assert seen.value.tensor == "w"
    assert len(str(seen.value)) < 400
