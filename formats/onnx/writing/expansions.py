"""Expands operators that take quantized weights into ONNX's own operators on floats, and fuses the other way round.

Sources: onnxruntime's docs/ContribOperators.md (com.microsoft 1), and the ONNX operators (MatMul, Gemm, Gather,
QLinearConv, QLinearMatMul, MatMulInteger).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nibblecast.converters.names import UniqueNames
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.weights.block_operators import MICROSOFT
from nibblecast.formats.onnx.weights.dataflow import Dataflow, Taker
from nibblecast.formats.onnx.weights.patterns import Matcher, Scope


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A node that takes a weight's codes, with the matcher that finds the nodes around it."""

    matcher: Matcher
    node: Node
    view: memoryview
    names: UniqueNames

    @property
    def scope(self) -> Scope:
        """The node's graph."""
        return self.matcher.scope

    def attributes(self) -> tuple[bytes, ...]:
        """The node's attributes, encoded."""
        return tuple(bytes(self.view[where.start : where.stop]) for where in self.node.attributes)

    def fresh(self, suffix: str) -> str:
        """A new name for an intermediate value of this node's result."""
        return self.names.fresh(f"{self.node.outputs[0]}_{suffix}")


def _itself(site: Site) -> Node | None:
    return site.node


@dataclass(frozen=True, slots=True)
class Expansion:
    """How an operator is expanded. `weight` is the position of the codes among its inputs (-1 if other nodes come
    between), `scale` the position of their scale. `transposes` says that the operator transposes its weight. `nodes`
    makes the nodes that replace `target`, from the name of the float weight, already transposed; they are empty if that
    cannot be done. `is_exact` says that the operator computes in floats as well."""

    weight: int
    scale: int
    nodes: Callable[[Site, str], tuple[Node, ...]]
    transposes: bool = False
    is_exact: bool = False
    target: Callable[[Site], Node | None] = _itself


def _matmul(site: Site, weight: str) -> tuple[Node, ...]:
    return _product_and_bias(site, (), site.node.input(0), weight, site.node.input(5))


def _bnb4(site: Site, weight: str) -> tuple[Node, ...]:
    if site.node.integers.get("transB", 1) != 1:
        return ()
    return (Node("MatMul", (site.node.input(0), weight), site.node.outputs, name=site.node.name),)


def _gather(site: Site, weight: str) -> tuple[Node, ...]:
    node = site.node
    axis = {"axis": node.integers.get("gather_axis", 0)}
    return (Node("Gather", (weight, node.input(1)), node.outputs, axis, name=node.name),)


def _qlinear_matmul(site: Site, weight: str) -> tuple[Node, ...]:
    node = site.node
    values, product = site.fresh("dequantized_input"), site.fresh("product")
    return (
        Node("DequantizeLinear", node.inputs[0:3], (values,)),
        Node("MatMul", (values, weight), (product,), name=node.name),
        Node("QuantizeLinear", (product, *node.inputs[6:8]), node.outputs),
    )


def _qlinear_conv(site: Site, weight: str) -> tuple[Node, ...]:
    node = site.node
    values, result = site.fresh("dequantized_input"), site.fresh("result")
    nodes, inputs = [Node("DequantizeLinear", node.inputs[0:3], (values,))], [values, weight]
    if node.input(8):  # the bias is int32 with the scale x_scale * w_scale (ONNX operators, QLinearConv 10)
        scale, bias = site.fresh("bias_scale"), site.fresh("bias")
        nodes.append(Node("Mul", (node.input(1), node.input(4)), (scale,)))
        nodes.append(Node("DequantizeLinear", (node.input(8), scale), (bias,), {"axis": 0}))
        inputs.append(bias)
    conv = Node("Conv", tuple(inputs), (result,), name=node.name, others=site.attributes())
    return (*nodes, conv, Node("QuantizeLinear", (result, *node.inputs[6:8]), node.outputs))


def _scaling(site: Site) -> Node | None:
    """The Mul that scales a product of integers."""
    found = site.matcher.scaling(site.node)
    return None if found is None else found[0]


def _integer_product(operator: str) -> Callable[[Site, str], tuple[Node, ...]]:
    """Expands MatMulInteger and ConvInteger after DynamicQuantizeLinear: the product takes its float input directly."""

    def nodes(site: Site, weight: str) -> tuple[Node, ...]:
        rounding, scaling = site.scope.producer(site.node.input(0), "DynamicQuantizeLinear"), _scaling(site)
        if rounding is None or scaling is None:
            return ()
        inputs = (rounding.input(0), weight)
        return (Node(operator, inputs, scaling.outputs, name=site.node.name, others=site.attributes()),)

    return nodes


def _dynamic_matmul(site: Site, weight: str) -> tuple[Node, ...]:
    return _product_and_bias(site, (), site.node.input(0), weight, site.node.input(4))


def _integer_matmul(site: Site, weight: str) -> tuple[Node, ...]:
    node, values = site.node, site.fresh("dequantized_input")
    decoded = Node("DequantizeLinear", tuple(n for n in (node.input(0), node.input(2), node.input(4)) if n), (values,))
    return _product_and_bias(site, (decoded,), values, weight, node.input(6))


def _product_and_bias(site: Site, before: tuple[Node, ...], values: str, weight: str, bias: str) -> tuple[Node, ...]:
    node = site.node
    product = site.fresh("product") if bias else node.outputs[0]
    nodes = (*before, Node("MatMul", (values, weight), (product,), name=node.name))
    return (*nodes, Node("Add", (product, bias), node.outputs)) if bias else nodes


def _qgemm(site: Site, weight: str) -> tuple[Node, ...]:
    """Expands QGemm. Its bias is int32 with the scale alpha * a_scale * b_scale."""
    node, values = site.node, site.fresh("dequantized_input")
    if node.floats.get("alpha", 1.0) != 1.0:
        return ()
    nodes, inputs = [Node("DequantizeLinear", node.inputs[0:3], (values,))], [values, weight]
    if node.input(6):
        scale, bias = site.fresh("bias_scale"), site.fresh("bias")
        nodes.append(Node("Mul", (node.input(1), node.input(4)), (scale,)))
        nodes.append(Node("DequantizeLinear", (node.input(6), scale), (bias,), {"axis": 0}))
        inputs.append(bias)
    is_rounded = bool(node.input(7))
    result = site.fresh("result") if is_rounded else node.outputs[0]
    nodes.append(Node("Gemm", tuple(inputs), (result,), name=node.name, others=site.attributes()))
    rounding = (Node("QuantizeLinear", (result, *node.inputs[7:9]), node.outputs),) if is_rounded else ()
    return (*nodes, *rounding)


def _attention(site: Site, weight: str) -> tuple[Node, ...]:
    node, values = site.node, site.fresh("dequantized_input")
    decoded = Node("DequantizeLinear", tuple(n for n in (node.input(0), node.input(3), node.input(6)) if n), (values,))
    inputs = (values, weight, node.input(2), node.input(5), node.input(8))
    attention = Node("Attention", inputs, node.outputs, domain=MICROSOFT, name=node.name, others=site.attributes())
    return decoded, attention


def _moves(site: Site, weight: str) -> tuple[Node, ...]:
    """The operator that moves codes before DequantizeLinear, on floats."""
    moves, name = [], site.node.input(0)
    while (move := site.scope.node(name)) is not None:
        moves.append(move)
        name = move.input(0)
    nodes, value = [], weight
    for move in reversed(moves):
        result = site.node.outputs[0] if move is moves[0] else site.fresh("moved")
        others = Site(site.matcher, move, site.view, site.names).attributes()
        nodes.append(Node(move.op_type, (value, *move.inputs[1:]), (result,), name=move.name, others=others))
        value = result
    return tuple(nodes)


EXPANSIONS: Mapping[tuple[str, str], Expansion] = MappingProxyType(
    {
        (MICROSOFT, "MatMulNBits"): Expansion(1, 2, _matmul, transposes=True, is_exact=True),
        (MICROSOFT, "MatMulBnb4"): Expansion(1, 2, _bnb4, transposes=True, is_exact=True),
        (MICROSOFT, "GatherBlockQuantized"): Expansion(0, 2, _gather, is_exact=True),
        ("", "DequantizeLinear"): Expansion(-1, 1, _moves, is_exact=True),
        ("", "QLinearMatMul"): Expansion(3, 4, _qlinear_matmul),
        ("", "QLinearConv"): Expansion(3, 4, _qlinear_conv),
        ("", "MatMulInteger"): Expansion(1, -1, _integer_product("MatMul"), target=_scaling),
        ("", "ConvInteger"): Expansion(1, -1, _integer_product("Conv"), target=_scaling),
        (MICROSOFT, "DynamicQuantizeMatMul"): Expansion(1, 2, _dynamic_matmul),
        (MICROSOFT, "MatMulIntegerToFloat"): Expansion(1, 3, _integer_matmul),
        (MICROSOFT, "QGemm"): Expansion(3, 4, _qgemm),
        (MICROSOFT, "QAttention"): Expansion(1, 4, _attention),
    }
)


def expansion(node: Node) -> Expansion | None:
    """How a node is expanded; None if it takes no codes or cannot be expanded."""
    return EXPANSIONS.get(("" if node.is_standard else node.domain, node.op_type))


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """Nodes to replace by an operator of com.microsoft: `taker` multiplies by a weight or gathers from it. `transposes`
    says that it takes the weight as (in, out), where the operator needs (out, in)."""

    taker: Taker
    operator: str
    transposes: bool
    bias: str = ""


def fusions(flow: Dataflow, taker: Taker, rank: int) -> list[Fusion] | None:
    """How the taker of a weight with this rank becomes an operator that takes its codes; None if it cannot."""
    node, standard = taker.node, taker.node.is_standard
    if not standard or rank != 2:
        return None
    if node.op_type == "Transpose" and taker.position == 0 and _swaps(node):
        following = flow.takers_of(taker.scope, node.outputs[0])
        if flow.is_output(taker.scope, node.outputs[0]) or not following:
            return None
        found = [_product(each, True) for each in following]
        return None if None in found else [each for each in found if each is not None]
    if node.op_type == "Gather" and taker.position == 0 and node.integers.get("axis", 0) == 0:
        return [Fusion(taker, "GatherBlockQuantized", False)]
    product = _product(taker, False)
    return None if product is None else [product]


def _swaps(node: Node) -> bool:
    return node.lists.get("perm", (1, 0)) == (1, 0)


def _product(taker: Taker, was_transposed: bool) -> Fusion | None:
    node = taker.node
    if not node.is_standard or taker.position != 1:
        return None
    if node.op_type == "MatMul":
        return Fusion(taker, "MatMulNBits", not was_transposed)
    plain = all(node.floats.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not node.integers.get("transA", 0)
    if node.op_type == "Gemm" and plain:
        is_out_in = bool(node.integers.get("transB", 0)) != was_transposed
        return Fusion(taker, "MatMulNBits", not is_out_in, bias=node.input(2))
    return None
