"""A TFLite model's graph as an ONNX one, made when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from converters.errors import Error, Unsupported
from converters.ir import WeightPlace
from formats.tflite.lowering.builder import Builder, Operator, TensorInfo
from formats.tflite.lowering.operators import LOWERINGS


@dataclass(frozen=True, slots=True, eq=False)
class Subgraph:
    """A subgraph as lowering sees it: tensors by index, operators in execution order."""

    name: str
    tensors: Sequence[TensorInfo]
    operators: Sequence[Operator]
    inputs: Sequence[int]
    outputs: Sequence[int]


def lowered(
    subgraphs: Sequence[Subgraph], main: int, opset: int, producer: str
) -> tuple[ir.Model, Mapping[str, WeightPlace]]:
    """The subgraph `main` as an ONNX model, and which of its initializers are the model's weights. Raises Unsupported,
    naming all of them, for operators that there is no lowering for."""
    _refuse_unknown(subgraphs, main)
    graph = subgraphs[main]
    taken = {graph.tensors[index].name for index in (*graph.inputs, *graph.outputs)}
    root = Builder(list(graph.tensors), opset, set(taken), run_subgraph=_runner(subgraphs))
    inputs = [_input(root, index) for index in graph.inputs]
    _run(root, graph)
    outputs = [_output(root, index, inputs) for index in graph.outputs]
    outputs += _states(root)
    made = ir.Graph(
        [*inputs, *root.variables],
        outputs,
        nodes=root.nodes,
        initializers=list(root.initializers.values()),
        name=graph.name or "main",
        opset_imports={"": opset},
    )
    model = ir.Model(made, ir_version=10, producer_name="nibblecast", doc_string=producer or None)
    if any(value.shape is None for value in outputs):  # ONNX wants a shape, if only of unknown sizes
        from onnx_ir.passes.common import ShapeInferencePass

        model = ShapeInferencePass(check_type=False, strict_mode=False)(model).model
    return model, root.places


def _run(b: Builder, graph: Subgraph) -> None:
    for operator in graph.operators:
        try:
            LOWERINGS[operator.name].function(b, operator)
        except Error as error:
            error.tensor = error.tensor or next((b.tensors[index].name for index in operator.outputs), None)
            raise


def _runner(subgraphs: Sequence[Subgraph]) -> Callable[[Builder, int, Sequence[ir.Value]], list[ir.Value]]:
    def run(caller: Builder, index: int, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Spells out a subgraph for these inputs among the caller's nodes."""
        graph = subgraphs[index]
        inner = Builder(list(graph.tensors), caller.opset, caller.names, nodes=caller.nodes, outer=caller)
        inner.run_subgraph = caller.run_subgraph
        for tensor, value in zip(graph.inputs, values, strict=True):
            inner.hold(tensor, value)
        _run(inner, graph)
        return [inner.read(tensor) for tensor in graph.outputs]

    return run


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


#: The options that name subgraphs.
_RUNS = {
    "CALL_ONCE": ("init_subgraph_index",),
    "IF": ("then_subgraph_index", "else_subgraph_index"),
    "STABLEHLO_COMPOSITE": ("decomposition_subgraph_index",),
    "WHILE": ("cond_subgraph_index", "body_subgraph_index"),
}


def _input(b: Builder, index: int) -> ir.Value:
    """A graph input: under its own name, and with the sizes that the file leaves open left open."""
    info = b.info(index)
    signature = info.signature if len(info.signature) == len(info.shape) else info.shape
    sizes: list[int | str] = [
        f"{info.name}_{axis}" if wanted < 0 else size
        for axis, (size, wanted) in enumerate(zip(info.shape, signature, strict=True))
    ]
    value = ir.Value(name=info.name, type=ir.TensorType(ir.DataType.from_numpy(info.dtype)), shape=ir.Shape(sizes))
    if info.is_quantized:
        b.write_codes(index, value)
    else:
        b.hold(index, value)
    return value


def _output(b: Builder, index: int, inputs: Sequence[ir.Value]) -> ir.Value:
    """A graph output under its own name: codes where TFLite has codes."""
    info = b.info(index)
    value = b.codes(index) if info.is_quantized else b.read(index)
    own = value.producer() is not None and not value.is_graph_output()
    if not own or value.name in b.outputs:
        value = b.emit("Identity", [value])
    value.name = info.name if info.name not in b.outputs else b.fresh(info.name)
    b.outputs.add(value.name)
    value.type = ir.TensorType(ir.DataType.from_numpy(info.dtype))
    value.shape = _known_shape(info)
    return value


def _known_shape(info: TensorInfo) -> ir.Shape | None:
    """A tensor's shape, with the sizes that the file leaves open left open; None without axes, which may also mean that
    the file does not know the shape."""
    if not info.shape:
        return None
    signature = info.signature if len(info.signature) == len(info.shape) else info.shape
    return ir.Shape([None] * len(info.shape) if any(size < 0 for size in signature) else info.shape)


def _states(b: Builder) -> list[ir.Value]:
    """The variables after the run, as further outputs."""
    outputs = []
    for index, value in b.assigned.items():
        result = b.emit("Identity", [value], name=f"{b.info(index).name}_next")
        result.type = ir.TensorType(ir.DataType.FLOAT)
        result.shape = _known_shape(b.info(index))
        outputs.append(result)
    return outputs
