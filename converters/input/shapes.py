"""Checks shapes from files before anything multiplies their sizes.

NumPy checks a shape when it creates an array. That is too late: sizes are multiplied and shown in messages before, and
Python's integers are unbounded. The product of 40 000 sizes takes seconds, and an integer of more than 4300 digits
cannot be converted to text at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from nibblecast.converters.errors import CorruptFile, Unsupported, brief

#: The limit of every NumPy version (2.0 raised it from 32 to 64).
MOST_DIMENSIONS = 32
#: Sizes of 0 count as 1, because NumPy's own limit ignores them too.
MOST_ELEMENTS = 1 << 58


def checked_shape(sizes: Sequence[int], *, tensor: str | None = None) -> tuple[int, ...]:
    """The sizes as a shape: at most 32 sizes, none negative, and at most 2**58 elements. Raises Unsupported for more
    dimensions, CorruptFile otherwise."""
    if len(sizes) > MOST_DIMENSIONS:
        message = f"has {len(sizes)} dimensions; {MOST_DIMENSIONS} are the most that can be read"
        raise Unsupported(message, tensor=tensor)
    elements = 1
    for size in sizes:
        if size < 0:
            raise CorruptFile(f"shape {brief(tuple(sizes))} has a negative size", tensor=tensor)
        elements *= min(max(size, 1), MOST_ELEMENTS + 1)
        if elements > MOST_ELEMENTS:
            raise CorruptFile(f"shape {brief(tuple(sizes))} is larger than any memory", tensor=tensor)
    return tuple(sizes)
