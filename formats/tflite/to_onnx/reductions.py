"""Reductions along axes, and searches along one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from nibblecast.formats.tflite.to_onnx.builder import TO_FIRST, GraphBuilder, OperatorCall


def reduce(operator: str) -> Callable[[GraphBuilder, OperatorCall], None]:
    """MEAN, SUM, REDUCE_MAX and similar: the axes are the second input."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        rank = len(b.info(op.input(0)).shape)
        axes = sorted({axis % max(1, rank) for axis in b.list_of(op.input(1))})
        keep = op.options.integer("keep_dims")
        first = b.is_first(op.input(0)) and (bool(keep) or axes == list(range(1, rank - 1)))
        value = b.read_first(op.input(0)) if first else b.read(op.input(0))
        if first:
            axes = [TO_FIRST[rank].index(axis) for axis in axes]
        result = _reduced(b, operator, value, axes, keep)
        b.write(op.outputs[0], result, first=first and bool(keep))

    return lower


def _reduced(b: GraphBuilder, operator: str, value: ir.Value, axes: list[int], keep: int) -> ir.Value:
    return b.reduced(operator, value, axes, keep=bool(keep)) if axes else b.emit("Identity", [value])


def reduce_bool(operator: str) -> Callable[[GraphBuilder, OperatorCall], None]:
    """REDUCE_ANY and REDUCE_ALL."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        rank = len(b.info(op.input(0)).shape)
        axes = [axis % max(1, rank) for axis in b.list_of(op.input(1))]
        numbers = b.emit("Cast", [b.read(op.input(0))], to=int(ir.DataType.INT32))
        reduced = _reduced(b, operator, numbers, axes, op.options.integer("keep_dims"))
        b.write(op.outputs[0], b.emit("Cast", [reduced], to=int(ir.DataType.BOOL)))

    return lower


def search(operator: str) -> Callable[[GraphBuilder, OperatorCall], None]:
    """ARG_MAX and ARG_MIN: the axis is the second input. Of equal values, the first position counts."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        axis = b.list_of(op.input(1))[0]
        found = b.emit(operator, [b.read(op.input(0))], axis=axis, keepdims=0)
        dtype = ir.DataType.from_numpy(b.info(op.outputs[0]).dtype)
        b.write(op.outputs[0], b.emit("Cast", [found], to=int(dtype)))

    return lower


def cumulative_sum(b: GraphBuilder, op: OperatorCall) -> None:
    """CUMSUM."""
    axis = b.constant(np.int64(b.list_of(op.input(1))[0]), name="axis")
    integer = op.options.integer
    exclusive, reverse = integer("exclusive"), integer("reverse")
    b.write(op.outputs[0], b.emit("CumSum", [b.read(op.input(0)), axis], exclusive=exclusive, reverse=reverse))


def top_k(b: GraphBuilder, op: OperatorCall) -> None:
    """TOPK_V2 along the last axis."""
    count = b.emit("Reshape", [b.emit("Cast", [b.read(op.input(1))], to=int(ir.DataType.INT64)), b.ints([1])])
    values, indices = b.emit_all("TopK", [b.read(op.input(0)), count], outputs=2, axis=-1)
    b.write(op.outputs[0], values)
    b.write(op.outputs[1], b.emit("Cast", [indices], to=int(ir.DataType.INT32)))
