"""Decimal text of many numbers at once: four digits by a table look-up, none looked at alone.

Digits are written with all their zeros into records of one length. Zeros at the end go when a literal is a window of
its record that ends before them; zeros at the front when what makes them blanks is subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: The members of a record by name: the first character and the type.
Layout: TypeAlias = Mapping[str, tuple[int, str]]

#: How many numbers to turn into text at once, so that what this takes stays in the processor's cache.
AT_ONCE = 1 << 15

BLANK, MINUS, ZERO, POINT, COMMA = (np.uint8(ord(character)) for character in " -0.,")


def record_type(layout: Layout, length: int) -> np.dtype[Any]:
    """Records of `length` characters: five times as fast to fill as a two-dimensional array."""
    places, types = zip(*layout.values(), strict=True)
    members: Any = {"names": list(layout), "formats": list(types), "offsets": list(places), "itemsize": length}
    record: np.dtype[Any] = np.dtype(members)
    return record


def blank_records(count: int, record: np.dtype[Any]) -> NDArray[Any]:
    """Records of blanks."""
    return np.full(count * record.itemsize, BLANK).view(record)


def windows(records: NDArray[Any], starts: NDArray[np.int64], width: int) -> NDArray[Any]:
    """`width` characters of each record from its start on, each an opaque item."""
    characters = records.view(np.uint8)
    at_every_place = np.ndarray(characters.size - width + 1, f"V{width}", characters, 0, (1,))
    chosen: NDArray[Any] = at_every_place[np.arange(0, characters.size, records.dtype.itemsize) + starts]
    return chosen


def signs(negative: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A minus sign or a blank each."""
    return BLANK + negative.view(np.uint8) * (MINUS - BLANK)


def group_layout(start: int, count: int) -> Layout:
    """The members of records that hold `count` groups of four digits, from character `start` on."""
    return {str(group): (start + 4 * group, "u4") for group in range(count)}


def groups(numbers: NDArray[Any], count: int) -> list[NDArray[Any]]:
    """What comes before the last `count` groups of four digits, and these groups."""
    found = []
    base = numbers.dtype.type(10000)
    for _ in range(count):
        rest = numbers // base
        found.append(numbers - rest * base)
        numbers = rest
    return [numbers, *reversed(found)]


def put_groups(records: NDArray[Any], groups: Sequence[NDArray[Any]]) -> None:
    """Writes groups of four digits to their places."""
    for place, values in enumerate(groups):
        records[str(place)] = np.take(_four_digits(), values)


def zeros_at_end(groups: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """How many digits at the end of each number are zeros, of those that these groups hold."""
    zeros = np.take(_zeros_of_four(), groups[-1])
    so_far = np.flatnonzero(groups[-1] == 0)
    for group in reversed(groups[:-1]):
        if not so_far.size:
            break
        zeros[so_far] += np.take(_zeros_of_four(), group[so_far])
        so_far = so_far[group[so_far] == 0]
    return zeros


def right_aligned(numbers: NDArray[Any], negative: NDArray[np.bool_], width: int, length: int) -> NDArray[np.uint8]:
    """Unsigned integers as decimals, with a minus sign where they are `negative`, that end after `width` of `length`
    characters: shape (n, length)."""
    count, leading = divmod(width, 4)
    text = np.empty(numbers.size, _integer(width, length))
    first, *others = groups(numbers, count)
    if leading:  # the zeros that follow are written over
        text["leading"] = np.take(_four_digits(), first * first.dtype.type(10 ** (4 - leading)))
    put_groups(text, others)
    characters = text.view(np.uint8).reshape(numbers.size, length)
    characters[:, width:] = BLANK
    digits = np.ones(numbers.size, np.uint8)
    for power in range(1, min(width, len(str(np.iinfo(numbers.dtype).max)))):
        digits += numbers >= numbers.dtype.type(10**power)
    rows = digits + negative.view(np.uint8) * np.uint8(width + 1)
    characters -= np.take(_zeros_at_front(width, length), rows).view(np.uint8).reshape(characters.shape)
    return characters


@cache
def _integer(width: int, length: int) -> np.dtype[Any]:
    count, leading = divmod(width, 4)
    return record_type({"leading": (0, "u4"), **group_layout(leading, count)}, length)


@cache
def _four_digits() -> NDArray[np.uint32]:
    """The text of 0 to 9999, with all zeros."""
    text = np.arange(10000)[:, None] // (1000, 100, 10, 1) % 10 + ZERO
    return text.astype(np.uint8).view(np.uint32).reshape(-1)


@cache
def _zeros_of_four() -> NDArray[np.int64]:
    """How many of the four digits of 0 to 9999 are zeros at the end."""
    zeros: NDArray[np.int64] = np.zeros(10000, np.int64)
    for power in (10, 100, 1000, 10000):
        zeros[::power] += 1
    return zeros


@cache
def _zeros_at_front(width: int, length: int) -> NDArray[Any]:
    """What to subtract from `width` digits so that zeros at the front become blanks, by how many digits are to stay;
    after these rows the same with a minus sign in place of the last blank."""
    column = np.arange(length)
    start = width - np.arange(width + 1)[:, None]
    blanks = np.where(column < start, ZERO - BLANK, 0)
    minus = np.where(column == start - 1, ZERO - MINUS, blanks)
    return np.concatenate([blanks, minus]).astype(np.uint8).view(f"V{length}").reshape(-1)
