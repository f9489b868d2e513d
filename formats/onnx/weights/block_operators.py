"""com.microsoft's operators that take packed codes: MatMulNBits and its kin, GatherBlockQuantized, MatMulBnb4, QMoE.

Source: onnxruntime 1.32, docs/ContribOperators.md, and its CPU kernels where that page says nothing. Codes are unsigned
and packed low bits first, except MatMulBnb4's, which are high nibble first. Absent zero points are half the range,
except for GatherBlockQuantized on INT4 and UINT4 tensors, where they are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT4,
    FLOAT8_E4M3,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2FNUZ,
    INT4,
    SUB_BYTE,
    UINT4,
    UINT8,
    UNSIGNED,
)
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.converters.storage import Computed, Data
from nibblecast.formats.encodings.bytes.flat_blocks import flat_blocks
from nibblecast.formats.encodings.bytes.rows import swapped_nibbles
from nibblecast.formats.onnx.file.graph import Node, TensorHeader
from nibblecast.formats.onnx.file.payload import PayloadTensors

MICROSOFT = "com.microsoft"

_INT4S = frozenset((INT4, UINT4))
_FLOATS = frozenset((FLOAT8_E4M3, FLOAT8_E4M3FNUZ, FLOAT8_E5M2, FLOAT8_E5M2FNUZ, FLOAT4))
_MOST = 1 << 40  # limit for a size in an attribute: larger than any file, and far from overflow

#: bitsandbytes' tables of FP4 and NF4 (csrc/kernels.cu of 0.49; quant_type 0 and 1).
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TABLES: Mapping[int, tuple[float, ...]] = MappingProxyType({0: (*_FP4, 0.0, *(-value for value in _FP4[1:])), 1: _NF4})

#: Returns the initializer or Constant of a name; None if it is neither.
Find = Callable[[str], TensorHeader | None]


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """A weight of such an operator: its codes, their position among the inputs, the weight's axis of output channels,
    its parameters, and a function that builds its tensor."""

    codes: TensorHeader
    position: int
    channel_axis: int | None
    parameters: tuple[TensorHeader, ...]
    build: Callable[[PayloadTensors], Tensor]


def block_weights(node: Node, find: Find) -> Iterator[BlockWeight]:
    """The weights of a node that are initializers and whose parameters are initializers. Other operators have no
    weights here. Raises Unsupported for unknown layouts, CorruptFile for attributes that contradict the operator."""
    if node.domain == MICROSOFT and node.op_type in _OPERATORS and not node.is_parametric:
        yield from _OPERATORS[node.op_type](node, find)


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """The inputs that decode a weight, as headers; None if an input is absent."""

    codes: TensorHeader
    scales: TensorHeader
    zero_points: TensorHeader | None = None
    group_index: TensorHeader | None = None

    @classmethod
    def of(cls, node: Node, find: Find, *positions: int) -> _Inputs | None:
        """The inputs at `positions`: codes, scales and perhaps zero points and group index. None if there are no codes
        or if an input is computed at run time."""
        names = [node.input(position) for position in positions]
        found = [find(name) if name else None for name in names]
        missing = any(name and header is None for name, header in zip(names, found, strict=True))
        if missing or found[0] is None or found[1] is None:
            return None
        return cls(found[0], found[1], *found[2:])

    def weight(self, position: int, axis: int | None, build: Callable[[PayloadTensors], Tensor]) -> BlockWeight:
        """The weight that these inputs are parts of."""
        parameters = [part for part in (self.scales, self.zero_points, self.group_index) if part is not None]
        return BlockWeight(self.codes, position, axis, tuple(parameters), build)


@dataclass(frozen=True, slots=True)
class _Projection:
    """A weight of MatMulNBits or of an operator that fuses several: the name of the attribute N, and the positions of
    codes, scales, zero points and group index."""

    rows: str
    positions: tuple[int, ...]


_PROJECTIONS: Mapping[str, tuple[_Projection, ...]] = MappingProxyType(
    {
        "MatMulNBits": (_Projection("N", (1, 2, 3, 4)),),
        "MatMulNBitsMlp": (_Projection("N", (3, 4)), _Projection("N", (6, 7))),
        "MatMulNBitsQkv": (_Projection("Nq", (3, 4)), _Projection("Nkv", (6, 7)), _Projection("Nkv", (9, 10))),
    }
)


def _matmul_nbits(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K), transposed in comparison with MatMul. Each row is in blocks along K; the last one is padded."""
    for projection in _PROJECTIONS[node.op_type]:
        parts = _Inputs.of(node, find, *projection.positions)
        if parts is None or 0 in parts.codes.dims:  # an operator without codes leaves this projection out
            continue
        prepacked = node.integers.get("weight_prepacked", 0)
        if prepacked:
            raise Unsupported(
                f"is packed for one kind of device (weight_prepacked {prepacked} of a {node.op_type}): "
                "export the model without",
                tensor=parts.codes.name,
            )
        bits, block = _bits(node.integers.get("bits", 4), parts), _block_size(node, parts)
        shape = tuple(_positive(node, name, parts) for name in (projection.rows, "K"))
        row_nbytes = -(-shape[1] // block) * block * bits // 8
        build = partial(_rows_of_blocks, parts, shape=shape, bits=bits, block=block, row_nbytes=row_nbytes)
        yield parts.weight(projection.positions[0], 0, build)


def _rows_of_blocks(
    parts: _Inputs, payloads: PayloadTensors, shape: tuple[int, ...], bits: int, block: int, row_nbytes: int
) -> Tensor:
    """Unsigned codes of shape (..., columns), blocks along the last axis, each row in `row_nbytes` bytes."""
    rows, columns = prod(shape[:-1]), shape[-1]
    stored = _bytes(parts, payloads, rows, row_nbytes)
    block_shape = blocked(shape, len(shape) - 1, block)
    grid = grid_shape(shape, block_shape)
    quantization = Quantization(
        _parameter(parts.scales, "scales", parts, payloads, grid),
        block_shape,
        _zero_points(parts, payloads, grid, bits, grid[-1]),
        group_index=_group_index(parts, payloads, columns, block, grid[-1]),
    )
    data = _without_padding(stored.data, rows, columns, bits, row_nbytes)
    return Tensor(parts.codes.name, shape, UNSIGNED[bits], data, quantization)


def _bytes(parts: _Inputs, payloads: PayloadTensors, rows: int, row_nbytes: int) -> Tensor:
    """The codes as bytes. Raises CorruptFile unless their number is what the rows need."""
    stored = payloads.tensor(parts.codes)
    if stored.dtype != UINT8 or stored.nbytes != rows * row_nbytes:
        raise CorruptFile(
            f"has dims {parts.codes.dims} of {stored.dtype}: {rows} rows of {row_nbytes} bytes of uint8 are needed",
            tensor=parts.codes.name,
        )
    return stored


def _without_padding(data: Data, rows: int, columns: int, bits: int, row_nbytes: int) -> Data:
    """Rows of `columns` codes, each row in `row_nbytes` bytes, as one stream without padding."""
    if row_nbytes * 8 == columns * bits:
        return data
    nbytes = packed_size(rows * columns, bits)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        begin, end = start * 8 // bits, min(rows * columns, stop * 8 // bits)
        first, last = begin // columns, -(-end // columns)
        stored = data.read(first * row_nbytes, last * row_nbytes).reshape(last - first, row_nbytes)
        codes = _unpacked(stored, bits)[:, :columns].reshape(-1)[begin - first * columns : end - first * columns]
        return codes if bits == 8 else pack(codes, bits)

    return Computed(nbytes, compute, (data,))


def _unpacked(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Rows of bytes as rows of codes."""
    if bits == 8:
        return rows
    flat = np.ascontiguousarray(rows).reshape(-1)
    return unpack(flat, UNSIGNED[bits], flat.size * 8 // bits).reshape(len(rows), rows.shape[1] * 8 // bits)


def _parameter(
    header: TensorHeader, role: str, parts: _Inputs, payloads: PayloadTensors, grid: tuple[int, ...]
) -> Tensor:
    if prod(header.dims) != prod(grid):
        raise CorruptFile(f"has {role} of dims {header.dims}: {grid} are needed", tensor=parts.codes.name)
    return payloads.tensor(header, grid)


def _zero_points(parts: _Inputs, payloads: PayloadTensors, grid: tuple[int, ...], bits: int, columns: int) -> Tensor:
    """The zero points: half the range, floats, or packed codes, padded to whole bytes after each `columns` of them."""
    count = prod(grid)
    if parts.zero_points is None:
        half = np.uint8(1 << (bits - 1))
        return Tensor("zero_points", grid, UINT8, Computed(count, lambda start, stop: np.full(stop - start, half)))
    stored = payloads.tensor(parts.zero_points)
    if stored.dtype != UINT8:
        return _parameter(parts.zero_points, "zero points", parts, payloads, grid)
    rows, row_nbytes = count // max(1, columns), packed_size(columns, bits)
    if stored.nbytes != rows * row_nbytes:
        raise CorruptFile(
            f"has zero points of dims {parts.zero_points.dims}: {rows} rows of {row_nbytes} bytes are needed",
            tensor=parts.codes.name,
        )
    if bits == 8:
        return replace(stored, shape=grid)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start // columns, -(-stop // columns)
        packed = stored.data.read(first * row_nbytes, last * row_nbytes).reshape(last - first, row_nbytes)
        return _unpacked(packed, bits)[:, :columns].reshape(-1)[start - first * columns : stop - first * columns]

    return Tensor(parts.zero_points.name, grid, UINT8, Computed(count, compute, (stored.data,)))


def _group_index(parts: _Inputs, payloads: PayloadTensors, columns: int, block: int, groups: int) -> GroupIndex | None:
    """g_idx, one integer for each column, perhaps padded to whole blocks."""
    if parts.group_index is None:
        return None
    index, name = payloads.tensor(parts.group_index), parts.codes.name
    if index.shape not in ((columns,), (groups * block,)) or index.dtype.kind not in "iu":
        raise CorruptFile(
            f"has g_idx of dims {index.shape} and {index.dtype}: {columns} integers are needed", tensor=name
        )
    index = index if index.shape == (columns,) else index.rows(0, columns)
    found = index.codes()
    if found.min() < 0 or found.max() >= groups:
        raise CorruptFile(f"has groups {found.min()} to {found.max()} in g_idx: there are {groups}", tensor=name)
    return GroupIndex(1, index)


def _gather_block_quantized(node: Node, find: Find) -> Iterator[BlockWeight]:
    """A table of INT4, UINT4 or small floats, or of bytes with codes packed along the last axis. Blocks run along
    quantize_axis."""
    parts = _Inputs.of(node, find, 0, 2, 3)
    if parts is not None and parts.codes.dims:
        yield parts.weight(0, None, partial(_table, node, parts))


def _table(node: Node, parts: _Inputs, payloads: PayloadTensors) -> Tensor:
    stored, name = payloads.tensor(parts.codes), parts.codes.name
    shape, dtype = stored.shape, stored.dtype
    bits = 4 if dtype in SUB_BYTE else _bits(node.integers.get("bits", 4), parts)
    if dtype == UINT8:
        shape, dtype = (*shape[:-1], shape[-1] * 8 // bits), UNSIGNED[bits]
    elif dtype not in _INT4S | _FLOATS:
        raise CorruptFile(f"has codes of {dtype}: int4, uint4, uint8 or a small float are needed", tensor=name)
    axis = node.integers.get("quantize_axis", 1)
    if not -len(shape) <= axis < len(shape):
        raise CorruptFile(f"has quantize_axis {axis}, and {len(shape)} axes", tensor=name)
    axis %= len(shape)
    is_whole = dtype in _FLOATS and node.integers.get("block_size", 128) == 0
    block_shape = blocked(shape, axis, max(1, shape[axis]) if is_whole else _block_size(node, parts, 128))
    dims = parts.scales.dims
    if dtype in _FLOATS and len(dims) == len(shape):  # another axis may have one scale for all positions
        spread = [i != axis and dims[i] == 1 for i in range(len(shape))]
        block_shape = tuple(
            max(1, shape[i]) if one else block for i, (one, block) in enumerate(zip(spread, block_shape, strict=True))
        )
    grid = grid_shape(shape, block_shape)
    zero_point = None
    if stored.dtype == UINT8:
        zero_point = _zero_points(parts, payloads, grid, bits, grid[-1])
    elif parts.zero_points is not None:
        zero_point = _parameter(parts.zero_points, "zero points", parts, payloads, grid)
    scale = _parameter(parts.scales, "scales", parts, payloads, grid)
    return Tensor(name, shape, dtype, stored.data, Quantization(scale, block_shape, zero_point))


def _matmul_bnb4(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K). Blocks run through the flat tensor, so a block may begin in a row and end in the next."""
    parts = _Inputs.of(node, find, 1, 2)
    if parts is None:
        return
    rows, columns, block = (_positive(node, name, parts) for name in ("N", "K", "block_size"))
    table = _TABLES.get(node.integers.get("quant_type", -1))
    if table is None:
        kind = node.integers.get("quant_type")
        raise Unsupported(f"has quant_type {kind}: 0 (FP4) and 1 (NF4) are known", tensor=parts.codes.name)
    axis = 0 if node.integers.get("transB", 1) else 1
    yield parts.weight(1, axis, partial(_bnb4_weight, parts, shape=(rows, columns), block=block, table=table))


def _bnb4_weight(
    parts: _Inputs, payloads: PayloadTensors, shape: tuple[int, int], block: int, table: tuple[float, ...]
) -> Tensor:
    count = prod(shape)
    stored = _bytes(parts, payloads, 1, packed_size(count, 4))
    absmax = _parameter(parts.scales, "absmax", parts, payloads, (-(-count // block),))

    blocks = flat_blocks(shape, block)
    codebook = Tensor.from_array("codebook", np.array(table, np.float32))
    quantization = Quantization(blocks.spread(absmax), blocks.block_shape, codebook=codebook)
    return Tensor(parts.codes.name, shape, UNSIGNED[4], swapped_nibbles(stored.data, count), quantization)


def _qmoe(node: Node, find: Find) -> Iterator[BlockWeight]:
    """Weights of all experts, (experts, N, K), rows without padding. Without blocks, each row has one scale."""
    kind = node.texts.get("quant_type", "int")
    for number, positions, global_scale in ((1, (2, 3, 11), 15), (2, (5, 6, 12), 16), (3, (8, 9, 13), -1)):
        is_global = kind == "fp8" and node.integers.get("block_size", 0) <= 0
        parts = _Inputs.of(node, find, positions[0], *((global_scale,) if is_global else positions[1:]))
        if parts is None:
            continue
        if len(parts.codes.dims) != 3:
            raise CorruptFile(f"has dims {parts.codes.dims}: (experts, N, K) are needed", tensor=parts.codes.name)
        if kind == "fp8":
            yield parts.weight(positions[0], 1, partial(_float8_experts, node, parts))
            continue
        prepacked = node.integers.get("weights_prepacked", -1)
        if kind != "int" or prepacked == 1:
            what = f"quant_type '{kind}'" if kind != "int" else f"weights_prepacked {prepacked}"
            raise Unsupported(f"is laid out for one kind of device ({what} of a QMoE)", tensor=parts.codes.name)
        bits = node.integers.get(f"fc{number}_expert_weight_bits", node.integers.get("expert_weight_bits", 4))
        yield parts.weight(positions[0], 1, partial(_experts, node, parts, bits=_bits(bits, parts)))


def _experts(node: Node, parts: _Inputs, payloads: PayloadTensors, bits: int) -> Tensor:
    experts, rows, row_nbytes = parts.codes.dims
    shape = (experts, rows, row_nbytes * 8 // bits)
    if node.integers.get("block_size", 0) > 0:
        block = _block_size(node, parts)
        return _rows_of_blocks(parts, payloads, shape=shape, bits=bits, block=block, row_nbytes=row_nbytes)
    stored, block_shape = _bytes(parts, payloads, experts * rows, row_nbytes), (1, 1, max(1, shape[-1]))
    grid = grid_shape(shape, block_shape)
    scale = _parameter(parts.scales, "scales", parts, payloads, grid)
    # zero points with two axes are packed along the rows; with three axes each has its own byte
    is_flat = parts.zero_points is None or len(parts.zero_points.dims) != 3
    zero_point = _zero_points(parts, payloads, grid, bits, rows if is_flat else 1)
    return Tensor(parts.codes.name, shape, UNSIGNED[bits], stored.data, Quantization(scale, block_shape, zero_point))


def _float8_experts(node: Node, parts: _Inputs, payloads: PayloadTensors) -> Tensor:
    """Square blocks, or one scale for each expert."""
    stored, block = payloads.tensor(parts.codes), node.integers.get("block_size", 0)
    if stored.dtype not in _FLOATS or block > _MOST:
        raise CorruptFile(f"has {stored.dtype} in blocks of {block}: float8 is needed", tensor=parts.codes.name)
    block_shape = (1, block, block) if block > 0 else per_axis(stored.shape, 0)
    scale = _parameter(parts.scales, "scales", parts, payloads, grid_shape(stored.shape, block_shape))
    return replace(stored, quantization=Quantization(scale, block_shape))


def _matmul_float8(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K) of float8, with blocks along K."""
    parts = _Inputs.of(node, find, 1, 2)
    if parts is not None:
        yield parts.weight(1, 0, partial(_float8_rows, node, parts))


def _float8_rows(node: Node, parts: _Inputs, payloads: PayloadTensors) -> Tensor:
    stored, block = payloads.tensor(parts.codes), node.integers.get("block_size", 128)
    if stored.dtype not in _FLOATS or len(stored.shape) != 2 or not 0 < block < _MOST:
        what = f"dims {stored.shape} of {stored.dtype} in blocks of {block}"
        raise CorruptFile(f"has {what}: two axes of float8 are needed", tensor=parts.codes.name)
    block_shape = (1, block)
    scale = _parameter(parts.scales, "scales", parts, payloads, grid_shape(stored.shape, block_shape))
    return replace(stored, quantization=Quantization(scale, block_shape))


def _matmul_float4(node: Node, find: Find) -> Iterator[BlockWeight]:
    """W is (N, K) of float4, with blocks along K. Their float8 scales have one float32 scale themselves."""
    parts = _Inputs.of(node, find, 1, 2, 3)
    if parts is not None and parts.zero_points is not None:
        yield parts.weight(1, 0, partial(_float4_rows, node, parts, parts.zero_points))


def _float4_rows(node: Node, parts: _Inputs, second: TensorHeader, payloads: PayloadTensors) -> Tensor:
    block, dims = node.integers.get("block_size", 16), parts.codes.dims
    if len(dims) != 2 or not 0 < block < _MOST:
        message = f"has dims {dims} in blocks of {block}: (N, K / 2) are needed"
        raise CorruptFile(message, tensor=parts.codes.name)
    shape, block_shape = (dims[0], dims[1] * 2), (1, block)
    stored, grid = _bytes(parts, payloads, *dims), grid_shape(shape, block_shape)
    scale = _parameter(parts.scales, "scales", parts, payloads, grid)
    if scale.dtype.itemsize != 1:
        raise CorruptFile(f"has scales of {scale.dtype}: the bytes of float8 are needed", tensor=parts.codes.name)
    outer = Quantization(_parameter(second, "second scale", parts, payloads, (1, 1)), per_tensor(grid))
    scale = replace(scale, dtype=FLOAT8_E4M3, quantization=outer)
    return replace(stored, shape=shape, dtype=FLOAT4, quantization=Quantization(scale, block_shape))


def _bits(bits: int, parts: _Inputs) -> int:
    if bits not in UNSIGNED:
        raise Unsupported(f"has codes of {bits} bits; 2, 4 and 8 are known", tensor=parts.codes.name)
    return bits


def _positive(node: Node, name: str, parts: _Inputs) -> int:
    value = node.integers.get(name, 0)
    if not 0 < value < _MOST:
        raise CorruptFile(f"{name} {value} of a {node.op_type}: a positive number is needed", tensor=parts.codes.name)
    return value


def _block_size(node: Node, parts: _Inputs, default: int = 0) -> int:
    value = node.integers.get("block_size", default)
    if not 16 <= value <= _MOST or value & (value - 1):
        raise CorruptFile(
            f"block_size {value} of a {node.op_type}: a power of two from 16 on is needed", tensor=parts.codes.name
        )
    return value


_OPERATORS: Mapping[str, Callable[[Node, Find], Iterator[BlockWeight]]] = MappingProxyType(
    {
        **dict.fromkeys(_PROJECTIONS, _matmul_nbits),
        "GatherBlockQuantized": _gather_block_quantized,
        "MatMulBlockQuantizedFp4Weight": _matmul_float4,
        "MatMulBlockQuantizedFp8Weight": _matmul_float8,
        "MatMulBnb4": _matmul_bnb4,
        "QMoE": _qmoe,
    }
)
