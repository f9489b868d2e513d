"""The consumers of a weight: operators that compute with it, not those that only pass it on."""

from __future__ import annotations

from collections.abc import Iterator

from nibblecast.converters.metadata import Use
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.weights.dataflow import Dataflow
from nibblecast.formats.onnx.weights.operators import input_of
from nibblecast.formats.onnx.weights.patterns import Scope

_PASSING = frozenset({"Cast", "Identity", "Transpose"})
_LONGEST_CHAIN = 8


def uses_of(flow: Dataflow, scope: Scope, name: str, rank: int) -> tuple[Use, ...]:
    """The uses of the value behind a name in a graph, a tensor of `rank` axes. Transpose, Cast and Identity are
    followed to the uses of their results. Axes are those of the tensor itself."""
    return tuple(_uses(flow, scope, name, tuple(range(rank)), 0))


def _uses(flow: Dataflow, scope: Scope, name: str, axes: tuple[int, ...], length: int) -> Iterator[Use]:
    """The uses of a value; `axes` are the tensor's axes in the order in which the value has them."""
    for taker in flow.takers_of(scope, name):
        node = taker.node
        following = _followed(node, axes) if length < _LONGEST_CHAIN else None
        found = [] if following is None else list(_uses(flow, taker.scope, node.outputs[0], following, length + 1))
        yield from found or [input_of(node, taker.position).use(node.op_type, taker.position, axes)]


def _followed(node: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The tensor's axes in the order of a node's result; None if the node does more than pass the tensor on."""
    if not node.is_standard or node.op_type not in _PASSING or len(node.inputs) != 1 or not node.outputs:
        return None
    if node.op_type != "Transpose":
        return axes
    order = node.lists.get("perm", tuple(reversed(range(len(axes)))))
    return tuple(axes[axis] for axis in order) if sorted(order) == list(range(len(axes))) else None
