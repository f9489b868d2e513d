"""A TFLite model's graph -> an ONNX graph, made when a writer asks for it.

The operators of TFLite are few, so each has one function that emits ONNX nodes, and operators are lowered in execution
order. Matching groups of operators would give smaller graphs. But one by one, every node can be traced to its operator,
and a lowering can be tested alone against LiteRT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx_ir as ir

from nibblecast.converters.errors import CorruptFile, Unsupported, located
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import WeightPlace
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.tflite.to_onnx.builder import TO_FIRST, GraphBuilder, OperatorCall, TensorInfo
from nibblecast.formats.tflite.to_onnx.operators import LOWERINGS


@dataclass(frozen=True, slots=True, eq=False)
class Subgraph:
    """A subgraph for lowering: tensors by index, operators in execution order."""

    name: str
    tensors: Sequence[TensorInfo]
    operators: Sequence[OperatorCall]
    inputs: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True, slots=True)
class Wishes:
    """Options of lowering: the operator set, whether images are channels first at the graph's inputs and outputs, and
    the domain for operators without a lowering (empty: they are refused)."""

    opset: int
    channels_first: bool = False
    custom_domain: str = ""


def lowered(
    subgraphs: Sequence[Subgraph], main: int, wishes: Wishes, producer: str, allowance: Allowance
) -> tuple[ir.Model, Mapping[str, WeightPlace]]:
    """The subgraph `main` as an ONNX model, and which of its initializers are the model's weights. Raises Unsupported
    for operators without a lowering, naming all of them, and for constants and nodes beyond the allowance. Raises
    CorruptFile if tensors, operators and options contradict each other."""
    if not wishes.custom_domain:
        _refuse_unknown(subgraphs, main)
    graph, opset = subgraphs[main], wishes.opset
    taken = {graph.tensors[index].name for index in (*graph.inputs, *graph.outputs)}
    root = GraphBuilder(
        list(graph.tensors), opset, UniqueNames(taken), allowance, run_subgraph=_Runner(subgraphs, main)
    )
    root.custom_domain = wishes.custom_domain
    with _contradictions("an input"):
        inputs = [_input(root, index, channels_first=wishes.channels_first) for index in graph.inputs]
    _run(root, graph)
    root.outputs.update(value.name or "" for value in inputs)  # an input that is also an output gets another name there
    with _contradictions("an output"):
        outputs = [_output(root, index, channels_first=wishes.channels_first) for index in graph.outputs]
        outputs += _states(root)
    nodes = _used(root.nodes, outputs)
    made = ir.Graph(
        [*inputs, *root.variables],
        outputs,
        nodes=nodes,
        initializers=[value for name, value in root.initializers.items() if name in root.places or value.uses()],
        name=graph.name or "main",
        opset_imports={"": opset} | ({wishes.custom_domain: 1} if root.uses_custom else {}),
    )
    model = ir.Model(made, ir_version=10, producer_name="nibblecast", doc_string=producer or None)
    if any(value.shape is None for value in outputs):  # ONNX needs a shape, even if its sizes are unknown
        from onnx_ir.passes.common import ShapeInferencePass

        model = ShapeInferencePass(check_type=False, strict_mode=False)(model).model
        for value in model.graph.outputs:
            value.shape = value.shape or ir.Shape(())  # only scalars of loops remain
    return model, root.places


def _used(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes whose outputs are used."""
    wanted, used = {id(value) for value in outputs}, []
    for node in reversed(nodes):
        if any(id(value) in wanted or value.uses() for value in node.outputs):
            used.append(node)
            continue
        for position in range(len(node.inputs)):
            node.replace_input_with(position, None)
    return used[::-1]


def _run(b: GraphBuilder, graph: Subgraph) -> None:
    for operator in graph.operators:
        found = LOWERINGS.get(operator.name)
        result = next((b.tensors[index].name for index in operator.outputs if index >= 0), None)
        with _contradictions(operator.name, result):
            if b.is_repeated:
                b.spend(_OPERATOR_BYTES)
            (custom if found is None else found.function)(b, operator)


@contextmanager
def _contradictions(what: str, tensor: str | None = None) -> Iterator[None]:
    """Turns lookup errors into CorruptFile that names `what`. Lowering uses indices, ranks and options as if the
    operators' kernels had accepted them, so errors mean that the file contradicts itself."""
    try:
        with located(tensor=tensor):
            yield
    except _CONTRADICTIONS as error:
        reason = f"{type(error).__name__}: {str(error)[:_LONGEST_REASON]}"
        message = f"{what} has shapes, inputs or options that contradict each other ({reason}): the file is damaged"
        raise CorruptFile(message, tensor=tensor) from error


@dataclass(slots=True, eq=False)
class _Runner:
    """Lowers subgraphs into the nodes of their caller. Each further run adds the same nodes again. A few subgraphs that
    run each other could multiply without end, so repeated nodes are counted."""

    subgraphs: Sequence[Subgraph]
    main: int
    _known: set[int] = field(default_factory=set)
    _running: list[int] = field(default_factory=list)

    def __call__(self, caller: GraphBuilder, index: int, values: Sequence[ir.Value]) -> list[ir.Value]:
        """The outputs of a subgraph for these inputs. Raises CorruptFile if there is no such subgraph, Unsupported if
        it runs itself or is nested too deep."""
        if not 0 <= index < len(self.subgraphs):
            raise CorruptFile(f"subgraph {index} of {len(self.subgraphs)} is run: the file is damaged")
        if index == self.main or index in self._running:
            raise Unsupported(f"subgraph {index} runs itself, for which ONNX has nothing")
        if len(self._running) >= _MOST_NESTED:
            raise Unsupported(f"subgraphs run each other more than {_MOST_NESTED} deep")
        graph = self.subgraphs[index]
        inner = GraphBuilder(
            list(graph.tensors),
            caller.opset,
            caller.names,
            caller.allowance,
            nodes=caller.nodes,
            outer=caller,
            run_subgraph=self,
            is_repeated=caller.is_repeated or index in self._known,
        )
        self._known.add(index)
        if inner.is_repeated:
            inner.spend(_OPERATOR_BYTES * (1 + len(graph.inputs) + len(graph.outputs)) + 8 * len(graph.tensors))
        for tensor, value in zip(graph.inputs, values, strict=True):
            inner.hold(tensor, value)
        self._running.append(index)
        _run(inner, graph)
        self._running.pop()
        return [inner.read(tensor) for tensor in graph.outputs]


def _refuse_unknown(subgraphs: Sequence[Subgraph], main: int) -> None:
    unknown: Counter[str] = Counter()
    seen, waiting = set(), [main]
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        if not 0 <= index < len(subgraphs):
            raise Unsupported(f"runs subgraph {index} of {len(subgraphs)}: the file is damaged")
        seen.add(index)
        for operator in subgraphs[index].operators:
            if operator.name not in LOWERINGS:
                unknown[operator.name] += 1
            else:
                waiting += [operator.options.integer(name) for name in _RUNS.get(operator.name, ())]
    if unknown:
        listed = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in sorted(unknown.items()))
        raise Unsupported(
            f"its graph has operators that do not become ONNX: {listed}; --opt graph=false writes the weights"
        )


_IMAGE_RANK = 4
_MOST_NESTED = 32
#: About how many bytes it costs to look at an operator once more.
_OPERATOR_BYTES = 1 << 10
_LONGEST_REASON = 200
#: Errors of lowering functions if ranks, indices or options are not what the operator's kernel would accept.
_CONTRADICTIONS = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError)
#: The options that name subgraphs.
_RUNS = {
    "CALL_ONCE": ("init_subgraph_index",),
    "IF": ("then_subgraph_index", "else_subgraph_index"),
    "STABLEHLO_COMPOSITE": ("decomposition_subgraph_index",),
    "WHILE": ("cond_subgraph_index", "body_subgraph_index"),
}


def custom(b: GraphBuilder, op: OperatorCall) -> None:
    """Lowers an operator that ONNX does not have to a node of the user's domain. Its inputs and outputs are TFLite's
    tensors (quantized ones decoded), and its options are in the attribute `custom_options`."""
    b.root.uses_custom = True
    inputs = [b.read(index) if index >= 0 else None for index in op.inputs]
    name = op.name.removeprefix("CUSTOM:") or "custom"
    attributes = [ir.AttrString("custom_options", op.custom_options.hex())] if op.custom_options else []
    node = ir.Node(b.root.custom_domain, name, inputs, attributes, num_outputs=len(op.outputs))
    b.nodes.append(node)
    for index, value in zip(op.outputs, node.outputs, strict=True):
        value.name = b.fresh(b.info(index).name)
        value.type, value.shape = ir.TensorType(b.type_of(index)), _known_shape(b.info(index))
        b.write(index, value)
    node.name = b.fresh(name)


def _input(b: GraphBuilder, index: int, *, channels_first: bool) -> ir.Value:
    """A graph input under its own name. Sizes that the file leaves open stay open."""
    info = b.info(index)
    signature = info.signature if len(info.signature) == len(info.shape) else info.shape
    sizes: list[int | str] = [
        f"{info.name}_{axis}" if wanted < 0 else size
        for axis, (size, wanted) in enumerate(zip(info.shape, signature, strict=True))
    ]
    first = channels_first and len(sizes) == _IMAGE_RANK
    if first:
        sizes = [sizes[axis] for axis in TO_FIRST[_IMAGE_RANK]]
    value = ir.Value(name=info.name, type=ir.TensorType(ir.DataType.from_numpy(info.dtype)), shape=ir.Shape(sizes))
    if info.is_quantized:
        b.write_codes(index, value, first=first)
    else:
        b.hold(index, value, first=first)
    return value


def _output(b: GraphBuilder, index: int, *, channels_first: bool) -> ir.Value:
    """A graph output under its own name, as codes if TFLite has codes."""
    info = b.info(index)
    first = channels_first and len(info.shape) == _IMAGE_RANK
    read = b.read_first if first else b.read
    value = b.codes(index, first=first) if info.is_quantized else read(index)
    own = value.producer() is not None and not value.is_graph_output()
    if not own or value.name in b.outputs:
        value = b.emit("Identity", [value])
    value.name = info.name if info.name not in b.outputs else b.fresh(info.name)
    b.outputs.add(value.name)
    value.type = ir.TensorType(ir.DataType.from_numpy(info.dtype))
    value.shape = _known_shape(info, first=first)
    return value


def _known_shape(info: TensorInfo, *, first: bool = False) -> ir.Shape | None:
    """A tensor's shape, in which sizes that the file leaves open stay open. None without axes, because that may also
    mean that the file does not know the shape."""
    if not info.shape:
        return None
    signature = info.signature if len(info.signature) == len(info.shape) else info.shape
    if any(size < 0 for size in signature):
        return ir.Shape([None] * len(info.shape))
    return ir.Shape([info.shape[axis] for axis in TO_FIRST[_IMAGE_RANK]] if first else info.shape)


def _states(b: GraphBuilder) -> list[ir.Value]:
    """The variables after the run, as additional outputs."""
    outputs = []
    for index, value in b.assigned.items():
        result = b.emit("Identity", [value], name=f"{b.info(index).name}_next")
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = _known_shape(b.info(index))
        outputs.append(result)
    return outputs
