"""Bytes in another order than the canonical one: read through a function of rows, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.arithmetic.packing import pack, packed_size
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Computed, Data, InMemory

_STRIP_ROWS, _SPARE_BYTES = 128, 16

#: Gives rows [first, last) of a tensor, all its axes but the last taken as one: shape (last - first, columns), elements
#: of dtypes narrower than a byte one in each.
Rows = Callable[[int, int], NDArray[Any]]


def by_rows(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows: Callable[[int, int], NDArray[Any]],
    *sources: Data,
    step: int = 1,
    in_order: bool = True,
) -> Data:
    """The canonical bytes of a tensor of that shape and dtype, of which `rows(first, last)` gives rows [first, last) of
    the first axis: any array whose bytes are theirs. Rows must be whole bytes, or else come `step` at a time (at the
    end, fewer). `in_order`: whether they lie in the sources one after the other (`converters.storage.Computed`)."""
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

    return Computed(nbytes, read, sources, in_order)


def made_by_rows(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rows: Rows, *sources: Data, in_order: bool = True
) -> Tensor:
    """A tensor whose rows are made when they are read, from `sources`, in which they lie `in_order` or not."""
    count, bits = prod(shape), bits_of(dtype)
    if not count:
        return Tensor(name, shape, dtype, InMemory(np.zeros(0, np.uint8)))
    columns = shape[-1] if shape else 1

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        begin, end = start * 8 // bits, min(count, stop * 8 // bits)
        first, last = begin // columns, -(-end // columns)
        elements = rows(first, last).reshape(-1)[begin - first * columns : end - first * columns]
        return pack(elements, bits) if dtype in SUB_BYTE else np.ascontiguousarray(elements).view(np.uint8)

    return Tensor(name, shape, dtype, Computed(packed_size(count, bits), compute, sources, in_order))


def turned(matrix: NDArray[Any]) -> NDArray[Any]:
    """The transposed of a matrix, in memory of its own. The rows of mapped weights lie powers of two apart, for which a
    cache has few places; so strips of them are copied to rows that do not."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    strip = np.empty((_STRIP_ROWS, (columns | 1) + _SPARE_BYTES // matrix.itemsize), matrix.dtype)
    for row in range(0, rows, _STRIP_ROWS):
        taken = matrix[row : row + _STRIP_ROWS]
        held = strip[: taken.shape[0], :columns]
        held[...] = taken
        out[:, row : row + _STRIP_ROWS] = held.T
    return out


def transposed(role: str, stored: Tensor, grid: tuple[int, ...], plane: int | None = None) -> Tensor:
    """Parameters of shape `grid`, (..., rows, groups), of those stored as (..., groups, rows), or as `plane` of the
    last axis of (..., groups, rows, 2). There may be more stored groups and rows, which fill up."""
    height, columns = grid[-2:]

    def rows(first: int, last: int) -> NDArray[Any]:
        array = stored.numpy() if plane is None else stored.numpy()[..., plane]
        array = array.reshape(-1, *array.shape[-2:])
        start, stop = first // height, -(-last // height)
        top = start * height
        if stop - start == 1:  # the most common one: no other rows are read
            return turned(array[start, :columns, first - top : last - top])
        several = array[start:stop, :columns, :height].swapaxes(1, 2).reshape(-1, columns)
        return several[first - top : last - top]

    return made_by_rows(role, grid, stored.dtype, rows, stored.data, in_order=False)


def columns_in_words(
    name: str, words: Tensor, columns: int, dtype: np.dtype[Any], *, fields: Sequence[int] = (), added: int = 0
) -> Tensor:
    """Unsigned codes of shape (columns, rows), of words of 32 bits of shape (rows, p), each of which has a row's codes
    of neighbouring columns: that of column j in field `fields[j]`, or in field j. `added` is added to each word first,
    modulo 2 ** 32."""
    bits, height = bits_of(dtype), words.shape[0]
    per_word = 32 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    order = list(fields or range(per_word))

    def rows(first: int, last: int) -> NDArray[Any]:
        start, stop = first // per_word, -(-last // per_word)
        taken = words.numpy()[:, start:stop].view(np.uint32)
        octets = turned((taken + np.uint32(added) if added else taken).view(np.uint8))
        codes = (octets[:, None, :] >> shifts) & np.uint8((1 << bits) - 1)
        found = codes.reshape(stop - start, per_word, height)[:, order].reshape(-1, height)
        return found[first - start * per_word : last - start * per_word]

    return made_by_rows(name, (columns, height), dtype, rows, words.data, in_order=False)


def swapped_nibbles(data: Data, count: int) -> Data:
    """The canonical bytes of `count` elements of 4 bits of which the first is in the high nibble."""

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        stored = data.read(start, stop)
        swapped: NDArray[np.uint8] = (stored >> np.uint8(4)) | (stored << np.uint8(4))
        if count % 2 and swapped.size and stop * 2 > count:  # what is in the last nibble is no element
            swapped[-1] &= np.uint8(0x0F)
        return swapped

    return Computed(packed_size(count, 4), read, (data,))


def paired_rows(name: str, stored: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Elements of 4 bits, shape (..., 2 * rows, columns), in the bytes of `stored`, (..., rows, columns): row 2r in the
    low nibbles of row r, row 2r + 1 in the high ones."""
    columns = stored.shape[-1]

    def rows(first: int, last: int) -> NDArray[Any]:
        start, stop = first // 2, -(-last // 2)
        pairs = stored.data.read(start * columns, stop * columns).reshape(stop - start, 1, columns)
        found = np.concatenate((pairs & np.uint8(15), pairs >> np.uint8(4)), axis=1).reshape(-1, columns)
        return found[first - start * 2 : last - start * 2]

    return made_by_rows(name, (*stored.shape[:-2], stored.shape[-2] * 2, columns), dtype, rows, stored.data)


def fields(words: Tensor, rows: int, bits: int, dtype: np.dtype[Any], *, highest_first: bool) -> Data:
    """The canonical bytes of codes of `bits` bits that lie in the fields of unsigned `words`, shape (p, columns): the
    first p rows of the codes in the first field, the next p in the next one, up to `rows`."""
    packed_rows, columns = words.shape[0], prod(words.shape[1:])
    per_word = words.dtype.itemsize * 8 // bits
    positions = np.arange(per_word) * bits
    shifts = (positions[::-1] if highest_first else positions).astype(words.dtype)
    mask = words.dtype.type((1 << bits) - 1)

    def codes(first: int, last: int) -> NDArray[Any]:
        row = np.arange(first, last)
        stored = words.numpy().reshape(packed_rows, columns)[row % packed_rows]
        found = (stored >> shifts[row // packed_rows][:, None]) & mask
        return pack(found, bits_of(dtype)) if bits_of(dtype) < 8 else found.astype(dtype)

    step = 8 // gcd(8, columns * bits_of(dtype)) if columns else 1
    return by_rows((rows, columns), dtype, codes, words.data, step=step, in_order=False)
