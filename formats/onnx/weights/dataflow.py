"""Which nodes take each value of a model. Inner graphs see the values of outer ones; functions see only their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.formats.onnx.file.graph import Node, ParsedGraph, ParsedModel, TensorHeader
from nibblecast.formats.onnx.weights.patterns import Scope

#: A value: the identity of the graph that makes it, and its name there.
Value = tuple[int, str]

_DEEPEST_CALL = 16
#: About how many bytes it costs to look at a node once more.
_NODE_BYTES = 1 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Taker:
    """A node that takes a value, the position of that input, and the node's graph."""

    scope: Scope
    node: Node
    position: int


@dataclass(slots=True)
class Dataflow:
    """All graphs of a model, the nodes that take each of their values, and the values that are outputs of a graph.

    Values are known by their graph's identity and their name, because an inner graph may shadow a name, and functions
    have names of their own. The index is made once: searching all nodes for each weight would be quadratic."""

    scopes: list[Scope] = field(default_factory=list)
    takers: dict[Value, list[Taker]] = field(default_factory=dict)
    outputs: set[Value] = field(default_factory=set)

    @classmethod
    def of(cls, parsed: ParsedModel) -> Dataflow:
        """The dataflow of a whole file."""
        flow = cls()
        flow.scopes = [scope for graph in (parsed.graph, *parsed.functions) for scope in scopes_of(graph)]
        for scope in flow.scopes:
            for node in scope.graph.nodes:
                for position, name in enumerate(node.inputs):
                    if name:
                        flow.takers.setdefault(flow.value(scope, name), []).append(Taker(scope, node, position))
            flow.outputs.update(flow.value(scope, name) for name in scope.graph.outputs)
        return flow

    def value(self, scope: Scope, name: str) -> Value:
        """The value behind a name in a graph."""
        found: Scope | None = scope
        while found is not None and not found.makes(name):
            found = found.outer
        return id((found or scope).graph), name

    def takers_of(self, scope: Scope, name: str) -> Sequence[Taker]:
        """The nodes that take the value behind a name in a graph."""
        return self.takers.get(self.value(scope, name), ())

    def is_output(self, scope: Scope, name: str) -> bool:
        """Whether the value is an output of its own graph or of one inside it."""
        return self.value(scope, name) in self.outputs


def call_scopes(parsed: ParsedModel, scopes: Sequence[Scope], allowance: Allowance) -> Iterator[Scope]:
    """The bodies of functions once more for each call that passes initializers, bound to the inputs of the body. Raises
    Unsupported if functions call functions without end, or so often that the allowance does not cover it."""
    calls = [(scope, 0) for scope in scopes if parsed.calls]
    sizes: dict[int, int] = {}
    for scope, depth in calls:  # calls found on the way are appended to `calls`
        for node in scope.graph.nodes:
            body = parsed.calls.get(("" if node.is_standard else node.domain, node.op_type))
            if body is None:
                continue
            headers = [(name, scope.header(given)) for name, given in zip(body.inputs, node.inputs, strict=False)]
            bound = {name: header for name, header in headers if header is not None}
            if not bound:
                continue
            if depth >= _DEEPEST_CALL:
                raise Unsupported(f"functions call functions more than {_DEEPEST_CALL} deep, or without end")
            if id(body) not in sizes:
                sizes[id(body)] = _size(body)
            allowance.spend(_NODE_BYTES * sizes[id(body)], f"its functions call '{node.op_type}' again and again")
            for called in scopes_of(body, None, bound):
                calls.append((called, depth + 1))
                yield called


def _size(graph: ParsedGraph) -> int:
    """The number of nodes and initializers of a graph, including those of the graphs inside it."""
    return 1 + len(graph.initializers) + sum(1 + sum(map(_size, node.bodies)) for node in graph.nodes)


def scopes_of(
    graph: ParsedGraph, outer: Scope | None = None, bound: Mapping[str, TensorHeader] | None = None
) -> Iterator[Scope]:
    """A graph and all graphs inside it, outer ones first; `bound` has the initializers that its inputs stand for."""
    scope = Scope(graph, outer, bound)
    yield scope
    for node in graph.nodes:
        for body in node.bodies:
            yield from scopes_of(body, scope)
