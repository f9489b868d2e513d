"""How torchao and PyTorch's kernels reorder codes and scales in memory, undone row by row when they are read.

    unswizzled          scales in tiles of 128 rows and 4 columns, for cuBLAS          torchao 0.18, mx_formats/utils.py
    for_cpu             int4 in blocks of rows, for one instruction set                torch 2.13, int4mm_kernel.cpp
    for_tensor_cores    int4 in the fragments of m16n8k16                              torch 2.13, int4mm.cu
    in_shards           codes of 1 to 7 bits in planes of 4, 2 and 1 bits              torchao 0.18, bitpacking.py

All functions take tensors whose sizes were checked, and give tensors that are computed when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import UINT4
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.bytes.rows import made_by_rows
from nibblecast.formats.encodings.torchao.inner_tensors import Cpu

#: Rows in a block of for_cpu: four vectors of float32. Blocks of "generic" are those of 32-byte vectors without AVX2.
_CPU_BLOCKS: Mapping[Cpu, int] = MappingProxyType({"avx512": 64, "avx2": 32, "generic": 32})

_TILE_ROWS, _TILE_COLUMNS = 128, 4

#: The bits of the planes that in_shards splits codes into, lowest bits of the codes first.
SHARDS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
)


def swizzled_size(grid: tuple[int, ...]) -> int:
    """How many elements are stored for parameters of shape `grid`, (..., rows, columns), in whole tiles."""
    height, width = prod(grid[:-1]), grid[-1]
    return -(-height // _TILE_ROWS) * _TILE_ROWS * -(-width // _TILE_COLUMNS) * _TILE_COLUMNS


def unswizzled(role: str, stored: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Parameters of shape `grid` of those in tiles of 128 × 4, each of which is [row % 32][row // 32][column]."""
    columns = grid[-1]
    tiles = -(-columns // _TILE_COLUMNS)

    def rows(first: int, last: int) -> NDArray[Any]:
        start, stop = first // _TILE_ROWS, -(-last // _TILE_ROWS)
        array = stored.numpy().reshape(-1, tiles, 32, _TILE_ROWS // 32, _TILE_COLUMNS)[start:stop]
        whole = array.transpose(0, 3, 2, 1, 4).reshape(-1, tiles * _TILE_COLUMNS)
        return whole[first - start * _TILE_ROWS : last - start * _TILE_ROWS, :columns]

    return made_by_rows(role, grid, stored.dtype, rows, stored.data)


def for_cpu(name: str, stored: Tensor, shape: tuple[int, ...], cpu: Cpu) -> Tensor:
    """uint4 codes of `shape`, (rows, columns) with an even number of rows, of bytes in blocks of rows, each of which
    is [column][byte]. In a whole block of AVX512 and AVX2 the low nibbles are its first half of the rows; in any other
    block a byte is two rows next to each other, low nibble first."""
    height, columns = shape
    block, halves = _CPU_BLOCKS[cpu], cpu != "generic"

    def rows(first: int, last: int) -> NDArray[Any]:
        start = first // block * block
        blocks = [_block_of_rows(top, min(block, height - top)) for top in range(start, last, block)]
        return np.concatenate(blocks)[first - start : last - start] if blocks else np.zeros((0, columns), np.uint8)

    def _block_of_rows(top: int, count: int) -> NDArray[np.uint8]:
        pairs = stored.data.read(top * columns // 2, (top + count) * columns // 2).reshape(columns, count // 2)
        nibbles = (pairs & 0x0F, pairs >> 4)
        if halves and count == block:
            return np.concatenate(nibbles, axis=1).T
        return np.stack(nibbles, axis=2).reshape(columns, count).T

    return made_by_rows(name, shape, UINT4, rows, stored.data)


def for_tensor_cores(name: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint4 codes of `shape`, (rows, columns), of int32 words [rows / 8][columns / 32 / n][32][n]: lane 4 * r + c of
    the 32 has row r of 8 and, in word j of its n and nibble 4 * p + m of that, column 32 * j + 8 * m + 2 * c + p.
    There may be more stored rows and columns, which fill up."""
    _, outer, _, inner = stored.shape
    columns = shape[1]

    def rows(first: int, last: int) -> NDArray[Any]:
        start, stop = first // 8, -(-last // 8)
        words = np.ascontiguousarray(stored.numpy()[start:stop]).view(np.uint8)  # little-endian: low nibbles first
        nibbles = np.stack((words & 0x0F, words >> 4), axis=-1).reshape(-1, outer, 8, 4, inner, 2, 4)
        whole = nibbles.transpose(0, 2, 1, 4, 6, 3, 5).reshape(-1, outer * inner * 32)
        return whole[first - start * 8 : last - start * 8, :columns]

    return made_by_rows(name, shape, UINT4, rows, stored.data)


def in_shards(name: str, stored: tuple[Tensor, ...], shape: tuple[int, ...], bits: int, dtype: np.dtype[Any]) -> Tensor:
    """Codes of `bits` bits as `dtype`, of the planes that `SHARDS` says; a plane of n bits has the 8 / n parts of a row
    in the n-bit fields of its bytes, the first part lowest."""
    columns = shape[-1]

    def rows(first: int, last: int) -> NDArray[Any]:
        codes, shift = np.zeros((last - first, columns), np.uint8), 0
        for plane, width in zip(stored, SHARDS[bits], strict=True):
            row_bytes = columns * width // 8
            packed = plane.data.read(first * row_bytes, last * row_bytes).reshape(last - first, row_bytes)
            parts = [packed >> low & (1 << width) - 1 for low in range(0, 8, width)]
            codes |= np.concatenate(parts, axis=1) << np.uint8(shift)
            shift += width
        return codes

    return made_by_rows(name, shape, dtype, rows, *(plane.data for plane in stored))


def as_dtype(parameter: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """A parameter whose elements are rounded to `dtype`."""
    columns = parameter.shape[-1] if parameter.shape else 1

    def rows(first: int, last: int) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return parameter.numpy().reshape(-1, columns)[first:last].astype(dtype)

    return made_by_rows(parameter.name, parameter.shape, dtype, rows, parameter.data)
