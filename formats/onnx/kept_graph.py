"""The graph of an ONNX file: kept as it is, and written with those of its weights changed that the stages changed.

A weight that was dequantized becomes a float initializer in the place of what decoded it; one that was quantized, codes
and what decodes them; the layout moves codes between DequantizeLinear and com.microsoft's operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from converters.errors import Unsupported
from converters.ir import Tensor
from formats.onnx.editing import Editor
from formats.onnx.graph import Node, ParsedModel, TensorHeader
from formats.onnx.lifting import Matcher, Scope
from formats.onnx.lowering import Initializer, Lowering
from formats.onnx.operators import MICROSOFT, Expansion, Fusion, Site, expansion, fusions
from formats.onnx.payload import Payloads
from formats.onnx.repacking import Blobs, fitting_block_size, transposed
from formats.onnx.rewriting import NewInitializer
from formats.onnx.schema import DTYPES, ELEMENT_TYPES

if TYPE_CHECKING:
    import onnx_ir

QuantizedLayout = Literal["", "qdq", "matmulnbits"]

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class OnnxGraph:
    """The file that a model was read from. `tensors` are the model's as they were read, `headers` the initializers
    that they are, both by the tensors' names."""

    parsed: ParsedModel
    payloads: Payloads
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, TensorHeader]

    def onnx_ir(self) -> onnx_ir.Model:
        """The graph with onnx_ir's classes. Raises ImportError where onnx_ir is not installed."""
        import onnx_ir

        return onnx_ir.load(self.payloads.file.path)


@dataclass(frozen=True, slots=True, eq=False)
class _Decoding:
    """Where a weight is decoded: the nodes that make `value` of dtype `dtype`, or, where `value` is empty, an operator
    that takes codes."""

    scope: Scope
    node: Node
    value: str
    dtype: np.dtype[Any]


@dataclass(slots=True)
class GraphChanges:
    """The changes to a graph, weight by weight; `expected` is what reading the result will give."""

    graph: OnnxGraph
    opset: int
    layout: QuantizedLayout
    editor: Editor
    expected: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _decodings: dict[int, list[_Decoding]] = field(default_factory=dict)
    _scopes: dict[int, Scope] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: OnnxGraph, opset: int, layout: QuantizedLayout) -> GraphChanges:
        """No changes yet."""
        changes = cls(graph, opset, layout, Editor.of(graph.parsed), dict(graph.tensors))
        for scope in changes.editor.flow.scopes:
            changes._scopes.update((id(header), scope) for header in scope.headers.values())
            matcher = Matcher(scope, graph.payloads)
            for node in scope.graph.nodes:
                for header, decoding in _decodings(matcher, node):
                    changes._decodings.setdefault(id(header), []).append(decoding)
        return changes

    def apply(self, name: str, tensor: Tensor) -> None:
        """What the tensor called `name` has become. Raises Unsupported where the graph has no place for it."""
        header, before = self.graph.headers[name], self.graph.tensors[name]
        scope = self._scopes[id(header)]
        is_changed = before.data is not tensor.data or before.quantization is not tensor.quantization
        weight = _Weight(self, name, tensor, header, scope, self._decodings.get(id(header), []))
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
    """The weight that a node completes the decoding of, or takes the codes of."""
    scope = matcher.scope
    found = expansion(node)
    header = scope.header(node.input(found.weight)) if found else None
    if found is not None and header is not None:
        yield header, _Decoding(scope, node, "", _dtype_of(scope, node.input(found.scale)))
        return
    pattern = matcher.weight(node)
    if pattern is not None and pattern.value:
        number = node.integers.get("output_dtype", 0)
        linear = node.op_type == "DequantizeLinear"
        dtype = DTYPES.get(number) or (_dtype_of(scope, node.input(1)) if linear else _FLOAT32)
        yield pattern.codes.header, _Decoding(scope, node, pattern.value, dtype)


def _dtype_of(scope: Scope, name: str) -> np.dtype[Any]:
    """The dtype of a value that is an initializer, or a Cast of one; float32 for all others."""
    header = scope.header(name)
    cast = scope.producer(name, "Cast") if header is None else None
    number = header.data_type if header else cast.integers.get("to", 0) if cast else 0
    return DTYPES.get(number, _FLOAT32)


@dataclass(slots=True)
class _Weight:
    """One weight on its way into the graph."""

    changes: GraphChanges
    name: str
    tensor: Tensor
    header: TensorHeader
    scope: Scope
    decodings: Sequence[_Decoding]

    @property
    def editor(self) -> Editor:
        return self.changes.editor

    def exchange(self) -> None:
        """Other plain values in the place of plain values."""
        value = self.header.name
        self.editor.drop(self.scope, value)
        dtype = DTYPES[self.header.data_type]
        if dtype == self.tensor.dtype:
            self._add(self.scope, NewInitializer(value, self.tensor, self.name))
        else:
            stored = self.editor.names.fresh(f"{value}_{self.tensor.dtype.name}")
            cast = Node("Cast", (stored,), (value,), {"to": ELEMENT_TYPES[dtype].number})
            self._add(self.scope, NewInitializer(stored, self.tensor, self.name), cast)
            self._expect(stored, self.tensor)
            return
        self._expect(value, self.tensor)

    def fold(self) -> None:
        """Floats in the place of codes and of what decodes them."""
        stored = self._stored_name()
        for decoding in self.decodings:
            if decoding.value:
                self._give(decoding, stored, self.tensor.dtype)
            else:
                self._expand(decoding, stored, self.tensor.dtype, is_transposed=False)
        self._refuse_other_takers()
        self._add(self.scope, NewInitializer(stored, self.tensor, self.name))
        self._expect(stored, self.tensor)

    def quantize(self) -> None:
        """Codes and what decodes them in the place of floats."""
        value, dtype = self.header.name, DTYPES[self.header.data_type]
        decoding = _Decoding(self.scope, Node("", (), ()), value, dtype)
        rest = self._fuse([decoding]) if self.changes.layout == "matmulnbits" else [decoding]
        if not rest:
            return
        if self.editor.flow.is_output(self.scope, value):
            self.editor.drop(self.scope, value)
            self._decode(self.scope, self.editor.names.fresh(f"{value}_quantized"), value, dtype)
        else:
            decoded = self.editor.names.fresh(f"{value}_dequantized")
            self.editor.rename(self.scope, value, decoded)
            self._decode(self.scope, value, decoded, dtype)

    def move(self, is_changed: bool) -> None:
        """Codes to where the layout wants them, or other codes."""
        operators = [decoding for decoding in self.decodings if not decoding.value]
        values = [decoding for decoding in self.decodings if decoding.value]
        if self.changes.layout == "matmulnbits" and values:
            rest = self._fuse(values)
            if rest and not is_changed:
                return
            values = rest if is_changed else []
        elif self.changes.layout != "qdq" and not is_changed:
            return
        elif not is_changed:
            values = []
        if not values and not (operators and (is_changed or self.changes.layout == "qdq")):
            return
        self._decode_anew(values, operators)

    def _decode_anew(self, values: Sequence[_Decoding], operators: Sequence[_Decoding]) -> None:
        turned = [one for one in operators if self._turns(one)]
        straight = [one for one in operators if not self._turns(one)]
        for decodings, is_turned in ((straight, False), (turned, True)):
            if not decodings and not (values and not is_turned):
                continue
            tensor = transposed(self.tensor) if is_turned else self.tensor
            stored = self._stored_name()
            decoded = self.editor.names.fresh(f"{stored}_dequantized")
            dtype = decodings[0].dtype if decodings else values[0].dtype
            for decoding in decodings:
                self._expand(decoding, decoded, dtype, is_transposed=is_turned)
            for decoding in () if is_turned else values:
                self._give(decoding, decoded, dtype)
            self._refuse_other_takers()
            self._decode(self.scope, stored, decoded, dtype, tensor, transposed if is_turned else None)

    def _turns(self, decoding: _Decoding) -> bool:
        found = expansion(decoding.node)
        return found is not None and found.transposes

    def _stored_name(self) -> str:
        """The tensor's own name, for the initializer; another one where nodes give that name to a value."""
        taken = self.name != self.header.name and self.name in self.editor.names.taken
        return self.header.name if taken else self.name

    def _expect(self, stored: str, tensor: Tensor) -> None:
        if stored not in (self.name, self.header.name):
            del self.changes.expected[self.name]
            self.changes.expected[stored] = replace(tensor, name=stored)
        else:
            self.changes.expected[self.name] = tensor

    def _add(self, scope: Scope, new: NewInitializer, *nodes: Node) -> None:
        self.editor.add(scope, [new], nodes)

    def _give(self, decoding: _Decoding, stored: str, dtype: np.dtype[Any]) -> None:
        """Has what takes a decoded value take `stored`, of this dtype, instead."""
        scope, value = decoding.scope, decoding.value
        if dtype != decoding.dtype:
            cast = Node("Cast", (stored,), (value,), {"to": ELEMENT_TYPES[decoding.dtype].number})
            self.editor.replace(scope, decoding.node, cast)
        elif self.editor.flow.is_output(scope, value):
            identity = () if stored == value else (Node("Identity", (stored,), (value,)),)
            self.editor.replace(scope, decoding.node, *identity)
        else:
            self.editor.rename(scope, value, stored)

    def _expand(self, decoding: _Decoding, decoded: str, dtype: np.dtype[Any], *, is_transposed: bool) -> None:
        """Spells out an operator that takes codes, for the decoded weight."""
        found = expansion(decoding.node)
        assert found is not None
        site = Site(decoding.scope, decoding.node, self.changes.graph.payloads.view, self.editor.names)
        before: list[Node] = []
        if found.transposes and not is_transposed:
            turned = site.fresh("weight")
            before.append(Node("Transpose", (decoded,), (turned,), lists={"perm": (1, 0)}))
            decoded = turned
        if dtype != decoding.dtype:
            cast = site.fresh("weight_cast")
            before.append(Node("Cast", (decoded,), (cast,), {"to": ELEMENT_TYPES[decoding.dtype].number}))
            decoded = cast
        nodes = found.nodes(site, decoded)
        if not nodes:
            raise Unsupported(
                f"is taken by a {decoding.node.op_type} that has no like among ONNX's own operators: "
                "leave it as it is with --skip",
                tensor=self.name,
            )
        self.editor.replace(decoding.scope, decoding.node, *before, *nodes)

    def _refuse_other_takers(self) -> None:
        """Raises Unsupported when something still takes the codes."""
        if id(self.header) not in self.editor.edit(self.scope).dropped:
            raise Unsupported(
                "its codes are also taken by nodes that do not decode them, which would be left without: "
                "leave it as it is with --skip",
                tensor=self.name,
            )

    def _decode(
        self,
        scope: Scope,
        stored: str,
        value: str,
        dtype: np.dtype[Any],
        tensor: Tensor | None = None,
        make: Any = None,
    ) -> None:
        """Adds codes called `stored`, and the nodes that make `value` of them."""
        tensor = self.tensor if tensor is None else tensor
        quantization = tensor.quantization
        assert quantization is not None
        names = self.editor.names
        lowering = Lowering(self.changes.opset, names, {})
        initializers = lowering.lower(tensor, quantization, value, dtype)
        renamed = {one.name: stored for one in initializers if one.role == "codes"}
        added = [self._initializer(one, renamed.get(one.name, one.name), tensor, make) for one in initializers]
        for constant in lowering.constants.values():
            added.append(NewInitializer(constant.name, Tensor.from_array(constant.name, constant.values)))
        nodes = [replace(n, inputs=tuple(renamed.get(i, i) for i in n.inputs)) for n in lowering.nodes]
        self.editor.add(scope, added, nodes)
        self._expect(stored, tensor)

    def _initializer(self, one: Initializer, name: str, tensor: Tensor, make: Any) -> NewInitializer:
        if one.role == "codes":
            return NewInitializer(name, tensor, self.name, make, one.properties)
        assert tensor.quantization is not None
        parameter = dict(tensor.quantization.parameters())[one.role]
        shaped = Tensor(name, one.dims, one.dtype, parameter.data)
        return NewInitializer(name, shaped, properties=one.properties)

    def _fuse(self, decodings: Sequence[_Decoding]) -> list[_Decoding]:
        """Has com.microsoft's operators take the codes, wherever they can; returns the decodings that are still
        needed."""
        groups = _FusionGroups(self)
        rest = [decoding for decoding in decodings if not groups.take(decoding)]
        groups.write(is_whole=not rest)
        return rest


@dataclass(slots=True)
class _FusionGroups:
    """The operators that take a weight's codes from now on, apart for those that want it transposed."""

    weight: _Weight
    fused: list[tuple[_Decoding, Fusion]] = field(default_factory=list)

    def take(self, decoding: _Decoding) -> bool:
        """Notes the fusions of all that takes a decoded value; returns whether nothing else takes it."""
        flow, weight = self.weight.editor.flow, self.weight
        takers = flow.takers_of(decoding.scope, decoding.value)
        rank = len(weight.tensor.shape)
        complete = not flow.is_output(decoding.scope, decoding.value)
        for taker in takers:
            found = fusions(flow, taker, rank)
            fitting = found is not None and all(self._fits(each) for each in found)
            if found is not None and fitting:
                self.fused += [(decoding, each) for each in found]
            complete = complete and fitting
        return complete

    def _fits(self, fusion: Fusion) -> bool:
        return self._blobs(fusion) is not None

    def _blobs(self, fusion: Fusion) -> Blobs | None:
        tensor = self.weight.tensor
        turned = transposed(tensor) if fusion.transposes else tensor
        size = fitting_block_size(turned)
        return None if size is None else Blobs(turned, size)

    def write(self, *, is_whole: bool) -> None:
        """Adds the blobs and puts the operators in the place of the nodes."""
        weight, names = self.weight, self.weight.editor.names
        stored: dict[tuple[bool, str], tuple[str, ...]] = {}
        kinds = {(fusion.transposes, fusion.operator) for _, fusion in self.fused}
        for decoding, fusion in self.fused:
            blobs = self._blobs(fusion)
            assert blobs is not None
            key = (fusion.transposes, fusion.operator)
            if key not in stored:
                own = is_whole and len(kinds) == 1
                name = weight._stored_name() if own else names.fresh(f"{weight.name}_Q{blobs.bits}")
                stored[key] = self._add(blobs, name, decoding.dtype, fusion)
                if own:
                    weight._expect(name, blobs.weight)
                else:
                    weight.changes.expected[name] = replace(blobs.weight, name=name)
            self._operator(fusion, blobs, stored[key])
        if self.fused:
            weight.editor.domains.add(MICROSOFT)

    def _add(self, blobs: Blobs, name: str, dtype: np.dtype[Any], fusion: Fusion) -> tuple[str, ...]:
        weight, names = self.weight, self.weight.editor.names
        make = (lambda t: blobs.codes(transposed(t))) if fusion.transposes else blobs.codes
        codes = blobs.codes(blobs.weight)
        scales, zero_points = blobs.scales(blobs.weight, dtype), blobs.zero_points(blobs.weight)
        if fusion.operator == "GatherBlockQuantized":
            codes = replace(codes, shape=(codes.shape[0], codes.shape[1] * codes.shape[2]))
        added = [NewInitializer(name, codes, weight.name, make)]
        added.append(NewInitializer(names.fresh(f"{weight.name}_scales"), scales))
        if zero_points is not None:
            added.append(NewInitializer(names.fresh(f"{weight.name}_zero_points"), zero_points))
        weight.editor.add(weight.scope, added)
        return tuple(new.name for new in added)

    def _operator(self, fusion: Fusion, blobs: Blobs, stored: tuple[str, ...]) -> None:
        editor, node, scope = self.weight.editor, fusion.taker.node, fusion.taker.scope
        rows, columns = blobs.weight.shape
        attributes = {"bits": blobs.bits, "block_size": blobs.block_size}
        if fusion.operator == "GatherBlockQuantized":
            inputs = (stored[0], node.input(1), *stored[1:])
            attributes |= {"gather_axis": 0, "quantize_axis": 1}
            editor.replace(
                scope, node, Node(fusion.operator, inputs, node.outputs, attributes, MICROSOFT, name=node.name)
            )
            return
        result = editor.names.fresh(f"{node.outputs[0]}_product") if fusion.bias else node.outputs[0]
        attributes = {"K": columns, "N": rows, **attributes}
        product = Node(fusion.operator, (node.input(0), *stored), (result,), attributes, MICROSOFT, name=node.name)
        add = (Node("Add", (result, fusion.bias), node.outputs),) if fusion.bias else ()
        editor.replace(scope, node, product, *add)


__all__ = ["Expansion", "GraphChanges", "OnnxGraph"]
