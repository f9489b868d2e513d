"""ONNX nodes that decode an initializer -> its `Quantization`: DequantizeLinear, and the arithmetic of `lowering`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import CorruptFile
from converters.ir import GroupIndex, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from formats.onnx.graph import Graph, Node, TensorHeader
from formats.onnx.lowering import fits, is_wide
from formats.onnx.payload import Payloads
from formats.onnx.schema import DTYPES, ELEMENT_TYPES, GROUP_SIZE, TABLE_DTYPE

_FLOAT32 = ELEMENT_TYPES[np.dtype(np.float32)].number
_INT32 = ELEMENT_TYPES[np.dtype(np.int32)].number
_INT64 = ELEMENT_TYPES[np.dtype(np.int64)].number
_FLOAT4 = np.dtype(ml_dtypes.float4_e2m1fn)
_NARROW_INTEGERS = frozenset(
    ELEMENT_TYPES[np.dtype(dtype)].number
    for dtype in (np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2)
)
_FLOATS = frozenset(
    ELEMENT_TYPES[np.dtype(dtype)].number for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)
#: Operators that take a weight's codes: the positions of codes, scale and zero point, and the axis that several scales
#: are for (ONNX operators, QLinearConv 10 and QLinearMatMul 21; onnxruntime 1.32, ContribOperators.md).
CODES_OPERATORS: Mapping[tuple[str, str], tuple[int, int, int, int]] = MappingProxyType(
    {
        ("", "QLinearConv"): (3, 4, 5, 0),
        ("", "QLinearMatMul"): (3, 4, 5, -1),
        ("com.microsoft", "DynamicQuantizeMatMul"): (1, 2, 3, -1),
        ("com.microsoft", "MatMulIntegerToFloat"): (1, 3, 5, -1),
        ("com.microsoft", "QAttention"): (1, 4, 7, -1),
        ("com.microsoft", "QGemm"): (3, 4, 5, -1),
        ("com.microsoft", "QLinearConv"): (3, 4, 5, 0),
    }
)
#: Operators that multiply codes and leave the scales to the nodes that follow: the positions of the codes of the weight
#: and of its zero point, and the axis of its output channels.
INTEGER_PRODUCTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"ConvInteger": (1, 3, 0), "MatMulInteger": (1, 3, -1)}
)
_DEQUANTIZE_LINEAR_DOMAINS = ("", "ai.onnx", "com.microsoft")


class Scope:
    """What the names in a graph stand for: initializers (and Constants), and the nodes that make the other values."""

    def __init__(self, graph: Graph, outer: Scope | None) -> None:
        self.graph = graph
        self.outer = outer
        self.headers = {tensor.name: tensor for tensor in graph.initializers}
        self.producers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.takers.setdefault(name, []).append(node)
        self.headers |= {node.constant.name: node.constant for node in graph.nodes if node.constant is not None}

    def makes(self, name: str) -> bool:
        """Whether the name stands for something of this graph itself."""
        return name in self.headers or name in self.producers or name in self.graph.inputs

    def header(self, name: str) -> TensorHeader | None:
        """The initializer or Constant of that name, here or in a graph around this one."""
        scope: Scope | None = self
        while scope is not None and name not in scope.headers:
            scope = scope.outer
        return scope.headers[name] if scope else None

    def producer(self, name: str, op_type: str) -> Node | None:
        """The node that makes a value, here or in a graph around this one, if it is this standard operator."""
        node = self.node(name)
        return node if node is not None and node.op_type == op_type and node.is_standard else None

    def node(self, name: str) -> Node | None:
        """The node that makes a value, here or in a graph around this one."""
        scope: Scope | None = self
        while scope is not None and name not in scope.producers:
            scope = scope.outer
        return scope.producers[name] if scope else None


@dataclass(frozen=True, slots=True)
class Stored:
    """An initializer, and the dtype that its bits have where TensorProto's is only a carrier; or floats that become
    codes of that dtype when the model is loaded (`is_rounded`)."""

    header: TensorHeader
    dtype: np.dtype[Any] | None = None
    is_rounded: bool = False

    def tensor(self, payloads: Payloads, shape: tuple[int, ...] | None = None) -> Tensor:
        """The plain tensor, in another shape of the same size if one is given."""
        tensor = payloads.tensor(self.header, shape)
        if self.dtype is None or self.is_rounded:
            return tensor
        return replace(tensor, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Spread:
    """A parameter, and along which axes an index says which of its positions each of the tensor's takes."""

    stored: Stored
    indices: tuple[tuple[int, Stored], ...] = ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """The nodes that decode an initializer, understood. `linear` are DequantizeLinear's attributes, None for the
    arithmetic; `value` is the decoded value's name, empty where an operator takes the codes themselves. `in_integers`
    says that the arithmetic subtracts zero points before it goes over to float32."""

    codes: Stored
    scale: Spread
    zero_point: Spread | None = None
    offset: Spread | None = None
    codebook: Stored | None = None
    linear: Mapping[str, int] | None = None
    value: str = ""
    in_integers: bool = False

    @property
    def is_rounded_early(self) -> bool:
        """Whether codes and zero points are integers that float32 does not hold, and yet are subtracted as float32."""
        if self.zero_point is None or self.codebook is not None or self.linear is not None or self.in_integers:
            return False
        dtypes = [
            stored.dtype or DTYPES.get(stored.header.data_type) for stored in (self.codes, self.zero_point.stored)
        ]
        return is_wide(*(dtype for dtype in dtypes if dtype is not None))

    @property
    def has_float_scale(self) -> bool:
        """Whether the scale can be one: products of two integers are no weights."""
        return self.scale.stored.header.data_type in _FLOATS

    def parameters(self) -> list[Stored]:
        """The initializers of all parameters."""
        spreads = [spread for spread in (self.scale, self.zero_point, self.offset) if spread is not None]
        stored = [spread.stored for spread in spreads] + [index for _, index in self.scale.indices]
        return stored if self.codebook is None else [*stored, self.codebook]


class Matcher:
    """Finds patterns in one scope. A value that no pattern makes is None, never an error: it is just no weight."""

    def __init__(self, scope: Scope, payloads: Payloads) -> None:
        self.scope = scope
        self.payloads = payloads

    def match(self, name: str) -> Pattern | None:
        """The pattern that makes a value, if what the nodes compute is exactly what the IR's decoder does."""
        node = self.scope.node(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear" and node.domain in _DEQUANTIZE_LINEAR_DOMAINS:
            return self.dequantize_linear(node)
        found = self._arithmetic(node)
        return None if found is None or found.is_rounded_early else found

    def dequantize_linear(self, node: Node) -> Pattern | None:
        """The pattern of one DequantizeLinear, if it decodes an initializer with initializers."""
        codes, scale = self.scope.header(node.input(0)), self._stored(node.input(1), _FLOAT32)
        if codes is None:
            return self._fake_quantized(node)
        if scale is None:
            return None
        zero_point = None
        if node.input(2):
            stored = self._zero_point(node.input(2), codes)
            if stored is None:
                return None
            zero_point = Spread(stored)
        return Pattern(Stored(codes), Spread(scale), zero_point, linear=node.integers, value=node.outputs[0])

    def _fake_quantized(self, node: Node) -> Pattern | None:
        """QuantizeLinear and DequantizeLinear of constant floats with the same constant parameters: codes that are
        computed when the model is loaded."""
        rounding = self.scope.producer(node.input(0), "QuantizeLinear")
        floats = self.scope.header(rounding.input(0)) if rounding else None
        same = rounding is not None and rounding.inputs[1:] == node.inputs[1:] and len(node.inputs) == 3
        if rounding is None or floats is None or not same or floats.data_type not in _FLOATS:
            return None
        scale, zero_point = self.scope.header(node.input(1)), self.scope.header(node.input(2))
        if scale is None or zero_point is None:
            return None
        attributes = {"axis": 1, "block_size": 0}
        if any(rounding.integers.get(k, v) != node.integers.get(k, v) for k, v in attributes.items()):
            return None
        dtype = DTYPES.get(zero_point.data_type)
        if dtype is None or zero_point.data_type not in _NARROW_INTEGERS:
            return None
        codes, value = Stored(floats, dtype, is_rounded=True), node.outputs[0]
        return Pattern(codes, Spread(Stored(scale)), Spread(Stored(zero_point)), linear=node.integers, value=value)

    def weight(self, node: Node) -> Pattern | None:
        """The pattern that one node of any model completes: a DequantizeLinear, an operator that takes codes, or the
        Mul of Cast, Sub and Mul on codes of at most a byte (wider integers are as often lengths and indices)."""
        if not node.outputs:
            return None
        if node.op_type == "DequantizeLinear" and node.domain in _DEQUANTIZE_LINEAR_DOMAINS:
            return self.dequantize_linear(node)
        positions = CODES_OPERATORS.get(("" if node.is_standard else node.domain, node.op_type))
        if positions is not None:
            *wanted, axis = positions
            if node.op_type == "QGemm" and node.integers.get("transB", 0):
                axis = 0
            inputs = tuple(node.input(position) for position in wanted)
            return self._of_operator(Node(node.op_type, inputs, ("",), {"axis": axis}))
        if node.is_standard and node.op_type in INTEGER_PRODUCTS:
            return self._of_integer_product(node)
        if node.is_standard and node.op_type == "Mul":
            for inputs in (node.inputs, node.inputs[::-1]):
                found = self._arithmetic(replace(node, inputs=inputs))
                if found and found.codes.header.data_type in _NARROW_INTEGERS and found.has_float_scale:
                    return found
        return None

    def _of_operator(self, node: Node) -> Pattern | None:
        found = self.dequantize_linear(node)
        return found if found and len(found.scale.stored.header.dims) < 2 else None

    def _of_integer_product(self, node: Node) -> Pattern | None:
        """What onnxruntime's quantize_dynamic writes: the product, Cast, and Mul by the product of the activations'
        scale, which DynamicQuantizeLinear computes, and the weight's."""
        codes, zero_point, axis = INTEGER_PRODUCTS[node.op_type]
        scaled = self.scaling(node)
        if scaled is None:
            return None
        inputs = (node.input(codes), scaled[1], node.input(zero_point))
        return self._of_operator(Node(node.op_type, inputs, ("",), {"axis": axis}))

    def scaling(self, node: Node) -> tuple[Node, str] | None:
        """The Mul that scales a product of codes, and the name of the weight's scale; None where there is no such."""
        cast = self._only_taker(node.outputs[0], "Cast")
        scale = self._only_taker(cast.outputs[0], "Mul") if cast is not None else None
        if cast is None or scale is None:
            return None
        for name in scale.inputs:
            factors = self.scope.producer(name, "Mul")
            for factor in factors.inputs if factors is not None and name != cast.outputs[0] else ():
                if self.scope.header(factor) is not None:
                    return scale, factor
        return None

    def _only_taker(self, name: str, op_type: str) -> Node | None:
        """The node that takes a value, if it is the only one in its graph, and this standard operator."""
        takers = self.scope.takers.get(name, [])
        return takers[0] if len(takers) == 1 and takers[0].op_type == op_type and takers[0].is_standard else None

    def _zero_point(self, name: str, codes: TensorHeader) -> Stored | None:
        stored = self._stored(name, codes.data_type)
        if stored is None or self.scope.header(name) is not None:
            return stored
        narrowed = fits(stored.tensor(self.payloads), self.payloads.tensor(codes).dtype)
        return stored if narrowed else None

    def _arithmetic(self, node: Node | None) -> Pattern | None:
        offset = zero_point = None
        in_integers = False
        value = node.outputs[0] if node is not None else ""
        if node is not None and node.op_type == "Add":
            offset = self._spread(node.input(1))
            node = self.scope.producer(node.input(0), "Mul") if offset else None
        if node is None or node.op_type != "Mul":
            return None
        scale, name = self._spread(node.input(1)), node.input(0)
        if scale is None:
            return None
        difference = self.scope.producer(name, "Sub")
        if difference is not None:
            zero_point = self._spread(difference.input(1))
            found = self._values(difference.input(0))
        elif (difference := self._wide_difference(name)) is not None:
            in_integers = True
            zero_point = self._spread(difference.input(1), _INT64)
            codes = self._stored(difference.input(0), _INT64)
            found = None if codes is None else (codes, None)
        else:
            found = self._values(name)
        if found is None or (difference is not None and zero_point is None):
            return None
        codes, codebook = found
        pattern = Pattern(codes, scale, zero_point, offset, codebook, value=value, in_integers=in_integers)
        spreads = [spread for spread in (zero_point, offset) if spread is not None]
        return pattern if all(spread.indices == scale.indices for spread in spreads) else None

    def _wide_difference(self, name: str) -> Node | None:
        cast = self.scope.producer(name, "Cast")
        return self.scope.producer(cast.input(0), "Sub") if cast and cast.integers.get("to") == _FLOAT32 else None

    def _values(self, name: str) -> tuple[Stored, Stored | None] | None:
        """Codes, and the codebook that they are looked up in."""
        stored = self._stored(name, _FLOAT32)
        if stored is not None:
            return stored, None
        gather = self.scope.producer(name, "Gather")
        if gather is None or gather.integers.get("axis", 0) != 0:
            return None
        codebook, codes = self._stored(gather.input(0), _FLOAT32), self._stored(gather.input(1), _INT32)
        return None if codebook is None or codes is None else (codes, codebook)

    def _spread(self, name: str, to: int = _FLOAT32) -> Spread | None:
        indices: list[tuple[int, Stored]] = []
        while (stored := self._stored(name, to)) is None:
            gather = self.scope.producer(name, "Gather")
            index = self._stored(gather.input(1), _INT64) if gather else None
            axis = gather.integers.get("axis", 0) if gather else 0
            if gather is None or index is None or axis in [a for a, _ in indices] or axis < 0:
                return None
            indices.append((axis, index))
            name = gather.input(0)
        return Spread(stored, tuple(indices))

    def _stored(self, name: str, to: int) -> Stored | None:
        """An initializer as it is, cast to ONNX's type `to`, or looked up in a table of a dtype's bit patterns."""
        header = self.scope.header(name)
        if header is not None:
            return Stored(header)
        cast = self.scope.producer(name, "Cast")
        if cast is not None:
            header = self.scope.header(cast.input(0)) if cast.integers.get("to") == to else None
            return Stored(header) if header else None
        gather = self.scope.producer(name, "Gather")
        table = self.scope.header(gather.input(0)) if gather else None
        if gather is None or table is None or table.properties.get(TABLE_DTYPE) != _FLOAT4.name:
            return None
        indices = self.scope.producer(gather.input(1), "Cast")
        header = self.scope.header(indices.input(0)) if indices else None
        return Stored(header, _FLOAT4) if header and self._is_float4_table(table) else None

    def _is_float4_table(self, table: TensorHeader) -> bool:
        values = np.arange(16, dtype=np.uint8).view(_FLOAT4).astype(np.float32)
        tensor = self.payloads.tensor(table)
        is_like = (tensor.dtype, tensor.nbytes) == (values.dtype, values.nbytes)
        return is_like and tensor.packed().tobytes() == values.tobytes()


def quantization(pattern: Pattern, payloads: Payloads, known: Mapping[int, Tensor]) -> Quantization | None:
    """The parameters that a pattern decodes its codes with. `known` gives, by a header's identity, the tensors that
    parameters are already. None where the nodes decode something that is no block structure; raises CorruptFile where
    the parameters' dims contradict the codes'."""
    shape = pattern.codes.header.dims
    group_index = None
    if pattern.linear is not None:
        found = _linear_block_shape(shape, pattern.scale.stored.header.dims, pattern.linear)
        if found is None:
            return None
        block_shape, grid = found, grid_shape(shape, found)
    else:
        grid = _padded(pattern.scale.stored.header.dims, shape)
        if not _spreads_over(grid, shape, pattern):
            return None
        block_shape, group_index = _spread_block_shape(shape, grid, dict(pattern.scale.indices), payloads)

    def parameter(spread: Spread, role: str) -> Tensor:
        if prod(spread.stored.header.dims) != prod(grid):
            raise CorruptFile(
                f"{role} of dims {spread.stored.header.dims} does not fit codes of dims {shape}: {grid} is needed"
            )
        tensor = known.get(id(spread.stored.header))
        return tensor if tensor is not None and tensor.shape == grid else spread.stored.tensor(payloads, grid)

    codebook = None
    if pattern.codebook is not None:
        codebook = known.get(id(pattern.codebook.header)) or pattern.codebook.tensor(payloads)
    return Quantization(
        parameter(pattern.scale, "scale"),
        block_shape,
        parameter(pattern.zero_point, "zero point") if pattern.zero_point else None,
        parameter(pattern.offset, "offset") if pattern.offset else None,
        codebook,
        group_index,
    )


def _linear_block_shape(
    shape: tuple[int, ...], scale: tuple[int, ...], attributes: Mapping[str, int]
) -> tuple[int, ...] | None:
    """DequantizeLinear's three granularities, told apart by the scale's dims (ONNX operators, DequantizeLinear 21)."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    if block < 0:
        raise CorruptFile(f"block_size {block} of its DequantizeLinear: zero or a positive size is needed")
    is_blocked = block > 0 and len(scale) == len(shape) and scale != ()
    if prod(scale) == 1 and not is_blocked:  # exporters write one scale as () and as (1,)
        return per_tensor(shape)
    if not -len(shape) <= axis < len(shape):
        raise CorruptFile(f"axis {axis} of its DequantizeLinear: codes of dims {shape} have no such axis")
    axis %= len(shape)
    if is_blocked:
        block_shape = blocked(shape, axis, block)
    elif len(scale) == 1:
        block_shape = per_axis(shape, axis)
    else:
        raise CorruptFile(f"scale of dims {scale} and block_size {block} do not fit codes of dims {shape}")
    if 0 in shape:
        return block_shape if prod(scale) == prod(grid_shape(shape, block_shape)) else None
    needed = grid_shape(shape, block_shape) if is_blocked else (shape[axis],)
    if scale != needed:
        raise CorruptFile(f"scale of dims {scale} does not fit codes of dims {shape}: {needed} is needed")
    return block_shape


def _spreads_over(grid: tuple[int, ...], shape: tuple[int, ...], pattern: Pattern) -> bool:
    """Whether the arithmetic's parameters are all of one grid that broadcasts, or is spread by indices, to `shape`."""
    if len(grid) != len(shape) or (pattern.scale.indices and len(pattern.scale.stored.header.dims) != len(shape)):
        return False
    spread = [axis for axis, _ in pattern.scale.indices]
    others = [p.stored.header.dims for p in (pattern.zero_point, pattern.offset) if p is not None]
    pairs = enumerate(zip(shape, grid, strict=True))
    fitting = all(count in (1, size) or axis in spread for axis, (size, count) in pairs)
    return fitting and all(axis < len(shape) for axis in spread) and all(_padded(d, grid) == grid for d in others)


def _padded(dims: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(grid) - len(dims)) + dims


def _spread_block_shape(
    shape: tuple[int, ...], grid: tuple[int, ...], indices: Mapping[int, Stored], payloads: Payloads
) -> tuple[tuple[int, ...], GroupIndex | None]:
    block_shape: list[int] = []
    group_index = None
    for axis, (size, count) in enumerate(zip(shape, grid, strict=True)):
        stored = indices.get(axis)
        if stored is None:
            block_shape.append(1 if count == size else max(1, size))
            continue
        index = stored.tensor(payloads)
        block = _block_of(index, stored.header.properties, size, count)
        if block is None:
            block = max(1, _group_size(stored.header.properties, size, count))
            group_index = GroupIndex(axis, index)
        block_shape.append(block)
    return tuple(block_shape), group_index


def _block_of(index: Tensor, properties: Mapping[str, str], size: int, count: int) -> int | None:
    """The block size of an index that numbers blocks one after the other, None of one that assigns groups freely.
    Raises CorruptFile unless it says for each of `size` positions which of `count` groups it belongs to."""
    if index.shape != (size,) or index.dtype.kind not in "iu":
        raise CorruptFile(
            f"index of dims {index.shape} and {index.dtype}: an integer for each of {size} positions is needed"
        )
    groups = index.codes()
    if size and (groups.min() < 0 or groups.max() >= count):
        raise CorruptFile(f"index has groups {groups.min()} to {groups.max()}: there are {count}")
    if GROUP_SIZE in properties or not size:
        return None
    block = max(1, int(np.count_nonzero(groups == 0)))
    return block if np.array_equal(groups, np.arange(size) // block) and count == -(-size // block) else None


def _group_size(properties: Mapping[str, str], size: int, count: int) -> int:
    text = properties.get(GROUP_SIZE, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -(-size // max(1, count))
