"""Codes of 1 to 8 bits in the fields of words, lowest bits first: taken apart and put in row by row when it is read.

Rows are the words of the last axis. In a dense row the fields follow each other across words; else each word has as
many as fit into it, and its highest bits are unused. Both are the same for 1, 2, 4 and 8 bits.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import INT32, bits_of, integer_range
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Computed, Data
from nibblecast.formats.encodings.bytes.rows import by_rows, made_by_rows, turned
from nibblecast.formats.encodings.bytes.widths import dtype_for
from nibblecast.formats.encodings.values.refit import computed

_WORD_BITS = 32


def words_for(count: int, bits: int, *, dense: bool) -> int:
    """How many words `count` fields take."""
    return -(-count * bits // _WORD_BITS) if dense else -(-count // (_WORD_BITS // bits))


def code_dtype(bits: int, *, signed: bool) -> np.dtype[Any]:
    """The narrowest dtype of codes of so many bits."""
    return dtype_for(*integer_range(bits, signed))


def along_rows(
    name: str, stored: Tensor, columns: int, bits: int, *, signed: bool = False, dense: bool = True
) -> Tensor:
    """The codes in `stored`, words of 32 bits of shape (..., words), as (..., columns). Signed ones are stored with
    2 ** (bits - 1) added. There must be `words_for(columns, bits)` words or more."""
    dtype, shape = code_dtype(bits, signed=signed), (*stored.shape[:-1], columns)
    row_bytes = stored.shape[-1] * 4

    def packed(first: int, last: int) -> NDArray[np.uint8]:
        return stored.data.read(first * row_bytes, last * row_bytes).reshape(last - first, row_bytes)

    if bits == bits_of(dtype) and columns * bits % 8 == 0:
        return Tensor(name, shape, dtype, _whole_bytes(stored, shape, dtype, signed))

    def rows(first: int, last: int) -> NDArray[Any]:
        return _fields(packed(first, last), bits, columns, signed=signed, dense=dense)

    return made_by_rows(name, shape, dtype, rows, stored.data)


def across_rows(name: str, stored: Tensor, shape: tuple[int, ...], bits: int, *, dense: bool = True) -> Tensor:
    """Signed codes of `shape`, (..., rows, columns), in `stored`, words of shape (..., words, columns): each column has
    the fields of its rows in its words."""
    height = shape[-2]
    step, step_words = (_WORD_BITS, bits) if dense else (_WORD_BITS // bits, 1)

    def rows(first: int, last: int) -> NDArray[Any]:
        planes = stored.numpy().reshape(-1, *stored.shape[-2:])
        found = []
        for plane in range(first // height, -(-last // height)):
            start, stop = max(0, first - plane * height), min(height, last - plane * height)
            top, bottom = start // step, -(-stop // step)
            words = turned(planes[plane, top * step_words : bottom * step_words])
            codes = _fields(words.view(np.uint8), bits, stop - top * step, signed=True, dense=dense)
            found.append(codes[:, start - top * step :].T)
        return np.concatenate(found)

    return made_by_rows(name, shape, code_dtype(bits, signed=True), rows, stored.data)


def in_words(name: str, codes: Tensor) -> Tensor:
    """Unsigned codes of 2, 4 or 8 bits, shape (rows, columns), in words of their rows: int32 of shape (rows, words).
    What is left of a row's last word is zero."""
    rows, columns = codes.shape
    words, plain = words_for(columns, codes.bits, dense=True), replace(codes, quantization=None)
    shape = (rows, words)
    if columns * codes.bits == words * _WORD_BITS:
        return Tensor(name, shape, INT32, codes.data)

    def packed(first: int, last: int) -> NDArray[Any]:
        part = plain if last - first == rows else plain.rows(first, last)
        fields = np.zeros((last - first, words * _WORD_BITS // codes.bits), np.uint8)
        fields[:, :columns] = part.codes()
        return pack(fields, codes.bits) if codes.bits < 8 else fields

    return Tensor(name, shape, INT32, by_rows(shape, INT32, packed, codes.data, step=plain.row_step))


def in_words_across(name: str, parameter: Tensor, bits: int) -> Tensor:
    """Unsigned integers below 2 ** bits, shape (rows, columns), in words across their rows: int32 of shape (words,
    columns), made whole."""
    rows, columns = parameter.shape
    words = words_for(rows, bits, dense=True)

    def packed() -> NDArray[np.int32]:
        fields = np.zeros((columns, words * _WORD_BITS // bits), np.uint8)
        fields[:, :rows] = parameter.codes().T
        whole = pack(fields, bits) if bits < 8 else fields
        return whole.view("<i4").reshape(columns, words).T

    return computed(name, (words, columns), INT32, packed, parameter.data)


def _whole_bytes(stored: Tensor, shape: tuple[int, ...], dtype: np.dtype[Any], signed: bool) -> Data:
    """The canonical bytes where rows of codes are whole bytes of the stored rows: these bytes, or their beginnings."""
    bits, row_bytes = bits_of(dtype), stored.shape[-1] * 4
    used = shape[-1] * bits // 8
    data: Data = stored.data
    if used < row_bytes:

        def rows(first: int, last: int) -> NDArray[Any]:
            return stored.data.read(first * row_bytes, last * row_bytes).reshape(last - first, row_bytes)[:, :used]

        data = by_rows((prod(shape[:-1]), shape[-1]), dtype, rows, stored.data)
    if not signed:
        return data
    signs = np.uint8(sum(1 << bit for bit in range(bits - 1, 8, bits)))

    def with_signs(start: int, stop: int) -> NDArray[np.uint8]:
        flipped: NDArray[np.uint8] = data.read(start, stop) ^ signs
        return flipped

    return Computed(data.nbytes, with_signs, (data,))


def _fields(packed: NDArray[np.uint8], bits: int, columns: int, *, signed: bool, dense: bool) -> NDArray[Any]:
    """The first `columns` fields of each row of bytes, one in an element."""
    fields = dense_fields(packed, bits) if dense else _fields_of_words(packed, bits)
    codes: NDArray[Any] = fields.reshape(packed.shape[0], -1)[:, :columns]
    return (codes - np.uint8(1 << bits - 1)).view(np.int8) if signed else codes


def dense_fields(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The fields that follow each other across bytes, shape (rows, n, 8): eight of them are as many bytes as one has
    bits. Rows that end before are filled up with zeros."""
    groups = np.pad(packed, ((0, 0), (0, -packed.shape[1] % bits))).reshape(packed.shape[0], -1, bits)
    fields = np.empty((*groups.shape[:2], 8), np.uint8)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        field = groups[:, :, byte] >> np.uint8(shift)
        if shift + bits > 8:
            field |= groups[:, :, byte + 1] << np.uint8(8 - shift)
        fields[:, :, position] = field & np.uint8((1 << bits) - 1)
    return fields


def _fields_of_words(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    words = np.ascontiguousarray(packed).view("<u4")
    shifts = np.arange(_WORD_BITS // bits, dtype=np.uint32) * np.uint32(bits)
    fields: NDArray[np.uint8] = ((words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return fields
