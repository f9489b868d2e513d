"""The parts of an ONNX graph that weights need: nodes, initializers and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nibblecast.converters.metadata import Port
from nibblecast.formats.onnx.file.wire import Message, Range

#: The external-data location of payloads that are kept in memory beside a model.
CARRIED = "nibblecast:carried"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A TensorProto without its payload. `record` has the ranges of the payload's fields in the file; `external` has
    the entries of external data, None if the payload is in the file."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    record: Message
    external: Mapping[str, str] | None = None
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_external(self) -> bool:
        """Whether the payload lies in another file."""
        return self.external is not None and self.external.get("location") != CARRIED


@dataclass(frozen=True, slots=True)
class Node:
    """An operator. Its attributes are in `integers`, `floats`, `texts` (short ones) and `lists` (of integers). Graphs
    among them are in `bodies`; `constant` is the tensor of a Constant. `has_tensors` says whether any attribute holds
    tensors, `is_parametric` whether one refers to an attribute of the function around the node. An absent input is an
    empty name. `attributes` has the range of each attribute in the file; `others` are encoded attributes that a new
    node takes over from a node of the file."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int] = field(default_factory=dict)
    domain: str = ""
    bodies: tuple[ParsedGraph, ...] = ()
    constant: TensorHeader | None = None
    name: str = ""
    has_tensors: bool = False
    floats: Mapping[str, float] = field(default_factory=dict)
    lists: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: tuple[Range, ...] = ()
    others: tuple[bytes, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    is_parametric: bool = False

    def input(self, position: int) -> str:
        """The name of an input, empty if it is absent."""
        return self.inputs[position] if position < len(self.inputs) else ""

    @property
    def is_standard(self) -> bool:
        """Whether the operator is from ONNX's own domain."""
        return self.domain in ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class ParsedGraph:
    """Nodes in the order of the file, the initializers, and the names of inputs, outputs and sparse initializers."""

    nodes: tuple[Node, ...]
    initializers: tuple[TensorHeader, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sparse: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedModel:
    """A ModelProto: the graph, the bodies of functions, the graph's inputs (without initializers) and outputs, and the
    operator sets by domain (ONNX's own is the empty name). `calls` has the functions' bodies by domain and name."""

    graph: ParsedGraph
    producer: str
    properties: Mapping[str, str]
    functions: tuple[ParsedGraph, ...] = ()
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    opsets: Mapping[str, int] = field(default_factory=dict)
    ir_version: int = 0
    calls: Mapping[tuple[str, str], ParsedGraph] = field(default_factory=dict)
