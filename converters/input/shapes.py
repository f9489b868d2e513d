"""Shapes out of files, checked before anything multiplies their sizes.

NumPy checks a shape when it makes an array, which is too late: sizes are multiplied and shown in messages long before,
and Python's integers have no end. The product of 40 000 sizes takes seconds, and one of more than 4300 digits cannot be
made text at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from nibblecast.converters.errors import CorruptFile, Unsupported, brief

#: What every NumPy can hold (2.0 went from 32 to 64).
MOST_DIMENSIONS = 32
#: Sizes of 0 not counted, which NumPy does not count either.
MOST_ELEMENTS = 1 << 58


def checked_shape(sizes: Sequence[int], *, tensor: str | None = None) -> tuple[int, ...]:
    """The sizes as a shape: at most 32, none negative, and no more than 2**58 elements. Raises Unsupported for more
    dimensions, CorruptFile for the others."""
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
