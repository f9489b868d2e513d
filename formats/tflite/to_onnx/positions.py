"""Operators that say where elements go: segments, diagonals, sequences, and the selection of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32
from nibblecast.converters.errors import Unsupported
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall
from nibblecast.formats.tflite.to_onnx.shapes import long_list

_INT64, _INT32 = int(ir.DataType.INT64), int(ir.DataType.INT32)
_FAR = (1 << 63) - 1


def unsorted_segment(reduction: str) -> Callable[[GraphBuilder, OperatorCall], None]:
    """UNSORTED_SEGMENT_SUM and similar: reduces the rows of each segment and omits rows with a negative segment. A
    segment without rows has the reduction's initial value."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        rows, info = b.info(op.input(1)), b.info(op.input(0))
        dtype = FLOAT32 if info.is_quantized else info.dtype
        count = b.emit("Reshape", [long_list(b, op.input(2)), b.ints([1])])
        ids = b.emit("Cast", [b.read(op.input(1))], to=_INT64)
        ids = b.emit("Where", [b.emit("Less", [ids, b.ints([0])]), count, ids])  # an additional row takes these
        values = b.read(op.input(0))
        rest = b.emit("Slice", [b.emit("Shape", [values]), b.ints([len(rows.shape)]), b.ints([_FAR])])
        shape = b.emit("Concat", [b.emit("Add", [count, b.ints([1])]), rest], axis=0)
        empty = b.emit("ConstantOfShape", [shape], value=ir.tensor(_neutral(reduction, dtype)))
        places = b.emit("Unsqueeze", [ids, b.ints([-1])])
        made = b.emit("ScatterND", [empty, places, values], reduction=reduction)
        b.write(op.outputs[0], b.emit("Slice", [made, b.ints([0]), count, b.ints([0])]))

    return lower


def _neutral(reduction: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    if reduction in ("add", "mul"):
        return np.full(1, reduction == "mul", dtype)
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    return np.full(1, limits.min if reduction == "max" else limits.max, dtype)


def matrix_diag(b: GraphBuilder, op: OperatorCall) -> None:
    """MATRIX_DIAG: vectors along the last axis become the diagonals of matrices."""
    size = _known(b, op, op.input(0), [-1])[0]
    value = b.emit("Unsqueeze", [b.read(op.input(0)), b.ints([-2])])
    zero = b.constant(np.zeros((), np.float32 if b.info(op.input(0)).is_quantized else b.info(op.input(0)).dtype))
    b.write(op.outputs[0], b.emit("Where", [_diagonal(b, size, size), value, zero]))


def matrix_set_diag(b: GraphBuilder, op: OperatorCall) -> None:
    """MATRIX_SET_DIAG: the second input becomes the diagonal of the first."""
    rows, columns = _known(b, op, op.input(0), [-2, -1])
    value = b.read(op.input(1))
    if columns > rows:
        rank = len(b.info(op.input(1)).shape)
        value = b.emit("Pad", [value, b.ints([*[0] * (2 * rank - 1), columns - rows])])
    value = b.emit("Unsqueeze", [value, b.ints([-2])])
    b.write(op.outputs[0], b.emit("Where", [_diagonal(b, rows, columns), value, b.read(op.input(0))]))


def _diagonal(b: GraphBuilder, rows: int, columns: int) -> ir.Value:
    return b.computed(rows * columns, lambda: np.eye(rows, columns, dtype=np.bool_), "diagonal")


def _known(b: GraphBuilder, op: OperatorCall, index: int, axes: Sequence[int]) -> list[int]:
    """Sizes of a tensor. Raises Unsupported if the file leaves them open."""
    info = b.info(index)
    if info.is_open and any(info.signature[axis] < 0 for axis in axes):
        raise Unsupported(f"{op.name} of an axis whose size is open has no like in ONNX")
    return [info.shape[axis] for axis in axes]


def broadcast_args(b: GraphBuilder, op: OperatorCall) -> None:
    """BROADCAST_ARGS: the shape that two shapes broadcast to."""
    sizes = [b.info(index).shape[0] for index in op.inputs]
    values = []
    for index, size in zip(op.inputs, sizes, strict=True):
        value, missing = long_list(b, index), max(sizes) - size
        ones = b.computed(8 * missing, partial(np.ones, missing, np.int64), "ints") if missing else None
        values.append(value if ones is None else b.emit("Concat", [ones, value], axis=0))
    shape = b.emit("Where", [b.emit("Equal", [values[0], b.ints([1])]), values[1], values[0]])
    b.write(op.outputs[0], b.emit("Cast", [shape], to=int(b.type_of(op.outputs[0]))))


def reverse_sequence(b: GraphBuilder, op: OperatorCall) -> None:
    """REVERSE_SEQUENCE: the second input has the number of elements to reverse in each row. ONNX needs the axes of rows
    and time in front."""
    rank = len(b.info(op.input(0)).shape)
    time, batch = (op.options.integer(name) % max(1, rank) for name in ("seq_dim", "batch_dim"))
    order = [batch, time, *(axis for axis in range(rank) if axis not in (batch, time))]
    moved = order != list(range(rank))
    value = b.emit("Transpose", [b.read(op.input(0))], perm=order) if moved else b.read(op.input(0))
    value = b.emit("ReverseSequence", [value, long_list(b, op.input(1))], batch_axis=0, time_axis=1)
    b.write(op.outputs[0], b.emit("Transpose", [value], perm=np.argsort(order).tolist()) if moved else value)


def sparse_to_dense(b: GraphBuilder, op: OperatorCall) -> None:
    """SPARSE_TO_DENSE: values (or one for all) at indices, the default elsewhere."""
    places, shape = b.info(op.input(0)).shape, long_list(b, op.input(1))
    rank = len(b.info(op.outputs[0]).shape)
    dense = b.emit("Expand", [b.emit("Reshape", [b.read(op.input(3)), b.ints([1])]), shape])
    indices = b.emit("Cast", [b.read(op.input(0))], to=_INT64)
    if len(places) != 2:
        indices = b.emit("Reshape", [indices, b.ints([-1, rank])])
    values = b.read(op.input(2))
    if not b.info(op.input(2)).shape:
        values = b.emit("Expand", [values, b.emit("Slice", [b.emit("Shape", [indices]), b.ints([0]), b.ints([1])])])
    b.write(op.outputs[0], b.emit("ScatterND", [dense, indices, values]))


def unique(b: GraphBuilder, op: OperatorCall) -> None:
    """UNIQUE: values in the order of their first appearance, and for each element the index of its value."""
    value, kind = b.read(op.input(0)), b.type_of(op.input(0))
    if kind == ir.DataType.INT32:  # onnxruntime has Unique for int64 only
        value = b.emit("Cast", [value], to=_INT64)
    made = b.emit_all("Unique", [value], outputs=3, sorted=0)
    b.write(op.outputs[0], b.emit("Cast", [made[0]], to=int(kind)))
    b.write(op.outputs[1], b.emit("Cast", [made[2]], to=int(b.type_of(op.outputs[1]))))


def non_max_suppression(b: GraphBuilder, op: OperatorCall) -> None:
    """NON_MAX_SUPPRESSION_V4 and V5: indices of boxes, padded with zeros to the requested number. V5 also gives scores.
    ONNX has no soft suppression."""
    is_soft = op.name.endswith("V5")
    if is_soft:
        sigma = b.numbers(op.input(5))
        if sigma is None or sigma.any():
            raise Unsupported("NON_MAX_SUPPRESSION_V5 with a sigma other than 0 has no like in ONNX")
    scores, most = b.read(op.input(1)), b.emit("Reshape", [long_list(b, op.input(2)), b.ints([1])])
    inputs = [b.emit("Unsqueeze", [b.read(op.input(0)), b.ints([0])]), b.emit("Unsqueeze", [scores, b.ints([0, 1])])]
    limits = [b.emit("Reshape", [b.read(op.input(k)), b.ints([1])]) for k in (3, 4)]
    found = b.emit("NonMaxSuppression", [*inputs, most, *limits])
    picked = b.emit("Reshape", [b.emit("Gather", [found, b.ints([2])], axis=1), b.ints([-1])])
    count = b.emit("Shape", [picked])
    amounts = b.emit("Concat", [b.ints([0]), b.emit("Sub", [most, count])], axis=0)
    b.write(op.outputs[0], b.emit("Cast", [b.emit("Pad", [picked, amounts])], to=_INT32))
    if is_soft:
        b.write(op.outputs[1], b.emit("Pad", [b.emit("Gather", [scores, picked]), amounts]))
    number = b.emit("Reshape", [b.emit("Cast", [count], to=_INT32), b.ints([])])
    b.write(op.outputs[-1], number)


def bucketize(b: GraphBuilder, op: OperatorCall) -> None:
    """BUCKETIZE: the number of boundaries that an element is not below."""
    boundaries = b.constant(np.asarray(op.options.numbers("boundaries"), np.float64), name="boundaries")
    value = b.emit("Cast", [b.read(op.input(0))], to=int(ir.DataType.DOUBLE))
    reached = b.emit("GreaterOrEqual", [b.emit("Unsqueeze", [value, b.ints([-1])]), boundaries])
    counted = b.emit("ReduceSum", [b.emit("Cast", [reached], to=_INT32), b.ints([-1])], keepdims=0)
    b.write(op.outputs[0], counted)
