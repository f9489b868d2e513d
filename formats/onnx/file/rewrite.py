"""An ONNX file -> the same file with some nodes and initializers changed, as pieces that are written in turn.

Everything else is copied byte for byte, including fields that this code does not know. Payloads stay where they are
until they are written. External data of several files end up in one file.

The file is rewritten as bytes and not as objects. onnx's protobuf objects hold all payloads in memory and end at 2 GiB.
onnx_ir's classes drop fields that they do not know. With ranges of bytes, everything that is not changed comes out
exactly as it was, and the payloads are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import Node, ParsedGraph, ParsedModel, TensorHeader
from nibblecast.formats.onnx.file.parse import tensor_header
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.file.pieces import ExternalData, NewInitializer, Payload, Pieces
from nibblecast.formats.onnx.file.serialize import encode_node
from nibblecast.formats.onnx.file.wire import Range, bytes_head, decode, encode, raw_fields

_PAYLOAD_FIELDS = frozenset(
    schema.TENSOR.fields[name].number
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data")
) | {schema.TENSOR.fields["external_data"].number, schema.TENSOR.fields["data_location"].number}


@dataclass(slots=True)
class GraphEdit:
    """The changes to one graph. `replaced` maps nodes (by identity) to the nodes that take their place, perhaps none.
    `first` are new nodes before all others; they take no values of the file. `dropped` are initializers (by identity)
    to remove, `added` new ones. `renamed` has new names for values that nodes of the file take."""

    replaced: dict[int, tuple[Node, ...]] = field(default_factory=dict)
    first: list[Node] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    added: list[NewInitializer] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Everything that is needed to write the file with its changes."""

    parsed: ParsedModel
    payloads: PayloadTensors
    edits: Mapping[int, GraphEdit]
    external: ExternalData
    weights: Set[int]
    """The identities of headers that are tensors of the model."""
    opsets: Mapping[str, int]
    """Operator sets that the file will have, by domain. Other operator sets of the file stay."""
    ir_version: int
    allowance: Allowance
    """The memory that repeated external data of attributes may take; these are not tensors of the model."""

    @property
    def view(self) -> memoryview:
        return self.payloads.view

    def model(self) -> Pieces:
        """The whole file."""
        out, opsets = Pieces(), dict(self.opsets)
        functions = iter(self.parsed.functions)
        for number, start, content in raw_fields(self.view, Range(0, len(self.view))):
            if number == _MODEL["graph"]:
                out.message(number, self._graph(content, self.parsed.graph, None))
            elif number == _MODEL["functions"]:
                out.message(number, self._function(content, next(functions)))
            elif number == _MODEL["training_info"]:
                out.message(number, self._training(content))
            elif number == _MODEL["opset_import"]:
                self._opset(out, start, content, opsets)
            elif number == _MODEL["ir_version"]:
                out.add(encode(schema.MODEL, ir_version=self.ir_version))
            else:
                out.add(Range(start, content.stop))
        for domain, version in opsets.items():
            out.add(_opset_import(_MODEL["opset_import"], domain, version))
        return out

    def _opset(self, out: Pieces, start: int, content: Range, opsets: dict[str, int]) -> None:
        domain = next((text for number, text in self._texts(content) if number == 1), "")
        wanted = opsets.pop("" if domain == "ai.onnx" else domain, None)
        if wanted is None:
            out.add(Range(start, content.stop))
        else:
            out.add(_opset_import(_MODEL["opset_import"], domain, wanted))

    def _graph(self, where: Range, graph: ParsedGraph | None, renamed: _Renamed | None) -> Pieces:
        """A GraphProto; `renamed` has the values of outer graphs that have new names."""
        edit = GraphEdit() if graph is None else self.edits.get(id(graph), GraphEdit())
        out, renamed = Pieces(), _Renamed.inside(renamed, graph, edit)
        dropped = set(edit.dropped.values())
        nodes = iter(() if graph is None else graph.nodes)
        headers = iter(() if graph is None else graph.initializers)
        begun = False
        for number, start, content in raw_fields(self.view, where):
            if number == _GRAPH["node"]:
                if not begun:
                    begun = True
                    self._new_nodes(out, _GRAPH["node"], edit.first)
                self._node(out, _GRAPH["node"], start, content, next(nodes, None), edit, renamed)
            elif number == _GRAPH["initializer"]:
                header = next(headers, None) or tensor_header(self.view, content)
                if id(header) not in edit.dropped:
                    out.message(number, self._tensor(content, header))
            elif number in (_GRAPH["input"], _GRAPH["value_info"]) and self._name(content) in dropped:
                continue  # before IR version 4, initializers are inputs too
            else:
                if number == _GRAPH["sparse_initializer"]:
                    self._refuse_external_sparse(content)
                out.add(Range(start, content.stop))
        if not begun:
            self._new_nodes(out, _GRAPH["node"], edit.first)
        for new in edit.added:
            out.message(_GRAPH["initializer"], self.external.tensor(new))
        return out

    def _function(self, where: Range, graph: ParsedGraph) -> Pieces:
        """A FunctionProto. It cannot have initializers, so Constants take their place."""
        edit = self.edits.get(id(graph), GraphEdit())
        out, renamed = Pieces(), _Renamed.inside(None, graph, edit)
        nodes = iter(graph.nodes)
        opsets = dict(self.opsets) if edit.replaced or edit.first else {}
        begun = False
        for number, start, content in raw_fields(self.view, where):
            if number == _FUNCTION["node"]:
                if not begun:
                    begun = True
                    self._new_constants(out, edit)
                    self._new_nodes(out, number, edit.first)
                self._node(out, number, start, content, next(nodes), edit, renamed)
            elif number == _FUNCTION["opset_import"] and opsets:
                domain = next((text for field, text in self._texts(content) if field == 1), "")
                opsets.pop("" if domain == "ai.onnx" else domain, None)
                out.add(Range(start, content.stop))
            else:
                out.add(Range(start, content.stop))
        for domain, version in opsets.items():
            out.add(_opset_import(_FUNCTION["opset_import"], domain, version))
        return out

    def _training(self, where: Range) -> Pieces:
        out = Pieces()
        for number, start, content in raw_fields(self.view, where):
            if number in _TRAINING.values():
                out.message(number, self._graph(content, None, None))
            else:
                out.add(Range(start, content.stop))
        return out

    def _new_constants(self, out: Pieces, edit: GraphEdit) -> None:
        for new in edit.added:
            tensor = self.external.tensor(new)
            attribute = Pieces()
            attribute.add(encode(schema.ATTRIBUTE, name="value"))
            attribute.message(_ATTRIBUTE["t"], tensor)
            attribute.add(encode(schema.ATTRIBUTE, type=schema.ATTRIBUTE_TENSOR))
            node = Pieces()
            node.add(encode(schema.NODE, output=new.name, name=new.name, op_type="Constant"))
            node.message(_NODE["attribute"], attribute)
            out.message(_FUNCTION["node"], node)

    def _new_nodes(self, out: Pieces, field: int, nodes: list[Node], renamed: _Renamed | None = None) -> None:
        for node in nodes:
            inputs = node.inputs if renamed is None else tuple(renamed.get(name) or name for name in node.inputs)
            encoded = encode_node(replace(node, inputs=inputs))
            out.add(bytes_head(field, len(encoded)) + encoded)

    def _node(
        self,
        out: Pieces,
        field: int,
        start: int,
        content: Range,
        node: Node | None,
        edit: GraphEdit,
        renamed: _Renamed,
    ) -> None:
        if node is not None and id(node) in edit.replaced:
            self._new_nodes(out, field, list(edit.replaced[id(node)]), renamed)
            return
        if node is not None and node.constant is not None and id(node.constant) in edit.dropped:
            return
        takes_renamed = node is not None and any(renamed.get(name) for name in node.inputs)
        if not takes_renamed and not (node is None or node.bodies or node.has_tensors):
            out.add(Range(start, content.stop))
            return
        message = Pieces()
        bodies = iter(() if node is None else node.bodies)
        for number, at, inner in raw_fields(self.view, content):
            if number == _NODE["attribute"]:
                message.message(number, self._attribute(inner, node, bodies, renamed))
            elif number == _NODE["input"] and takes_renamed:
                name = renamed.get(bytes(self.view[inner.start : inner.stop]).decode("utf-8", "backslashreplace"))
                if name:
                    message.add(encode(schema.NODE, input=name))
                else:
                    message.add(Range(at, inner.stop))
            else:
                message.add(Range(at, inner.stop))
        out.message(field, message)

    def _attribute(self, where: Range, node: Node | None, bodies: Iterator[ParsedGraph], renamed: _Renamed) -> Pieces:
        out = Pieces()
        known = [] if node is None or node.constant is None else [node.constant]
        for number, start, content in raw_fields(self.view, where):
            if number in (_ATTRIBUTE["g"], _ATTRIBUTE["graphs"]):
                out.message(number, self._graph(content, next(bodies, None), renamed))
            elif number in (_ATTRIBUTE["t"], _ATTRIBUTE["tensors"]):
                header = known.pop() if known else tensor_header(self.view, content)
                out.message(number, self._tensor(content, header))
            else:
                out.add(Range(start, content.stop))
        return out

    def _tensor(self, where: Range, header: TensorHeader) -> Pieces:
        """A TensorProto of the file, unchanged or with its payload in another place."""
        out = Pieces()
        dtype = schema.DTYPES.get(header.data_type)
        was_external = header.is_external
        if dtype is None and header.external is None:
            out.add(where)
            return out
        tensor = self.payloads.tensor(header)
        is_external = self.external.takes(tensor.nbytes, was_external)
        if not is_external and header.external is None:
            out.add(where)
            return out
        if id(header) not in self.weights and was_external:
            self.allowance.hold(tensor.nbytes, tensor=header.name)
        for number, start, content in raw_fields(self.view, where):
            if number not in _PAYLOAD_FIELDS:
                out.add(Range(start, content.stop))
        self.external.add(out, Payload(tensor.nbytes, tensor), is_external)
        return out

    def _refuse_external_sparse(self, where: Range) -> None:
        found = decode(self.view, where, schema.SPARSE_TENSOR)
        for content in found.ranges("values") + found.ranges("indices"):
            header = tensor_header(self.view, content)
            if header.external is not None:
                message = "is a sparse initializer with external data, which cannot be written"
                raise Unsupported(message, tensor=header.name)

    def _name(self, where: Range) -> str:
        return next((text for number, text in self._texts(where) if number == 1), "")

    def _texts(self, where: Range) -> Iterator[tuple[int, str]]:
        for number, _, content in raw_fields(self.view, where):
            yield number, bytes(self.view[content.start : content.stop]).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True, eq=False)
class _Renamed:
    """The values that have new names inside a graph: its own, and those of outer graphs that it does not shadow. This
    is a chain and not one merged table per graph, because there may be many graphs and many names."""

    here: Mapping[str, str]
    own: Set[str]
    outer: _Renamed | None

    @classmethod
    def inside(cls, outer: _Renamed | None, graph: ParsedGraph | None, edit: GraphEdit) -> _Renamed:
        """The renamed values inside a graph; `outer` are those of the graph around it."""
        if outer is None or graph is None or not (outer.here or outer.outer):
            return cls(edit.renamed, frozenset(), None)
        own = {*graph.inputs, *(header.name for header in graph.initializers)}
        own.update(name for node in graph.nodes for name in node.outputs)
        return cls(edit.renamed, own, outer)

    def get(self, name: str) -> str:
        """The new name of a value; empty if it has none."""
        if name in self.here:
            return self.here[name]
        return "" if self.outer is None or name in self.own else self.outer.get(name)


def _opset_import(field: int, domain: str, version: int) -> bytes:
    content = encode(schema.OPERATOR_SET, domain=domain, version=version)
    return bytes_head(field, len(content)) + content


def _numbers(message: str) -> Mapping[str, int]:
    return {name: found.number for name, found in getattr(schema, message).fields.items()}


_MODEL, _GRAPH, _NODE, _ATTRIBUTE = (_numbers(name) for name in ("MODEL", "GRAPH", "NODE", "ATTRIBUTE"))
_FUNCTION, _TRAINING = _numbers("FUNCTION"), _numbers("TRAINING")
