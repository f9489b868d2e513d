"""Finds ONNX nodes that decode an initializer: DequantizeLinear, or the arithmetic that `decode_nodes` writes.

A pattern counts only if the nodes compute exactly what the IR's decoder computes. Evaluating the nodes instead, as
constant folding does, would accept any graph, but it gives floats: the codes and their parameters would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT32, INT32, INT64, UINT8
from nibblecast.converters.input.shapes import MOST_DIMENSIONS
from nibblecast.converters.ir import Tensor
from nibblecast.formats.onnx.file.graph import Node, ParsedGraph, TensorHeader
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.file.schema import DTYPES, ELEMENT_TYPES, TABLE_DTYPE
from nibblecast.formats.onnx.weights.operators import CODES_OPERATORS, INTEGER_PRODUCTS
from nibblecast.formats.onnx.writing.decode_nodes import fits, is_wide

_FLOAT32 = ELEMENT_TYPES[FLOAT32].number
_UINT8 = ELEMENT_TYPES[UINT8].number
_INT32 = ELEMENT_TYPES[INT32].number
_INT64 = ELEMENT_TYPES[INT64].number
_NARROW_INTEGERS = frozenset(
    ELEMENT_TYPES[np.dtype(dtype)].number
    for dtype in (np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2)
)
_FLOATS = frozenset(
    ELEMENT_TYPES[np.dtype(dtype)].number for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)
_ROUNDED_TO = _NARROW_INTEGERS | {ELEMENT_TYPES[np.dtype(dtype)].number for dtype in (np.int16, np.uint16)}
#: Operators that only move elements of their first input. One scale for all elements can be applied after them as well.
_MOVES = frozenset({"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_MOST_MOVES = 8
_DEQUANTIZE_LINEAR_DOMAINS = ("", "ai.onnx", "com.microsoft")


class Scope:
    """Resolves the names of a graph: initializers and Constants, and the nodes that make the other values."""

    def __init__(
        self, graph: ParsedGraph, outer: Scope | None, bound: Mapping[str, TensorHeader] | None = None
    ) -> None:
        """`bound` has the initializers that a call of a function passes for its inputs."""
        self.graph = graph
        self.outer = outer
        self.inputs, self.outputs = frozenset(graph.inputs), frozenset(graph.outputs)
        self.headers = {tensor.name: tensor for tensor in graph.initializers} | dict(bound or {})
        self.producers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                self.takers.setdefault(name, []).append(node)
        self.headers |= {node.constant.name: node.constant for node in graph.nodes if node.constant is not None}

    def makes(self, name: str) -> bool:
        """Whether this graph itself makes the value of that name."""
        return name in self.headers or name in self.producers or name in self.inputs

    def home(self, name: str) -> Scope | None:
        """The graph that makes the value of that name: this one, or one around it."""
        scope: Scope | None = self
        while scope is not None and not scope.makes(name):
            scope = scope.outer
        return scope

    def header(self, name: str) -> TensorHeader | None:
        """The initializer or Constant of that name, here or in a graph around this one."""
        home = self.home(name)
        return None if home is None else home.headers.get(name)

    def producer(self, name: str, op_type: str) -> Node | None:
        """The node that makes a value, here or in a graph around this one, if it is the standard operator `op_type`."""
        node = self.node(name)
        return node if node is not None and node.op_type == op_type and node.is_standard else None

    def node(self, name: str) -> Node | None:
        """The node that makes a value, here or in a graph around this one."""
        home = self.home(name)
        return None if home is None else home.producers.get(name)


@dataclass(frozen=True, slots=True)
class InitializerCodes:
    """An initializer and the dtype of its codes. That dtype differs from TensorProto's if the latter is only a carrier
    of the bits, or if floats become codes when the model is loaded (`is_rounded`)."""

    header: TensorHeader
    dtype: np.dtype[Any] | None = None
    is_rounded: bool = False

    def tensor(self, payloads: PayloadTensors, shape: tuple[int, ...] | None = None) -> Tensor:
        """The plain tensor, in another shape of the same size if `shape` is given."""
        tensor = payloads.tensor(self.header, shape)
        if self.dtype is None or self.is_rounded:
            return tensor
        return replace(tensor, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Spread:
    """A parameter, and the axes that have an index from the tensor's positions to those of the parameter."""

    stored: InitializerCodes
    indices: tuple[tuple[int, InitializerCodes], ...] = ()


@dataclass(frozen=True, slots=True)
class Pattern:
    """What the nodes that decode an initializer mean. `linear` has DequantizeLinear's attributes, None for the
    arithmetic. `value` is the name of the decoded value, empty if an operator takes the codes themselves (also one that
    only moves them). `in_integers` says that the arithmetic subtracts zero points before it casts to float32. `grid` is
    the parameters' shape if an operator has another than the scale's dims."""

    codes: InitializerCodes
    scale: Spread
    zero_point: Spread | None = None
    offset: Spread | None = None
    codebook: InitializerCodes | None = None
    linear: Mapping[str, int] | None = None
    value: str = ""
    in_integers: bool = False
    grid: tuple[int, ...] | None = None

    @property
    def is_rounded_early(self) -> bool:
        """Whether codes and zero points are subtracted as float32 although float32 does not hold their integers."""
        if self.zero_point is None or self.codebook is not None or self.linear is not None or self.in_integers:
            return False
        dtypes = [
            stored.dtype or DTYPES.get(stored.header.data_type) for stored in (self.codes, self.zero_point.stored)
        ]
        return is_wide(*(dtype for dtype in dtypes if dtype is not None))

    @property
    def has_float_scale(self) -> bool:
        """Whether the scale is a float. A product of two integers is not a weight."""
        return self.scale.stored.header.data_type in _FLOATS

    def parameters(self) -> list[InitializerCodes]:
        """The initializers of all parameters."""
        spreads = [spread for spread in (self.scale, self.zero_point, self.offset) if spread is not None]
        stored = [spread.stored for spread in spreads] + [index for _, index in self.scale.indices]
        return stored if self.codebook is None else [*stored, self.codebook]


class Matcher:
    """Finds patterns in one scope. A value that no pattern makes gives None, never an error: it is just not a weight.
    With `exact`, patterns must compute in float32; without, any float dtype is taken as if it were float32."""

    def __init__(self, scope: Scope, payloads: PayloadTensors, *, exact: bool = False) -> None:
        self.scope = scope
        self.payloads = payloads
        self.exact = exact

    def match(self, name: str) -> Pattern | None:
        """The pattern that makes a value, if the nodes compute exactly what the IR's decoder computes."""
        node = self.scope.node(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear" and node.domain in _DEQUANTIZE_LINEAR_DOMAINS:
            return self.dequantize_linear(node)
        found = self._arithmetic(node)
        return None if found is None or found.is_rounded_early else found

    def blob(self, name: str) -> TensorHeader | None:
        """The initializer of that name, or one that is only reshaped to it. Packed codes are used by their bytes, so
        their shape does not matter."""
        reshape = self.scope.producer(name, "Reshape")
        return self.scope.header(name if reshape is None else reshape.input(0))

    def dequantize_linear(self, node: Node) -> Pattern | None:
        """The pattern of one DequantizeLinear, if it decodes an initializer with initializers."""
        codes = self.scope.header(node.input(0))
        if codes is None:
            return self._fake_quantized(node) or self._moved(node)
        return self._linear(codes, node)

    def _linear(self, codes: TensorHeader, node: Node) -> Pattern | None:
        scale = self._stored(node.input(1), _FLOAT32)
        if scale is None:
            return None
        zero_point = None
        if node.input(2):
            stored = self._zero_point(node.input(2), codes)
            if stored is None:
                return None
            zero_point = Spread(stored)
        return Pattern(InitializerCodes(codes), Spread(scale), zero_point, linear=node.integers, value=node.outputs[0])

    def _moved(self, node: Node) -> Pattern | None:
        """Codes that are moved (e.g. gathered) before one scale for all of them decodes the result. onnxruntime's
        quantize_dynamic makes this of an embedding."""
        name = node.input(0)
        for _ in range(_MOST_MOVES):
            move = self.scope.node(name)
            if move is None or move.op_type not in _MOVES or not move.is_standard:
                return None
            name = move.input(0)
            codes = self.scope.header(name)
            if codes is not None:
                found = self._linear(codes, replace(node, integers={}))
                dims = [part.header.dims for part in found.parameters()] if found else []
                return replace(found, value="") if found and all(prod(each) == 1 for each in dims) else None
        return None

    def _fake_quantized(self, node: Node) -> Pattern | None:
        """QuantizeLinear and DequantizeLinear of constant floats with the same constant parameters: the codes are
        computed when the model is loaded. Floats that any other node takes stay floats."""
        rounding = self.scope.producer(node.input(0), "QuantizeLinear")
        if rounding is None or any(rounding.input(i) != node.input(i) for i in (1, 2)):
            return None
        name = rounding.input(0)
        floats, scale = self.scope.headers.get(name), self.scope.header(node.input(1))
        is_shared = (
            any(taker is not rounding for taker in self.scope.takers.get(name, ())) or name in self.scope.outputs
        )
        if floats is None or scale is None or floats.data_type not in _FLOATS or is_shared:
            return None
        attributes = {"axis": 1, "block_size": 0}
        if any(rounding.integers.get(k, v) != node.integers.get(k, v) for k, v in attributes.items()):
            return None
        zero_point = self.scope.header(node.input(2)) if node.input(2) else None
        number = zero_point.data_type if zero_point else rounding.integers.get("output_dtype", 0) or _UINT8
        if number not in _ROUNDED_TO or (node.input(2) and zero_point is None):
            return None
        codes, spread = InitializerCodes(floats, DTYPES[number], is_rounded=True), Spread(InitializerCodes(scale))
        zero = Spread(InitializerCodes(zero_point)) if zero_point else None
        return Pattern(codes, spread, zero, linear=node.integers, value=node.outputs[0])

    def weights(self, node: Node) -> Iterator[Pattern]:
        """The patterns that end at a node: a DequantizeLinear, an operator that takes codes, or the Mul of Cast, Sub
        and Mul. For Mul, codes have at most a byte, because wider integers are just as often lengths and indices."""
        if not node.outputs or node.is_parametric:
            return
        found: list[Pattern | None] = []
        if node.op_type == "DequantizeLinear" and node.domain in _DEQUANTIZE_LINEAR_DOMAINS:
            found.append(self.dequantize_linear(node))
        elif node.is_standard and node.op_type in INTEGER_PRODUCTS:
            found.append(self._of_integer_product(node))
        elif node.is_standard and node.op_type == "Mul":
            both = [self._arithmetic(replace(node, inputs=inputs)) for inputs in (node.inputs, node.inputs[::-1])]
            narrow = [p for p in both if p and p.codes.header.data_type in _NARROW_INTEGERS and p.has_float_scale]
            found += narrow[:1]
        else:
            for *positions, axis in CODES_OPERATORS.get(("" if node.is_standard else node.domain, node.op_type), ()):
                along = 0 if node.op_type == "QGemm" and node.integers.get("transB", 0) else axis
                found.append(self._of_operator(node, [node.input(position) for position in positions], along))
        yield from (pattern for pattern in found if pattern is not None)

    def _of_operator(self, node: Node, names: Sequence[str], axis: int) -> Pattern | None:
        """The pattern of codes, scale and zero point that an operator takes. There is one scale, one for each position
        of an axis, or a grid that broadcasts."""
        codes = self.scope.header(names[0])
        inputs = (names[0], names[1], names[2])
        found = self._linear(codes, Node(node.op_type, inputs, ("",), {"axis": axis})) if codes else None
        if codes is None or found is None:
            return None
        shape, dims = codes.dims, max((part.header.dims for part in found.parameters()), key=prod)
        if len(dims) < 2:
            return found
        if node.op_type == "DynamicQuantizeLSTM" and len(shape) == 3 and dims == (shape[0], shape[2]):
            dims = (shape[0], 1, shape[2])
        broadcasts = len(dims) == len(shape) and all(n in (1, size) for n, size in zip(dims, shape, strict=True))
        return replace(found, grid=dims) if broadcasts else None

    def _of_integer_product(self, node: Node) -> Pattern | None:
        """The nodes that onnxruntime's quantize_dynamic writes: the product, Cast, and Mul by the product of two
        scales, the activations' (from DynamicQuantizeLinear) and the weight's."""
        codes, zero_point, axis = INTEGER_PRODUCTS[node.op_type]
        scaled = self.scaling(node)
        if scaled is None:
            return None
        return self._of_operator(node, (node.input(codes), scaled[1], node.input(zero_point)), axis)

    def scaling(self, node: Node) -> tuple[Node, str] | None:
        """The Mul that scales a product of codes, and the name of the weight's scale; None if there is no such Mul."""
        cast = self._only_taker(node.outputs[0], "Cast")
        scale = self._only_taker(cast.outputs[0], "Mul") if cast is not None else None
        if cast is None or scale is None:
            return None
        for name in scale.inputs[:2]:
            factors = self.scope.producer(name, "Mul")
            for factor in factors.inputs[:2] if factors is not None and name != cast.outputs[0] else ():
                if self.scope.header(factor) is not None:
                    return scale, factor
        return None

    def _only_taker(self, name: str, op_type: str) -> Node | None:
        """The node that takes a value, if it is the only one in its graph and is the standard operator `op_type`."""
        takers = self.scope.takers.get(name, [])
        return takers[0] if len(takers) == 1 and takers[0].op_type == op_type and takers[0].is_standard else None

    def _zero_point(self, name: str, codes: TensorHeader) -> InitializerCodes | None:
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
        return self.scope.producer(cast.input(0), "Sub") if cast and self._casts(cast, _FLOAT32) else None

    def _casts(self, cast: Node, to: int) -> bool:
        number = cast.integers.get("to")
        return number == to or (to == _FLOAT32 and not self.exact and number in _FLOATS)

    def _values(self, name: str) -> tuple[InitializerCodes, InitializerCodes | None] | None:
        """The codes, and the codebook that they are looked up in, if any."""
        stored = self._stored(name, _FLOAT32)
        if stored is not None:
            return stored, None
        gather = self.scope.producer(name, "Gather")
        if gather is None or gather.integers.get("axis", 0) != 0:
            return None
        codebook, codes = self._stored(gather.input(0), _FLOAT32), self._stored(gather.input(1), _INT32)
        return None if codebook is None or codes is None else (codes, codebook)

    def _spread(self, name: str, to: int = _FLOAT32) -> Spread | None:
        indices: list[tuple[int, InitializerCodes]] = []
        while (stored := self._stored(name, to)) is None:
            gather = self.scope.producer(name, "Gather")
            index = self._stored(gather.input(1), _INT64) if gather else None
            axis = gather.integers.get("axis", 0) if gather else 0
            known = [other for other, _ in indices]
            if gather is None or index is None or axis in known or not 0 <= axis < MOST_DIMENSIONS:
                return None
            indices.append((axis, index))
            name = gather.input(0)
        return Spread(stored, tuple(indices))

    def _stored(self, name: str, to: int) -> InitializerCodes | None:
        """An initializer that is used unchanged, cast to ONNX's type `to`, or looked up in a table of bit patterns."""
        header = self.scope.header(name)
        if header is not None:
            return InitializerCodes(header)
        cast = self.scope.producer(name, "Cast")
        if cast is not None:
            header = self.scope.header(cast.input(0)) if self._casts(cast, to) else None
            return InitializerCodes(header) if header else None
        gather = self.scope.producer(name, "Gather")
        table = self.scope.header(gather.input(0)) if gather else None
        if gather is None or table is None or table.properties.get(TABLE_DTYPE) != FLOAT4.name:
            return None
        indices = self.scope.producer(gather.input(1), "Cast")
        header = self.scope.header(indices.input(0)) if indices else None
        return InitializerCodes(header, FLOAT4) if header and self._is_float4_table(table) else None

    def _is_float4_table(self, table: TensorHeader) -> bool:
        values = np.arange(16, dtype=np.uint8).view(FLOAT4).astype(np.float32)
        tensor = self.payloads.tensor(table)
        is_like = (tensor.dtype, tensor.nbytes) == (values.dtype, values.nbytes)
        return is_like and tensor.packed().tobytes() == values.tobytes()
