"""Keeps the graph of an ONNX file and changes only the weights that the stages changed.

A dequantized weight becomes a float initializer in the place of the nodes that decoded it. A quantized weight becomes
codes and nodes that decode them. The layout moves codes between DequantizeLinear and com.microsoft's operators.

The alternative was to build a new graph from the changed model, which would have to understand every node. Changes
weight by weight leave the other nodes alone. The same code serves ONNX files and the graphs of other formats' readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT32, UINT8, is_float
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import Tensor
from nibblecast.formats.onnx.file.graph import Node, TensorHeader
from nibblecast.formats.onnx.file.pieces import NewInitializer, as_it_is
from nibblecast.formats.onnx.file.schema import DTYPES, ELEMENT_TYPES
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.options import QuantizedLayout
from nibblecast.formats.onnx.weights.block_operators import MICROSOFT
from nibblecast.formats.onnx.weights.dataflow import Taker
from nibblecast.formats.onnx.weights.patterns import Matcher, Scope
from nibblecast.formats.onnx.writing.decode_nodes import DecodeNodes, Initializer, widened
from nibblecast.formats.onnx.writing.editing import Editor
from nibblecast.formats.onnx.writing.expansions import Fusion, Site, expansion, fusions
from nibblecast.formats.onnx.writing.transposing import Blobs, narrowed, parameters_of, transposed

Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Decoding:
    """Where a weight is decoded: by nodes that make `value` of dtype `dtype`, or by an operator that takes codes, if
    `value` is empty."""

    scope: Scope
    node: Node
    value: str
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """The model's tensor that a weight of the graph is made of, and the function that makes it."""

    tensor: Tensor
    arrange: Make = as_it_is


@dataclass(slots=True)
class GraphChanges:
    """The changes to a graph, weight by weight. `expected` has the tensors that reading the result will give."""

    graph: OnnxGraph
    opset: int
    layout: QuantizedLayout
    editor: Editor
    allowance: Allowance
    expected: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _decodings: dict[int, list[_Decoding]] = field(default_factory=dict)
    _scopes: dict[int, Scope] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: OnnxGraph, opset: int, layout: QuantizedLayout) -> GraphChanges:
        """No changes yet."""
        allowance = graph.payloads.allowance.rest()
        plain = [
            name for name, tensor in graph.tensors.items() if tensor.quantization is None and not tensor.parameter_of
        ]
        editor = Editor.of(graph.parsed, kept=(graph.headers[name] for name in plain))
        changes = cls(graph, opset, layout, editor, allowance, dict(graph.tensors))
        for scope in changes.editor.flow.scopes:
            changes._scopes.update((id(header), scope) for header in scope.headers.values())
            matcher = Matcher(scope, graph.payloads)
            for node in scope.graph.nodes:
                for header, decoding in _decodings(matcher, node):
                    changes._decodings.setdefault(id(header), []).append(decoding)
        return changes

    def apply(self, name: str, tensor: Tensor, owner: Owner | None = None) -> None:
        """Puts `tensor` in the place of the tensor called `name`. `owner` is the tensor whose payload it is made of, by
        default its own. Raises Unsupported if the graph has no place for it."""
        header, before = self.graph.headers[name], self.graph.tensors[name]
        scope = self._scopes[id(header)]
        is_changed = before.data is not tensor.data or before.quantization is not tensor.quantization
        decodings = self._decodings.get(id(header), [])
        weight = _GraphWeight(self, name, tensor, header, scope, decodings, owner or Owner(tensor))
        if before.quantization is None and tensor.quantization is None:
            if is_changed:
                weight.exchange()
        elif tensor.quantization is None:
            weight.fold()
        elif before.quantization is None:
            weight.quantize()
        else:
            weight.move(is_changed)


def _decodings(matcher: Matcher, node: Node) -> Iterator[tuple[TensorHeader, _Decoding]]:
    """The weights whose decoding ends at a node, or whose codes the node takes."""
    scope = matcher.scope
    found = expansion(node)
    header = scope.header(node.input(found.weight)) if found and found.weight >= 0 else None
    if found is not None and header is not None:
        dtype = FLOAT32 if found.scale < 0 else _dtype_of(scope, node.input(found.scale))
        yield header, _Decoding(scope, node, "", dtype)
        return
    for pattern in matcher.weights(node):
        if not pattern.value and found is None:
            continue
        number = node.integers.get("output_dtype", 0)
        dtype = DTYPES.get(number) or _dtype_of(scope, node.input(1), node.input(0))
        yield pattern.codes.header, _Decoding(scope, node, pattern.value, dtype)


def _dtype_of(scope: Scope, *names: str) -> np.dtype[Any]:
    """The dtype of the first of these values that is an initializer of floats or a Cast; float32 if there is none."""
    for name in names:
        header = scope.header(name)
        cast = scope.producer(name, "Cast") if header is None else None
        dtype = DTYPES.get(header.data_type if header else cast.integers.get("to", 0) if cast else 0)
        if dtype is not None and is_float(dtype):
            return dtype
    return FLOAT32


@dataclass(slots=True)
class _GraphWeight:
    """One weight on its way into the graph."""

    changes: GraphChanges
    name: str
    tensor: Tensor
    header: TensorHeader
    scope: Scope
    decodings: Sequence[_Decoding]
    owner: Owner

    def initializer(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], make: Make = as_it_is
    ) -> NewInitializer:
        """An initializer that is made of this weight."""
        owner = self.owner
        return NewInitializer(name, shape, dtype, owner.tensor, lambda stored: make(owner.arrange(stored)))

    @property
    def editor(self) -> Editor:
        return self.changes.editor

    def exchange(self) -> None:
        """Replaces plain values by other plain values."""
        value, dtype = self.header.name, DTYPES[self.header.data_type]
        self.editor.give_away(self.scope, value)
        if dtype == self.tensor.dtype:
            self._store(value, self.tensor)
        else:
            stored = self.editor.names.fresh(f"{value}_{self.tensor.dtype.name}")
            self._store(stored, self.tensor, _cast(stored, value, dtype))

    def fold(self) -> None:
        """Replaces codes, and the nodes that decode them, by floats."""
        stored = self._name_of_codes()
        for decoding in self.decodings:
            if decoding.value:
                self._give(decoding, stored, self.tensor.dtype)
            else:
                self._expand(decoding, stored, self.tensor.dtype, is_turned=False)
        self._store(stored, self.tensor)

    def quantize(self) -> None:
        """Replaces floats by codes and nodes that decode them."""
        value, dtype = self.header.name, DTYPES[self.header.data_type]
        decoding = _Decoding(self.scope, Node("", (), ()), value, dtype)
        if self.changes.layout == "matmulnbits" and not self._fuse([decoding]):
            return
        is_output = self.editor.flow.is_output(self.scope, value)
        self.editor.give_away(self.scope, value)
        decoded = value if is_output else self.editor.names.fresh(f"{value}_dequantized")
        if not is_output:
            self.editor.rename(self.scope, value, decoded)
        stored = self.editor.names.fresh(f"{value}_quantized") if is_output else value
        self._decode(stored, decoded, dtype, self.tensor)

    def move(self, is_changed: bool) -> None:
        """Moves codes to where the layout wants them, or replaces them by other codes."""
        operators = [decoding for decoding in self.decodings if not decoding.value]
        values = [decoding for decoding in self.decodings if decoding.value]
        if self.changes.layout == "matmulnbits":
            values = self._fuse(values)
        if not is_changed:
            values = []
            operators = [one for one in operators if self.changes.layout == "qdq" and self._is_exact(one)]
        turned = [one for one in operators if self._turns(one)]
        straight = [one for one in operators if not self._turns(one)]
        stored = ""
        if straight or values:
            stored = self._name_of_codes()
            self._decode_for(straight, values, stored, self.tensor)
        if turned:
            stored = self.editor.names.fresh(f"{stored}_transposed") if stored else self._name_of_codes()
            self._decode_for(turned, [], stored, transposed(self.tensor))

    def _decode_for(
        self, operators: Sequence[_Decoding], values: Sequence[_Decoding], stored: str, tensor: Tensor
    ) -> None:
        """Adds codes called `stored`, and makes all takers of the weight take the decoded codes."""
        dtype = (*operators, *values)[0].dtype
        decoded = self.editor.names.fresh(f"{stored}_dequantized")
        for decoding in operators:
            self._expand(decoding, decoded, dtype, is_turned=tensor is not self.tensor)
        for decoding in values:
            self._give(decoding, decoded, dtype)
        self._decode(stored, decoded, dtype, tensor)

    def _name_of_codes(self) -> str:
        """The initializer's name, to use for its replacement. Raises Unsupported if nodes take it that do not decode
        it."""
        known = {id(decoding.node): True for decoding in self.decodings}
        others = [each for each in self.editor.left(self.scope, self.header.name) if not self._leads_to(each, known)]
        if others or self.editor.flow.is_output(self.scope, self.header.name):
            what = others[0].node.op_type if others else "output"
            raise Unsupported(
                f"its codes are also taken by a {what} that does not decode them, and would be left without: "
                "leave it as it is with --skip",
                tensor=self.name,
            )
        self.editor.give_away(self.scope, self.header.name)
        return self.header.name

    def _leads_to(self, taker: Taker, known: dict[int, bool]) -> bool:
        """Whether a node (Cast, Sub) leads only to nodes that decode the weight, which are `known`. Results are added
        to `known`, because several nodes may share the rest of a long chain."""
        passed = []
        while id(taker.node) not in known:
            known[id(taker.node)] = False  # ends the recursion in a damaged graph with a cycle
            passed.append(taker.node)
            following = [each for name in taker.node.outputs for each in self.editor.flow.takers_of(taker.scope, name)]
            if len(following) != 1:
                break
            taker = following[0]
        leads = known[id(taker.node)]
        known.update((id(node), leads) for node in passed)
        return leads

    def _is_exact(self, decoding: _Decoding) -> bool:
        found = expansion(decoding.node)
        return found is not None and found.is_exact

    def _turns(self, decoding: _Decoding) -> bool:
        found = expansion(decoding.node)
        return found is not None and found.transposes

    def _store(self, stored: str, tensor: Tensor, *nodes: Node) -> None:
        """Adds an initializer called `stored`, and nodes that take only this."""
        self.editor.add(self.scope, [self.initializer(stored, tensor.shape, tensor.dtype)], nodes)
        self.expect(stored, tensor)

    def expect(self, stored: str, tensor: Tensor) -> None:
        """Notes the tensor that reading the result gives for an initializer."""
        if stored == self.header.name:
            self.changes.expected[self.name] = tensor
        else:
            self.changes.expected.pop(self.name, None)
            self.changes.expected[stored] = replace(tensor, name=stored)

    def _give(self, decoding: _Decoding, stored: str, dtype: np.dtype[Any]) -> None:
        """Makes all takers of a decoded value take `stored`, of dtype `dtype`, instead."""
        scope, value = decoding.scope, decoding.value
        if dtype != decoding.dtype:
            self.editor.replace(scope, decoding.node, _cast(stored, value, decoding.dtype))
        elif self.editor.flow.is_output(scope, value):
            identity = () if stored == value else (Node("Identity", (stored,), (value,)),)
            self.editor.replace(scope, decoding.node, *identity)
        else:
            self.editor.rename(scope, value, stored)

    def _expand(self, decoding: _Decoding, decoded: str, dtype: np.dtype[Any], *, is_turned: bool) -> None:
        """Expands an operator that takes codes into operators that take the decoded weight."""
        found = expansion(decoding.node)
        if found is None:
            return
        payloads = self.changes.graph.payloads
        site = Site(Matcher(decoding.scope, payloads), decoding.node, payloads.view, self.editor.names)
        before: list[Node] = []
        if found.transposes and not is_turned:
            turned = site.fresh("weight")
            before.append(Node("Transpose", (decoded,), (turned,)))
            decoded = turned
        if dtype != decoding.dtype:
            rounded = site.fresh("weight_cast")
            before.append(_cast(decoded, rounded, decoding.dtype))
            decoded = rounded
        nodes, target = found.nodes(site, decoded), found.target(site)
        if not nodes or target is None:
            raise Unsupported(
                f"is taken by a {decoding.node.op_type} that has no like among ONNX's own operators: "
                "leave it as it is with --skip",
                tensor=self.name,
            )
        self.editor.replace(decoding.scope, target, *before, *nodes)

    def _decode(self, stored: str, value: str, dtype: np.dtype[Any], tensor: Tensor) -> None:
        """Adds the codes of `tensor`, called `stored`, and the nodes that decode them to `value`."""
        is_turned, tensor = tensor is not self.tensor, narrowed(tensor)
        lowering = DecodeNodes(self.changes.opset, self.editor.names, {}, self.changes.allowance)
        if tensor.quantization is None:
            return
        initializers = lowering.lower(tensor, tensor.quantization, value, dtype)
        renamed = {one.name: stored for one in initializers if one.role == "codes"}
        added = [self._initializer(one, renamed.get(one.name, one.name), is_turned) for one in initializers]
        constants = lowering.constants.values()
        added += [NewInitializer.of(one.name, Tensor.from_array(one.name, one.values)) for one in constants]
        nodes = [replace(n, inputs=tuple(renamed.get(i, i) for i in n.inputs)) for n in lowering.nodes]
        self.editor.add(self.scope, added, nodes)
        self.expect(stored, tensor)

    def _initializer(self, one: Initializer, name: str, is_turned: bool) -> NewInitializer:
        def make(stored: Tensor) -> Tensor:
            turned = narrowed(transposed(stored) if is_turned else stored)
            part = turned if one.role == "codes" else dict(parameters_of(turned))[one.role]
            return widened(part, one.dtype)

        return replace(self.initializer(name, one.dims, one.dtype, make), properties=one.properties)

    def _fuse(self, decodings: Sequence[_Decoding]) -> list[_Decoding]:
        """Makes com.microsoft's operators take the codes wherever they can; returns the decodings that are still
        needed."""
        groups = _FusionGroups(self)
        rest = [decoding for decoding in decodings if not groups.take(decoding)]
        groups.write(is_whole=not rest)
        return rest


def _cast(name: str, output: str, dtype: np.dtype[Any]) -> Node:
    return Node("Cast", (name,), (output,), {"to": ELEMENT_TYPES[dtype].number})


@dataclass(slots=True)
class _FusionGroups:
    """The operators that will take a weight's codes, in separate groups for plain and transposed weights."""

    weight: _GraphWeight
    fused: list[tuple[_Decoding, Fusion, Blobs]] = field(default_factory=list)
    made: dict[tuple[bool, str], Blobs | None] = field(default_factory=dict)

    def take(self, decoding: _Decoding) -> bool:
        """Notes the fusions of the nodes that take a decoded value; returns whether they are all of its takers."""
        flow = self.weight.editor.flow
        complete = not flow.is_output(decoding.scope, decoding.value)
        for taker in flow.takers_of(decoding.scope, decoding.value):
            found = fusions(flow, taker, len(self.weight.tensor.shape)) or []
            blobs = [self._blobs(each) for each in found]
            fitting = [(each, blob) for each, blob in zip(found, blobs, strict=True) if blob is not None]
            if fitting and len(fitting) == len(blobs):
                self.fused += [(decoding, each, blob) for each, blob in fitting]
            else:
                complete = False
        return complete

    def _blobs(self, fusion: Fusion) -> Blobs | None:
        key = (fusion.transposes, fusion.operator)
        if key not in self.made:  # this reads zero points, so it is done once and not for each operator
            turned = transposed(self.weight.tensor) if fusion.transposes else self.weight.tensor
            blobs = Blobs.of(turned)
            # its data have no room for padding in the last block
            is_ragged = blobs is not None and turned.shape[1] % blobs.block_size
            self.made[key] = None if fusion.operator == "GatherBlockQuantized" and is_ragged else blobs
        return self.made[key]

    def write(self, *, is_whole: bool) -> None:
        """Adds the blobs and replaces the nodes by the operators. If `is_whole`, nothing else takes the codes, and the
        first blobs get their name."""
        weight = self.weight
        stored: dict[tuple[bool, str], tuple[str, ...]] = {}
        for decoding, fusion, blobs in self.fused:
            key = (fusion.transposes, fusion.operator)
            if key not in stored:
                name = weight.header.name
                if is_whole and not stored:
                    weight.editor.give_away(weight.scope, name)
                else:
                    name = weight.editor.names.fresh(f"{name}_Q{blobs.bits}")
                stored[key] = self._add(blobs, name, decoding.dtype, fusion)
                read = replace(blobs.weight, name=name)
                weight.changes.expected[weight.name if name == weight.header.name else name] = read
            self._operator(fusion, blobs, stored[key])
        if self.fused:
            weight.editor.domains.add(MICROSOFT)

    def _add(self, blobs: Blobs, name: str, dtype: np.dtype[Any], fusion: Fusion) -> tuple[str, ...]:
        weight, names = self.weight, self.weight.editor.names

        def blobs_of(tensor: Tensor) -> Blobs:
            return blobs.like(transposed(tensor) if fusion.transposes else tensor)

        shape = blobs.shape if fusion.operator == "MatMulNBits" else (blobs.shape[0], blobs.shape[1] * blobs.shape[2])
        grid = blobs.shape[:2]
        initializers = [
            weight.initializer(name, shape, UINT8, lambda tensor: blobs_of(tensor).codes()),
            weight.initializer(
                names.fresh(f"{weight.name}_scales"), grid, dtype, lambda tensor: blobs_of(tensor).scales(dtype)
            ),
        ]
        if blobs.has_zero_points:
            packed = (grid[0], packed_size(grid[1], blobs.bits))
            zero_points = names.fresh(f"{weight.name}_zero_points")
            made = weight.initializer(zero_points, packed, UINT8, lambda tensor: blobs_of(tensor).zero_points())
            initializers.append(made)
        weight.editor.add(weight.scope, initializers)
        return tuple(new.name for new in initializers)

    def _operator(self, fusion: Fusion, blobs: Blobs, stored: tuple[str, ...]) -> None:
        editor, node, scope = self.weight.editor, fusion.taker.node, fusion.taker.scope
        rows, columns = blobs.weight.shape
        attributes = {"bits": blobs.bits, "block_size": blobs.block_size}
        if fusion.operator == "GatherBlockQuantized":
            inputs, attributes = (stored[0], node.input(1), *stored[1:]), attributes | {"quantize_axis": 1}
            gather = Node(fusion.operator, inputs, node.outputs, attributes, MICROSOFT, name=node.name)
            editor.replace(scope, node, gather)
            return
        result = editor.names.fresh(f"{node.outputs[0]}_product") if fusion.bias else node.outputs[0]
        attributes = {"K": columns, "N": rows, **attributes}
        product = Node(fusion.operator, (node.input(0), *stored), (result,), attributes, MICROSOFT, name=node.name)
        add = (Node("Add", (result, fusion.bias), node.outputs),) if fusion.bias else ()
        editor.replace(scope, node, product, *add)
