"""What consumes a weight: the operators that compute with it, beyond those that only pass it on."""

from __future__ import annotations

from collections.abc import Iterator

from nibblecast.converters.metadata import Use
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.weights.dataflow import Dataflow
from nibblecast.formats.onnx.weights.patterns import Scope

#: The axis of an operator's weight along which its output channels run, by operator and input (ONNX operators, and
#: onnxruntime's ContribOperators.md).
_CHANNEL_AXES = {
    ("Conv", 1): 0,
    ("ConvInteger", 1): 0,
    ("ConvTranspose", 1): 1,
    ("DynamicQuantizeMatMul", 1): -1,
    ("MatMul", 1): -1,
    ("MatMulInteger", 1): -1,
    ("MatMulIntegerToFloat", 1): -1,
    ("QAttention", 1): -1,
    ("QLinearConv", 3): 0,
    ("QLinearMatMul", 3): -1,
}
#: Operators whose weight may be transposed: the position of the weight.
_GEMMS = {("Gemm", 1), ("QGemm", 3)}
_PASSING = frozenset({"Cast", "Identity", "Transpose"})
_LONGEST_CHAIN = 8


def uses_of(flow: Dataflow, scope: Scope, name: str, rank: int) -> tuple[Use, ...]:
    """The uses of the value that a name stands for in a graph, a tensor of so many axes. Transpose, Cast and Identity
    are seen through, where their results are used; channel axes are those of the tensor itself."""
    return tuple(_uses(flow, scope, name, tuple(range(rank)), 0))


def _uses(flow: Dataflow, scope: Scope, name: str, axes: tuple[int, ...], length: int) -> Iterator[Use]:
    """`axes` are the tensor's, in the order in which the value has them."""
    for taker in flow.takers_of(scope, name):
        node = taker.node
        following = _followed(node, axes) if length < _LONGEST_CHAIN else None
        found = [] if following is None else list(_uses(flow, taker.scope, node.outputs[0], following, length + 1))
        yield from found or [Use(node.op_type, taker.position, _channel_axis(node, taker.position, axes))]


def _followed(node: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The tensor's axes in the order in which the result of a node has them, None where it is more than passed on."""
    if not node.is_standard or node.op_type not in _PASSING or len(node.inputs) != 1 or not node.outputs:
        return None
    if node.op_type != "Transpose":
        return axes
    order = node.lists.get("perm", tuple(reversed(range(len(axes)))))
    return tuple(axes[axis] for axis in order) if sorted(order) == list(range(len(axes))) else None


def _channel_axis(node: Node, position: int, axes: tuple[int, ...]) -> int | None:
    axis = _CHANNEL_AXES.get((node.op_type, position))
    if (node.op_type, position) in _GEMMS:
        axis = 0 if node.integers.get("transB", 0) else 1
    if axis is None:
        return None
    return axes[axis] if -len(axes) <= axis < len(axes) else None
