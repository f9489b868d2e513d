"""Changes to a model's graphs: replaces nodes, adds initializers, and removes what nothing takes any more.

Changes are collected beside the parsed graphs, by identity, and not made in them. The rewriter needs the graphs as they
are in the file, to copy everything else by its range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nibblecast.converters.names import UniqueNames
from nibblecast.formats.onnx.file.graph import Node, ParsedModel, TensorHeader
from nibblecast.formats.onnx.file.pieces import NewInitializer
from nibblecast.formats.onnx.file.rewrite import GraphEdit
from nibblecast.formats.onnx.weights.dataflow import Dataflow, Taker, Value
from nibblecast.formats.onnx.weights.patterns import Scope


@dataclass(slots=True)
class Editor:
    """Collects the changes of each graph, by its identity. `kept` has the identities of initializers that stay even if
    nothing takes them any more: tensors of the model, e.g. a table that several weights look up."""

    flow: Dataflow
    names: UniqueNames
    edits: dict[int, GraphEdit] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()
    domains: set[str] = field(default_factory=set)
    _given: set[Value] = field(default_factory=set)
    _counts: dict[Value, int] = field(default_factory=dict)
    _removed: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, parsed: ParsedModel, kept: Iterable[TensorHeader] = ()) -> Editor:
        """An editor of a whole file."""
        flow = Dataflow.of(parsed)
        return cls(flow, UniqueNames(_all_names(flow)), kept=frozenset(map(id, kept)))

    def edit(self, scope: Scope) -> GraphEdit:
        """The changes to one graph."""
        return self.edits.setdefault(id(scope.graph), GraphEdit())

    def is_removed(self, node: Node) -> bool:
        """Whether a node of the file has been replaced."""
        return id(node) in self._removed

    def add(self, scope: Scope, initializers: Iterable[NewInitializer], nodes: Iterable[Node] = ()) -> None:
        """Adds initializers to a graph, and nodes that take only these, before all its other nodes."""
        edit = self.edit(scope)
        edit.added += initializers
        for node in nodes:
            edit.first.append(node)
            self._take(scope, node.inputs, 1)

    def replace(self, scope: Scope, node: Node, *others: Node) -> None:
        """Replaces a node by others, and removes whatever only it took."""
        if self.is_removed(node):
            return
        self._put(scope, node, others)
        self._drop_unused(scope, node.inputs)

    def _put(self, scope: Scope, node: Node, others: tuple[Node, ...]) -> None:
        self._removed.add(id(node))
        self.edit(scope).replaced[id(node)] = others
        for other in others:
            self._take(scope, other.inputs, 1)
        self._take(scope, node.inputs, -1)

    def rename(self, scope: Scope, old: str, new: str) -> None:
        """Makes all nodes that take the value `old` of a graph take `new` instead."""
        self.edit(scope).renamed[old] = new
        self._counts[self.flow.value(scope, old)] = 0
        self._drop_unused(scope, [old])

    def give_away(self, scope: Scope, name: str) -> None:
        """Removes an initializer or Constant of a graph, so that something new can have its name."""
        self._given.add(self.flow.value(scope, name))
        self._drop(scope, name)

    def left(self, scope: Scope, name: str) -> list[Taker]:
        """The nodes of the file that still take a value of a graph."""
        return [taker for taker in self.flow.takers_of(scope, name) if not self.is_removed(taker.node)]

    def _drop(self, scope: Scope, name: str) -> None:
        self.edit(scope).dropped[id(scope.headers[name])] = name

    def _count(self, value: Value) -> int:
        if value not in self._counts:
            self._counts[value] = len(self.flow.takers.get(value, ()))
        return self._counts[value]

    def _take(self, scope: Scope, names: Iterable[str], sign: int) -> None:
        for name in names:
            if name:
                value = self.flow.value(scope, name)
                self._counts[value] = self._count(value) + sign

    def _drop_unused(self, scope: Scope, names: Iterable[str]) -> None:
        """Removes the makers of values that nothing takes any more, and what only these took, along the whole chain."""
        waiting = [(scope, name) for name in names if name]
        while waiting:
            scope, name = waiting.pop()
            value = self.flow.value(scope, name)
            if self._count(value) > 0 or value in self.flow.outputs or value in self._given:
                continue
            while id(scope.graph) != value[0] and scope.outer is not None:
                scope = scope.outer
            if name in scope.headers:
                if id(scope.headers[name]) not in self.kept:
                    self._drop(scope, name)
                continue
            node = scope.producers.get(name)
            if node is not None and not node.bodies and not self.is_removed(node) and self._is_unused(scope, node):
                self._put(scope, node, ())
                waiting += [(scope, each) for each in node.inputs if each]

    def _is_unused(self, scope: Scope, node: Node) -> bool:
        values = [self.flow.value(scope, name) for name in node.outputs if name]
        return all(self._count(value) <= 0 and value not in self.flow.outputs for value in values)


def _all_names(flow: Dataflow) -> Iterable[str]:
    for scope in flow.scopes:
        yield from scope.graph.inputs
        yield from scope.headers
        for node in scope.graph.nodes:
            yield from node.inputs
            yield from node.outputs
