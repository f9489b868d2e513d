"""Bytes in another order than the canonical one: read through a function of rows, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.packing import bits_of, packed_size
from converters.storage import Computed, Data


def by_rows(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows: Callable[[int, int], NDArray[Any]],
    *sources: Data,
    step: int = 1,
) -> Data:
    """The canonical bytes of a tensor of that shape and dtype, of which `rows(first, last)` gives rows [first, last) of
    the first axis: any array whose bytes are theirs. Rows must be whole bytes, or else come `step` at a time (at the
    end, fewer)."""
    count, nbytes = shape[0], packed_size(prod(shape), bits_of(dtype))
    row_bits = prod(shape[1:]) * bits_of(dtype)

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        if stop <= start or not row_bits:
            return np.zeros(0, np.uint8)
        first = start * 8 // row_bits // step * step
        last = min(count, -(-min(stop, nbytes) * 8 // (row_bits * step)) * step)
        taken = np.ascontiguousarray(rows(first, last)).reshape(-1).view(np.uint8)
        skipped = first * row_bits // 8
        return taken[start - skipped : stop - skipped]

    return Computed(nbytes, read, sources)
