"""Codes in another order: transposed matrices, and the blobs of com.microsoft's MatMulNBits and GatherBlockQuantized.

Codes are moved and never decoded, so the values stay exact. The source is read in pieces when the bytes are read, so a
large matrix is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    INT2,
    INT4,
    INT8,
    INT32,
    INT64,
    UINT2,
    UINT4,
    UINT8,
    UNSIGNED,
    code_range,
    is_integer,
    is_signed,
)
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor
from nibblecast.converters.storage import Computed

_TILE = 256
_PIECE_BYTES = 1 << 20
#: The sign bit of every code in a byte. Flipping it turns two's complement into offset binary.
_SIGN_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}


def transposed(tensor: Tensor) -> Tensor:
    """A matrix of shape (rows, columns) as (columns, rows), with its parameters transposed as well."""
    rows, columns = tensor.shape
    source = _Columns(tensor)
    row_nbytes = rows * tensor.bits / 8

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        if rows * tensor.bits % 8:  # rows of the result share bytes, so they cannot be made one by one
            return source.packed(0, columns)[start:stop]
        first, last = int(start // row_nbytes), int(-(-stop // row_nbytes))
        packed = source.packed(first, last)
        offset = int(first * row_nbytes)
        return packed[start - offset : stop - offset]

    quantization = tensor.quantization and _transposed_parameters(tensor.quantization)
    data = Computed(tensor.nbytes, compute, (tensor.data,), in_order=False)
    return replace(tensor, shape=(columns, rows), data=data, quantization=quantization, uses=())


def _transposed_parameters(q: Quantization) -> Quantization:
    group = q.group_index
    return Quantization(
        transposed(q.scale),
        q.block_shape[::-1],
        q.zero_point and transposed(q.zero_point),
        q.offset and transposed(q.offset),
        q.codebook,
        None if group is None else GroupIndex(1 - group.axis, group.index),
    )


def permuted(tensor: Tensor, permutation: tuple[int, ...] | None) -> Tensor:
    """A tensor with its axes, and those of its parameters, in another order. None keeps the order."""
    if permutation is None or permutation == tuple(range(len(tensor.shape))):
        return tensor
    if permutation == (1, 0):
        return transposed(tensor)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        codes = np.ascontiguousarray(tensor.codes().transpose(permutation))
        packed = pack(codes, tensor.bits) if tensor.bits < 8 else codes.reshape(-1).view(np.uint8)
        return packed[start:stop]

    q = tensor.quantization
    if q is not None:
        group = q.group_index
        q = Quantization(
            permuted(q.scale, permutation),
            tuple(q.block_shape[axis] for axis in permutation),
            q.zero_point and permuted(q.zero_point, permutation),
            q.offset and permuted(q.offset, permutation),
            q.codebook,
            None if group is None else GroupIndex(permutation.index(group.axis), group.index),
        )
    shape = tuple(tensor.shape[axis] for axis in permutation)
    data = Computed(tensor.nbytes, compute, (tensor.data,), in_order=False)
    return replace(tensor, shape=shape, data=data, quantization=q, uses=())


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor as DequantizeLinear takes it. Zero points get the dtype of the codes if they are integers that fit it;
    they are left out if codes are wide and all zero points are 0. Codes of int64 (biases with int16 activations) become
    int32 if all of them fit."""
    if tensor.dtype == INT64:
        tensor = _as_int32(tensor)
    q = tensor.quantization
    zero_point = None if q is None else q.zero_point
    if q is None or zero_point is None or not is_integer(tensor.dtype):
        return tensor
    if zero_point.dtype == tensor.dtype and tensor.bits <= 8:
        return tensor
    if zero_point.quantization is not None or not is_integer(zero_point.dtype):
        return tensor
    if tensor.bits > 8:
        return tensor if zero_point.codes().any() else replace(tensor, quantization=replace(q, zero_point=None))
    if not _are_codes(zero_point, tensor.dtype):
        return tensor
    bits = tensor.bits

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        codes = zero_point.codes()
        packed = pack(codes, bits) if bits < 8 else codes.astype(np.uint8).reshape(-1)
        return packed[start:stop]

    data = Computed(packed_size(zero_point.size, bits), compute, (zero_point.data,))
    return replace(tensor, quantization=replace(q, zero_point=replace(zero_point, dtype=tensor.dtype, data=data)))


def _as_int32(tensor: Tensor) -> Tensor:
    limits = np.iinfo(np.int32)
    for part in tensor.parts(_PIECE_BYTES):
        codes = part.codes()
        if codes.size and (codes.min() < limits.min or codes.max() > limits.max):
            return tensor

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        codes = tensor.codes().reshape(-1)[start // 4 : -(-stop // 4)].astype(np.int32)
        return codes.view(np.uint8)[start % 4 : start % 4 + stop - start]

    return replace(tensor, dtype=INT32, data=Computed(4 * tensor.size, compute, (tensor.data,)))


def parameters_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a tensor, with their roles."""
    return iter(()) if tensor.quantization is None else tensor.quantization.parameters()


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of a matrix of codes, read as rows.

    Packed codes are transposed in tiles of whole bytes. Unpacking them first would be simpler, but takes one byte per
    code, which is four times the memory for 2-bit codes."""

    tensor: Tensor

    def packed(self, first: int, last: int) -> NDArray[np.uint8]:
        """The canonical bytes of columns [first, last) as rows."""
        rows, columns = self.tensor.shape
        bits = self.tensor.bits
        per_byte = max(1, 8 // bits)
        begin, end = first // per_byte, -(-last // per_byte)
        if bits > 8:
            return np.ascontiguousarray(self.tensor.codes()[:, first:last].T).reshape(-1).view(np.uint8)
        if columns % per_byte or rows % per_byte:  # rows that begin within a byte
            return pack(self.tensor.codes()[:, first:last].T, bits)
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
    """A weight of shape (rows, columns) as MatMulNBits takes it (onnxruntime 1.32, ContribOperators.md).

    MatMulNBits only knows block sizes that are powers of two, and unsigned codes. The weight's own blocks are split and
    signed codes shifted, because both keep every value. Requantizing would fit more weights, but change them."""

    weight: Tensor
    quantization: Quantization
    block_size: int

    @classmethod
    def of(cls, weight: Tensor) -> Blobs | None:
        """The blobs with the largest block size that gives exactly these values: a power of two of at least 16 that
        divides the weight's own blocks. None if there is no such size. Also None unless codes are integers of 2, 4 or 8
        bits with one scale, and perhaps one integer zero point, for each block along a row."""
        q = weight.quantization
        if q is None or q.offset is not None or q.codebook is not None or q.group_index is not None:
            return None
        if len(weight.shape) != 2 or 0 in weight.shape or weight.dtype not in _CODES:
            return None
        if q.zero_point is not None and not _are_codes(q.zero_point, weight.dtype):
            return None
        columns, own = weight.shape[1], q.block_shape[1]
        if own >= columns:  # one block: any size will do
            return cls(weight, q, min(_USUAL, max(_LEAST, 1 << (columns - 1).bit_length())))
        largest = own & -own
        return cls(weight, q, largest) if largest >= _LEAST else None

    def like(self, weight: Tensor) -> Blobs:
        """The same blobs for this weight, e.g. with its payload and parameters in memory."""
        return replace(self, weight=weight, quantization=weight.quantization or self.quantization)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.weight.bits

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the codes: (rows, blocks, block_size * bits / 8)."""
        rows, columns = self.weight.shape
        return rows, -(-columns // self.block_size), self.block_size * self.bits // 8

    @property
    def has_zero_points(self) -> bool:
        """Whether zero points must be written. Absent ones are 2 ** (bits - 1)."""
        return self.quantization.zero_point is not None or not is_signed(self.weight.dtype)

    def codes(self) -> Tensor:
        """The unsigned codes, uint8 of `shape`. The last block of each row is padded with zeros."""
        weight, row_nbytes = self.weight, self.shape[1] * self.shape[2]
        columns = weight.shape[1]
        flip = np.uint8(_SIGN_BITS[self.bits] if is_signed(weight.dtype) else 0)
        is_whole = row_nbytes * 8 == columns * self.bits
        if is_whole and not flip:
            return Tensor(weight.name, self.shape, UINT8, weight.data)

        def compute(start: int, stop: int) -> NDArray[np.uint8]:
            if is_whole:
                return weight.data.read(start, stop) ^ flip
            first, last = start // row_nbytes, -(-stop // row_nbytes)
            packed = _padded_rows(weight, first, last, row_nbytes, flip)
            return packed.reshape(-1)[start - first * row_nbytes : stop - first * row_nbytes]

        return Tensor(weight.name, self.shape, UINT8, Computed(prod(self.shape), compute, (weight.data,)))

    def scales(self, dtype: np.dtype[Any]) -> Tensor:
        """The scales, (rows, blocks) of `dtype`."""
        return Tensor.from_array("scales", self._spread(self.quantization.scale.dequantize(np.float32)).astype(dtype))

    def zero_points(self) -> Tensor:
        """The zero points of unsigned codes, uint8 of shape (rows, ceil(blocks * bits / 8)). Each row is padded to
        whole bytes."""
        shift, zero_point = 1 << (self.bits - 1), self.quantization.zero_point
        grid = np.zeros(self.quantization.scale.shape, np.int64) if zero_point is None else zero_point.codes()
        values = self._spread(grid.astype(np.int64)) + (shift if is_signed(self.weight.dtype) else 0)
        if self.bits == 8:
            return Tensor.from_array("zero_points", values.astype(np.uint8))
        per_byte = 8 // self.bits
        padded = np.zeros((values.shape[0], -(-values.shape[1] // per_byte) * per_byte), np.uint8)
        padded[:, : values.shape[1]] = values
        return Tensor.from_array("zero_points", pack(padded, self.bits).reshape(values.shape[0], -1))

    def _spread(self, grid: NDArray[Any]) -> NDArray[Any]:
        """Parameters of the weight's own blocks, repeated so that there is one for each of the blobs' blocks."""
        own_rows, own_columns = self.quantization.block_shape
        starts = np.arange(self.shape[1]) * self.block_size // own_columns
        rows = np.arange(self.weight.shape[0]) // own_rows
        return np.ascontiguousarray(grid[rows][:, starts])


def _padded_rows(weight: Tensor, first: int, last: int, row_nbytes: int, flip: np.uint8) -> NDArray[np.uint8]:
    """Rows [first, last), padded to whole blocks."""
    columns, bits = weight.shape[1], weight.bits
    out = np.zeros((last - first, row_nbytes), np.uint8)
    if columns * bits % 8 == 0:
        nbytes = columns * bits // 8
        out[:, :nbytes] = weight.data.read(first * nbytes, last * nbytes).reshape(last - first, nbytes) ^ flip
        return out
    begin, end = first * columns * bits // 8, -(-last * columns * bits // 8)
    packed = weight.data.read(begin, end) ^ flip
    skipped = first * columns - begin * 8 // bits
    codes = unpack(packed, UNSIGNED[bits], packed.size * 8 // bits)[skipped : skipped + (last - first) * columns]
    per_byte = 8 // bits
    wide = np.zeros((last - first, row_nbytes * per_byte), np.uint8)
    wide[:, :columns] = codes.reshape(last - first, columns)
    return pack(wide, bits).reshape(last - first, row_nbytes)


_LEAST, _USUAL = 16, 128
_CODES = frozenset((INT2, UINT2, INT4, UINT4, INT8, UINT8))


def _are_codes(zero_point: Tensor, dtype: np.dtype[Any]) -> bool:
    """Whether all zero points are integers that fit the codes' dtype."""
    if zero_point.dtype == dtype:
        return True
    if zero_point.quantization is not None or not is_integer(zero_point.dtype):
        return False
    lowest, highest = code_range(dtype)
    values = zero_point.codes()
    return bool(values.size == 0 or (values.min() >= lowest and values.max() <= highest))
