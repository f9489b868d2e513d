"""com.microsoft's operators that take packed codes: MatMulNBits, GatherBlockQuantized, MatMulBnb4, QMoE.

Source: onnxruntime 1.32, docs/ContribOperators.md, and its CPU kernels where that is silent. Codes are unsigned and lie
low bits first, those of MatMulBnb4 high nibble first. Where zero points are left out they are half the range, save for
GatherBlockQuantized on tensors of INT4 and UINT4, where they are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import gcd, prod
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptFile, Unsupported
from converters.ir import GroupIndex, Quantization, Tensor, blocked, grid_shape
from converters.packing import pack, packed_size, unpack
from converters.storage import Computed, Data, InMemory
from formats.onnx.graph import Node, TensorHeader
from formats.onnx.payload import Payloads

MICROSOFT = "com.microsoft"

_UINT8 = np.dtype(np.uint8)
_CODES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {2: np.dtype(ml_dtypes.uint2), 4: np.dtype(ml_dtypes.uint4), 8: _UINT8}
)
_SMALL = frozenset(np.dtype(t) for t in (ml_dtypes.int4, ml_dtypes.uint4))

#: bitsandbytes' tables of FP4 and NF4 (csrc/kernels.cu of 0.49; quant_type 0 and 1).
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TABLES: Mapping[int, tuple[float, ...]] = MappingProxyType({0: (*_FP4, 0.0, *(-value for value in _FP4[1:])), 1: _NF4})

#: Gives the initializer or Constant of a name; None where it is neither.
Find = Callable[[str], TensorHeader | None]


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """A weight of such an operator: its codes, the position that they are at, its parameters, and how it is decoded."""

    codes: TensorHeader
    position: int
    parameters: tuple[TensorHeader, ...]
    build: Callable[[Payloads], Tensor]


def block_weights(node: Node, find: Find) -> Iterator[BlockWeight]:
    """The weights of a node that are initializers, with parameters that are; none for other operators. Raises
    Unsupported for layouts that are prepacked for one device."""
    if node.domain == MICROSOFT and node.op_type in _OPERATORS:
        yield from _OPERATORS[node.op_type](node, find)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What decodes a weight: headers, None where an input is absent."""

    codes: TensorHeader
    scales: TensorHeader
    zero_points: TensorHeader | None
    group_index: TensorHeader | None = None

    @classmethod
    def of(cls, node: Node, find: Find, codes: int, scales: int, zero_points: int, group_index: int) -> _Parts | None:
        """Those at these positions; None where one of them is computed at run time."""
        wanted = [
            node.input(position) if position >= 0 else "" for position in (codes, scales, zero_points, group_index)
        ]
        found = [find(name) if name else None for name in wanted]
        missing = any(name and header is None for name, header in zip(wanted, found, strict=True))
        if missing or found[0] is None or found[1] is None:
            return None
        return cls(found[0], found[1], found[2], found[3])

    def weight(self, position: int, build: Callable[[Payloads], Tensor]) -> BlockWeight:
        """The weight that these are parts of."""
        parameters = [part for part in (self.scales, self.zero_points, self.group_index) if part is not None]
        return BlockWeight(self.codes, position, tuple(parameters), build)


def _matmul_nbits(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K), the transposed of what MatMul takes; each row is in blocks along K, the last one filled up."""
    parts = _Parts.of(node, find, 1, 2, 3, 4)
    if parts is None or 0 in parts.codes.dims:  # without codes the projection is left out
        return
    if node.integers.get("weight_prepacked", 0):
        raise Unsupported(
            f"is packed for one device (weight_prepacked {node.integers['weight_prepacked']}): export it without",
            tensor=parts.codes.name,
        )
    bits, block = node.integers.get("bits", 4), _block_size(node, "block_size", 0)
    shape = tuple(_positive(node, name) for name in ("N", "K"))
    row_nbytes = -(-shape[1] // block) * block * bits // 8
    yield parts.weight(1, lambda payloads: _rows_of_blocks(parts, payloads, shape, bits, block, row_nbytes))


def _qmoe(node: Node, find: Find) -> Iterator[BlockWeight]:
    """Weights of all experts, (experts, N, K), rows without padding; one scale for a row where there are no blocks."""
    bits, block = node.integers.get("expert_weight_bits", 4), node.integers.get("block_size", 0)
    for position, zero_points in ((2, 11), (5, 12), (8, 13)):
        parts = _Parts.of(node, find, position, position + 1, zero_points, -1) if node.input(position) else None
        if parts is None or len(parts.codes.dims) != 3 or bits not in _CODES:
            continue
        experts, rows, row_nbytes = parts.codes.dims
        shape = (experts, rows, row_nbytes * 8 // bits)
        size = block if block > 0 else max(1, shape[-1])
        build = partial(_rows_of_blocks, parts, shape=shape, bits=bits, block=size, row_nbytes=row_nbytes)
        yield parts.weight(position, build)


def _rows_of_blocks(
    parts: _Parts, payloads: Payloads, shape: tuple[int, ...], bits: int, block: int, row_nbytes: int
) -> Tensor:
    """Unsigned codes of shape (..., columns), blocks along the last axis, each row in `row_nbytes` bytes."""
    name, dtype = parts.codes.name, _dtype(parts.codes, bits)
    rows, columns = prod(shape[:-1]), shape[-1]
    blocks = -(-columns // block)
    stored = payloads.tensor(parts.codes)
    if stored.dtype != _UINT8 or stored.nbytes != rows * row_nbytes:
        raise CorruptFile(
            f"has {stored.nbytes} bytes of {stored.dtype}: {rows} rows of {row_nbytes} bytes of uint8 are needed",
            tensor=name,
        )
    grid = (*shape[:-1], blocks)
    zero_point = _zero_points(parts, payloads, grid, bits)
    group_index = None
    if parts.group_index is not None:
        index = payloads.tensor(parts.group_index)
        _check_groups(index, columns, blocks, name)
        group_index = GroupIndex(len(shape) - 1, index)
    quantization = Quantization(
        _scales(parts.scales, payloads, grid, name),
        blocked(shape, len(shape) - 1, block),
        zero_point,
        group_index=group_index,
    )
    return Tensor(name, shape, dtype, _without_padding(stored.data, rows, columns, bits, row_nbytes), quantization)


def _without_padding(data: Data, rows: int, columns: int, bits: int, row_nbytes: int) -> Data:
    """Rows of `columns` codes, each in `row_nbytes` bytes, as one stream."""
    if row_nbytes * 8 == columns * bits:
        return data
    nbytes = packed_size(rows * columns, bits)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first = start * 8 // bits // columns
        last = min(rows, -(-(stop * 8 // bits) // columns))
        stored = data.read(first * row_nbytes, last * row_nbytes).reshape(last - first, row_nbytes)
        codes = _unpacked(stored, bits)[:, :columns].reshape(-1)
        skipped = start * 8 // bits - first * columns
        wanted = codes[skipped : skipped + (stop - start) * 8 // bits]
        return wanted if bits == 8 else pack(wanted, bits)

    return Computed(nbytes, compute, (data,))


def _unpacked(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Rows of bytes as rows of codes."""
    if bits == 8:
        return rows
    flat = np.ascontiguousarray(rows).reshape(-1)
    return unpack(flat, _CODES[bits], flat.size * 8 // bits).reshape(rows.shape[0], -1)


def _scales(header: TensorHeader, payloads: Payloads, grid: tuple[int, ...], name: str) -> Tensor:
    if prod(header.dims) != prod(grid):
        raise CorruptFile(f"has scales of dims {header.dims}: {grid} are needed", tensor=name)
    return payloads.tensor(header, grid)


def _zero_points(parts: _Parts, payloads: Payloads, grid: tuple[int, ...], bits: int) -> Tensor:
    """The zero points: half the range, packed codes whose rows are filled up to whole bytes, or floats."""
    count, columns = prod(grid), grid[-1]
    if parts.zero_points is None:
        half = np.uint8(1 << (bits - 1))
        return Tensor("zero_points", grid, _UINT8, Computed(count, lambda start, stop: np.full(stop - start, half)))
    stored = payloads.tensor(parts.zero_points)
    if stored.dtype != _UINT8 and stored.size == count:
        return replace(stored, shape=grid)
    rows, row_nbytes = count // max(1, columns), packed_size(columns, bits)
    if stored.dtype != _UINT8 or stored.nbytes != rows * row_nbytes:
        raise CorruptFile(
            f"has zero points of dims {parts.zero_points.dims} and {stored.dtype}: "
            f"{rows} rows of {row_nbytes} bytes of uint8 are needed",
            tensor=parts.codes.name,
        )
    if bits == 8:
        return replace(stored, shape=grid)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start // columns, -(-stop // columns)
        packed = stored.data.read(first * row_nbytes, last * row_nbytes).reshape(last - first, row_nbytes)
        return _unpacked(packed, bits)[:, :columns].reshape(-1)[start - first * columns : stop - first * columns]

    return Tensor(parts.zero_points.name, grid, _UINT8, Computed(count, compute, (stored.data,)))


def _check_groups(index: Tensor, columns: int, groups: int, name: str) -> None:
    if index.shape != (columns,) or index.dtype.kind not in "iu":
        raise CorruptFile(
            f"has g_idx of dims {index.shape} and {index.dtype}: {columns} integers are needed", tensor=name
        )
    found = index.codes()
    if found.size and (found.min() < 0 or found.max() >= groups):
        raise CorruptFile(f"has groups {found.min()} to {found.max()} in g_idx: there are {groups}", tensor=name)


def _gather_block_quantized(node: Node, find: Find) -> Iterator[BlockWeight]:
    """A table of INT4 or UINT4, or of bytes that hold codes along the last axis; blocks along quantize_axis."""
    parts = _Parts.of(node, find, 0, 2, 3, -1)
    if parts is not None and parts.codes.dims:
        yield parts.weight(0, lambda payloads: _table(node, parts, payloads))


def _table(node: Node, parts: _Parts, payloads: Payloads) -> Tensor:
    stored, name = payloads.tensor(parts.codes), parts.codes.name
    block, axis = _block_size(node, "block_size", 128), node.integers.get("quantize_axis", 1)
    rank = len(stored.shape)
    if not -rank <= axis < rank:
        raise CorruptFile(f"has quantize_axis {axis}, and {rank} axes", tensor=name)
    if stored.dtype in _SMALL:
        shape, dtype = stored.shape, stored.dtype
    else:
        bits = node.integers.get("bits", 4)
        dtype = _dtype(parts.codes, bits)
        shape = (*stored.shape[:-1], stored.shape[-1] * 8 // bits)
        if stored.dtype != _UINT8:
            raise CorruptFile(f"has codes of {stored.dtype}: int4, uint4 or uint8 are needed", tensor=name)
    block_shape = blocked(shape, axis % rank, block)
    grid = grid_shape(shape, block_shape)
    zero_point: Tensor | None
    if stored.dtype not in _SMALL:
        zero_point = _zero_points(parts, payloads, grid, node.integers.get("bits", 4))
    elif parts.zero_points is None:
        zero_point = None
    else:
        zero_point = _scales(parts.zero_points, payloads, grid, name)
    scale = _scales(parts.scales, payloads, grid, name)
    return Tensor(name, shape, dtype, stored.data, Quantization(scale, block_shape, zero_point))


def _matmul_bnb4(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K); blocks run through the flat tensor, so that one may begin in a row and end in the next."""
    parts = _Parts.of(node, find, 1, 2, -1, -1)
    if parts is None:
        return
    shape, block = tuple(_positive(node, name) for name in ("N", "K")), _positive(node, "block_size")
    table = _TABLES.get(node.integers.get("quant_type", 0))
    if table is None:
        raise Unsupported(f"has quant_type {node.integers['quant_type']}; 0 and 1 are known", tensor=parts.codes.name)
    yield parts.weight(1, lambda payloads: _bnb4_weight(parts, payloads, shape, block, table))


def _bnb4_weight(
    parts: _Parts, payloads: Payloads, shape: tuple[int, ...], block: int, table: tuple[float, ...]
) -> Tensor:
    stored, absmax, name = payloads.tensor(parts.codes), payloads.tensor(parts.scales), parts.codes.name
    count = prod(shape)
    if stored.dtype != _UINT8 or stored.nbytes != packed_size(count, 4) or absmax.size != -(-count // block):
        raise CorruptFile(
            f"has {stored.nbytes} bytes and {absmax.size} scales: {packed_size(count, 4)} bytes of uint8 and "
            f"{-(-count // block)} scales are needed",
            tensor=name,
        )

    def swapped(start: int, stop: int) -> NDArray[np.uint8]:
        packed = stored.data.read(start, stop)
        high: NDArray[np.uint8] = packed >> np.uint8(4)
        return high | (packed << np.uint8(4))

    # blocks that end within rows are cut where rows end: all have one size then, and repeat their scale
    size = gcd(block, shape[1])
    grid = (shape[0], shape[1] // size)
    scale = absmax
    if grid == (count // block, 1) or size == block:
        scale = replace(absmax, shape=grid)
    else:
        values = absmax.numpy().reshape(-1)[np.arange(prod(grid)) * size // block].reshape(grid)
        scale = Tensor(absmax.name, grid, absmax.dtype, InMemory.of(values))
    codebook = Tensor.from_array("codebook", np.array(table, np.float32))
    quantization = Quantization(scale, (1, size), codebook=codebook)
    return Tensor(name, shape, _CODES[4], Computed(stored.nbytes, swapped, (stored.data,)), quantization)


def _dtype(header: TensorHeader, bits: int) -> np.dtype[Any]:
    if bits not in _CODES:
        raise Unsupported(f"has codes of {bits} bits; 2, 4 and 8 are known", tensor=header.name)
    return _CODES[bits]


def _positive(node: Node, name: str) -> int:
    value = node.integers.get(name, 0)
    if not 0 < value < 1 << 40:
        raise CorruptFile(f"{name} {value} of a {node.op_type}: a positive number is needed")
    return value


def _block_size(node: Node, name: str, default: int) -> int:
    value = node.integers.get(name, default)
    if not 16 <= value <= 1 << 30 or value & (value - 1):
        raise CorruptFile(f"{name} {value} of a {node.op_type}: a power of two from 16 on is needed")
    return value


_OPERATORS: Mapping[str, Callable[[Node, Find], Iterator[BlockWeight]]] = MappingProxyType(
    {
        "GatherBlockQuantized": _gather_block_quantized,
        "MatMulBnb4": _matmul_bnb4,
        "MatMulNBits": _matmul_nbits,
        "QMoE": _qmoe,
    }
)
