"""Operators that run subgraphs, and the variables that outlive a run."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def if_(b: GraphBuilder, op: OperatorCall) -> None:
    """IF: the first input is the condition, and the branches use the other inputs directly."""
    values = [b.read(index) for index in op.inputs[1:]]
    bodies: dict[str, Any] = {}
    for branch in ("then", "else"):
        inner = b.inner()
        results = inner.run(op.options.integer(f"{branch}_subgraph_index"), values)
        outputs = [inner.emit("Identity", [value]) for value in results]
        bodies[f"{branch}_branch"] = inner.body([], outputs)
    condition = b.emit("Reshape", [b.read(op.input(0)), b.ints([])])
    for index, value in zip(op.outputs, b.emit_all("If", [condition], outputs=len(op.outputs), **bodies), strict=True):
        b.write(index, value)


def while_(b: GraphBuilder, op: OperatorCall) -> None:
    """WHILE: one subgraph computes the condition, the other the next values of the inputs."""
    values = [b.read(index) for index in op.inputs]
    goes_on, step = op.options.integer("cond_subgraph_index"), op.options.integer("body_subgraph_index")
    condition = b.emit("Reshape", [b.run(goes_on, values)[0], b.ints([])])
    inner = b.inner()
    count, before = inner.argument("iteration", [], _INT64), inner.argument("condition", [], _BOOL)
    arguments = []
    for index, value in zip(op.inputs, values, strict=True):
        arguments.append(
            inner.argument(f"{b.info(index).name}_now", b.info(index).shape, value.dtype or b.type_of(index))
        )
    results = [inner.emit("Identity", [value]) for value in inner.run(step, arguments)]
    again = inner.emit("Reshape", [inner.run(goes_on, results)[0], inner.ints([])])
    body = inner.body([count, before, *arguments], [again, *results])
    made = b.emit_all("Loop", [None, condition, *values], outputs=len(values), body=body)
    for index, value in zip(op.outputs, made, strict=True):
        b.write(index, value)


def composite(b: GraphBuilder, op: OperatorCall) -> None:
    """STABLEHLO_COMPOSITE: replaced by its decomposition."""
    results = b.run(op.options.integer("decomposition_subgraph_index"), [b.read(index) for index in op.inputs])
    for index, value in zip(op.outputs, results, strict=True):
        b.write(index, value)


def call_once(b: GraphBuilder, op: OperatorCall) -> None:
    """CALL_ONCE: the variables begin with the values that the subgraph assigns."""
    b.run(op.options.integer("init_subgraph_index"), [])


def variable_handle(b: GraphBuilder, op: OperatorCall) -> None:
    """VAR_HANDLE: a name for a variable."""
    b.handles[op.outputs[0]] = f"{op.options.text('container')}/{op.options.text('shared_name')}".strip("/")


def read_variable(b: GraphBuilder, op: OperatorCall) -> None:
    """READ_VARIABLE: the value assigned last, else a graph input that is zero by default."""
    name = b.handles[op.input(0)]
    if name not in b.root.resources:
        b.root.resources[name] = b.root.new_variable(b.info(op.outputs[0]))
    b.write(op.outputs[0], b.root.resources[name])


def assign_variable(b: GraphBuilder, op: OperatorCall) -> None:
    """ASSIGN_VARIABLE."""
    b.root.resources[b.handles[op.input(0)]] = b.read(op.input(1))
