"""Codes in another order: matrices transposed, and the blobs of com.microsoft's MatMulNBits and GatherBlockQuantized.

Codes are moved, never decoded. Everything is read from the source in pieces when the bytes are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters.ir import GroupIndex, Quantization, Tensor, grid_shape
from converters.packing import SUB_BYTE, bits_of, pack, unpack
from converters.storage import Computed, InMemory

_TILE = 256
_PIECE_BYTES = 1 << 20
_UNSIGNED = {2: np.dtype(ml_dtypes.uint2), 4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}
#: The sign bit of every code in a byte: flipping it makes two's complement offset binary.
_SIGN_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}
_INT8 = np.dtype(np.int8)


def transposed(tensor: Tensor) -> Tensor:
    """A matrix of shape (rows, columns) as (columns, rows), its parameters likewise. Codes have 2, 4 or 8 bits."""
    rows, columns = tensor.shape
    source = _Columns(tensor)
    row_nbytes = rows * tensor.bits / 8

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        if rows * tensor.bits % 8:  # rows of the result share bytes
            return source.packed(0, columns)[start:stop]
        first, last = int(start // row_nbytes), int(-(-stop // row_nbytes))
        packed = source.packed(first, last)
        offset = int(first * row_nbytes)
        return packed[start - offset : stop - offset]

    quantization = tensor.quantization and _transposed_parameters(tensor.quantization)
    data = Computed(tensor.nbytes, compute)
    return replace(tensor, shape=(columns, rows), data=data, quantization=quantization, uses=())


def _transposed_parameters(q: Quantization) -> Quantization:
    def swap(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        return Tensor.from_array(parameter.name, np.ascontiguousarray(parameter.numpy().T))

    group = q.group_index
    return Quantization(
        Tensor.from_array(q.scale.name, np.ascontiguousarray(q.scale.numpy().T)),
        q.block_shape[::-1],
        swap(q.zero_point),
        swap(q.offset),
        q.codebook,
        None if group is None else GroupIndex(1 - group.axis, group.index),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of a matrix of codes, each as a row."""

    tensor: Tensor

    def packed(self, first: int, last: int) -> NDArray[np.uint8]:
        """The canonical bytes of columns [first, last) as rows."""
        rows, columns = self.tensor.shape
        bits = self.tensor.bits
        per_byte = 8 // bits
        begin, end = first // per_byte, -(-last // per_byte)
        if columns % per_byte or rows % per_byte:  # rows that begin within a byte
            codes = self.tensor.codes()[:, first:last].T
            return pack(codes, bits) if bits < 8 else np.ascontiguousarray(codes).view(np.uint8).reshape(-1)
        packed = self._bytes(begin, end)
        out = np.empty(((end - begin) * per_byte, rows // per_byte), np.uint8)
        merge = {8: _transpose_8, 4: _transpose_4, 2: _transpose_2}[bits]
        for column in range(0, end - begin, _TILE):
            for row in range(0, rows, _TILE * per_byte):
                tile = packed[row : row + _TILE * per_byte, column : column + _TILE]
                target = out[column * per_byte : (column + _TILE) * per_byte, row // per_byte : row // per_byte + _TILE]
                merge(tile, target)
        skipped = (first - begin * per_byte) * rows // per_byte
        return out.reshape(-1)[skipped : skipped + (last - first) * rows // per_byte]

    def _bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of every row, shape (rows, end - begin)."""
        rows = self.tensor.shape[0]
        row_nbytes = self.tensor.nbytes // rows
        out = np.empty((rows, end - begin), np.uint8)
        step = max(1, (_PIECE_BYTES * 8) // row_nbytes)
        for row in range(0, rows, step):
            last = min(row + step, rows)
            piece = self.tensor.data.read(row * row_nbytes, last * row_nbytes).reshape(last - row, row_nbytes)
            out[row:last] = piece[:, begin:end]
        return out


def _transpose_8(tile: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    out[...] = tile.T


def _transpose_4(tile: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    even, odd = tile[0::2], tile[1::2]
    out[0::2] = ((even & 0x0F) | (odd << 4)).T
    out[1::2] = ((even >> 4) | (odd & 0xF0)).T


def _transpose_2(tile: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    for place in range(4):
        merged = np.zeros((tile.shape[0] // 4, tile.shape[1]), np.uint8)
        for row in range(4):
            merged |= ((tile[row::4] >> (2 * place)) & 3) << (2 * row)
        out[place::4] = merged.T


@dataclass(frozen=True, slots=True, eq=False)
class Blobs:
    """A weight as MatMulNBits (ORT's contrib operators, com.microsoft 1) takes it, whose logical shape is
    (rows, columns): `codes` uint8 (rows, blocks, block_size * bits / 8), unsigned, the last block of a row filled up
    with zeros; `scales` (rows, blocks); `zero_points` uint8 (rows, ceil(blocks * bits / 8)), each row filled up to whole
    bytes, or None where all are 2 ** (bits - 1)."""

    weight: Tensor
    block_size: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.weight.bits

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.weight.shape[1] // self.block_size)

    def codes(self, weight: Tensor) -> Tensor:
        """The blobs of `weight`, which is this one, perhaps with its payload in memory."""
        rows, columns = weight.shape
        blob = self.block_size * self.bits // 8
        shape = (rows, self.blocks, blob)
        flip = np.uint8(_SIGN_BITS[self.bits] if _is_signed(weight.dtype) else 0)
        row_nbytes, stored_nbytes = self.blocks * blob, columns * self.bits // 8
        whole = row_nbytes == stored_nbytes and columns * self.bits % 8 == 0
        if whole and not flip:
            return Tensor(weight.name, shape, np.dtype(np.uint8), weight.data)

        def compute(start: int, stop: int) -> NDArray[np.uint8]:
            if whole:
                return weight.data.read(start, stop) ^ flip
            first, last = start // row_nbytes, -(-stop // row_nbytes)
            packed = _padded_rows(weight, first, last, row_nbytes, flip)
            return packed.reshape(-1)[start - first * row_nbytes : stop - first * row_nbytes]

        return Tensor(weight.name, shape, np.dtype(np.uint8), Computed(prod(shape), compute))

    def scales(self, weight: Tensor, dtype: np.dtype[Any]) -> Tensor:
        """The scales in blocks of this size."""
        assert weight.quantization is not None
        scale = self._spread(weight.quantization.scale.dequantize(np.float32), weight)
        return Tensor.from_array("scales", scale.astype(dtype))

    def zero_points(self, weight: Tensor) -> Tensor | None:
        """The zero points, of unsigned codes."""
        assert weight.quantization is not None
        half = 1 << (self.bits - 1)
        signed = _is_signed(weight.dtype)
        zero_point = weight.quantization.zero_point
        if zero_point is None:
            if signed:
                return None
            values = np.zeros((weight.shape[0], self.blocks), np.int64)
        else:
            values = self._spread(zero_point.codes().astype(np.int64), weight) + (half if signed else 0)
        if (values == half).all():
            return None
        per_byte = 8 // self.bits
        padded = np.zeros((values.shape[0], -(-self.blocks // per_byte) * per_byte), np.uint8)
        padded[:, : self.blocks] = values
        packed = padded if self.bits == 8 else pack(padded, self.bits).reshape(values.shape[0], -1)
        return Tensor.from_array("zero_points", np.ascontiguousarray(packed))

    def _spread(self, grid: NDArray[Any], weight: Tensor) -> NDArray[Any]:
        """Parameters, one for each block of the weight's own size, as one for each of these blocks."""
        assert weight.quantization is not None
        own_rows, own = weight.quantization.block_shape
        starts = np.arange(self.blocks) * self.block_size // own
        rows = np.arange(weight.shape[0]) // own_rows
        return np.ascontiguousarray(grid[rows][:, starts])


def _padded_rows(weight: Tensor, first: int, last: int, row_nbytes: int, flip: np.uint8) -> NDArray[np.uint8]:
    """Rows [first, last) in whole blocks."""
    columns, bits = weight.shape[1], weight.bits
    out = np.zeros((last - first, row_nbytes), np.uint8)
    if columns * bits % 8 == 0:
        nbytes = columns * bits // 8
        out[:, :nbytes] = weight.data.read(first * nbytes, last * nbytes).reshape(last - first, nbytes) ^ flip
        return out
    begin, end = first * columns * bits // 8, -(-last * columns * bits // 8)
    packed = weight.data.read(begin, end) ^ flip
    skipped = first * columns - begin * 8 // bits
    codes = unpack(packed, _UNSIGNED[bits], packed.size * 8 // bits)[skipped : skipped + (last - first) * columns]
    per_byte = 8 // bits
    wide = np.zeros((last - first, row_nbytes * per_byte), np.uint8)
    wide[:, :columns] = codes.reshape(last - first, columns)
    return pack(wide, bits).reshape(last - first, row_nbytes)


def fitting_block_size(weight: Tensor) -> int | None:
    """The largest block size with which MatMulNBits decodes a weight of shape (rows, columns) exactly: a power of two
    of at least 16 that its own blocks are made of. None where there is none, or where codes are no integers of 2, 4 or
    8 bits with one scale, and perhaps one integer zero point, for each block along a row."""
    q = weight.quantization
    if q is None or q.offset is not None or q.codebook is not None or q.group_index is not None:
        return None
    if len(weight.shape) != 2 or 0 in weight.shape or (weight.dtype not in SUB_BYTE and weight.dtype.itemsize > 1):
        return None
    if weight.dtype not in _CODES or (q.zero_point is not None and not _holds_codes(q.zero_point, weight.dtype)):
        return None
    columns, own = weight.shape[1], q.block_shape[1]
    if own >= columns:  # one block: any size will do
        return min(_USUAL, max(_LEAST, 1 << (columns - 1).bit_length()))
    largest = own & -own
    return largest if largest >= _LEAST else None


_LEAST, _USUAL = 16, 128
_CODES = frozenset(
    np.dtype(t) for t in (ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8)
)


def _holds_codes(zero_point: Tensor, dtype: np.dtype[Any]) -> bool:
    """Whether all zero points are integers that codes can be."""
    if zero_point.quantization is not None or zero_point.dtype.kind not in "iu" and zero_point.dtype not in SUB_BYTE:
        return False
    bits = bits_of(dtype)
    lowest = -(1 << (bits - 1)) if _is_signed(dtype) else 0
    values = zero_point.codes()
    return bool(values.size == 0 or (values.min() >= lowest and values.max() < lowest + (1 << bits)))


def _is_signed(dtype: np.dtype[Any]) -> bool:
    return (SUB_BYTE[dtype][1] if dtype in SUB_BYTE else dtype) == _INT8


def unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The unsigned integers of as many bits."""
    return _UNSIGNED[bits_of(dtype)]


def has_grid(tensor: Tensor) -> bool:
    """Whether the parameters have the shape that blocks make."""
    q = tensor.quantization
    return q is not None and q.scale.shape == grid_shape(tensor.shape, q.block_shape)


__all__ = ["Blobs", "InMemory", "fitting_block_size", "has_grid", "transposed", "unsigned"]
