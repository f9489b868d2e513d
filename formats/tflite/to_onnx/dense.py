"""Matrix products: weights keep TFLite's order, [out, in]."""

from __future__ import annotations

import onnx_ir as ir

from nibblecast.converters.errors import Unsupported
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall


def fully_connected(b: GraphBuilder, op: OperatorCall) -> None:
    """FULLY_CONNECTED: the input is reshaped to rows as long as the rows of the weight."""
    weight, result = b.info(op.input(1)), b.info(op.outputs[0])
    if op.options.integer("weights_format"):
        raise Unsupported("FULLY_CONNECTED with shuffled weights is for one kernel only: convert the model again")
    value, shape = b.read(op.input(0)), b.info(op.input(0)).shape
    depth = weight.shape[-1]
    if len(shape) != 2 or shape[-1] != depth:
        value = b.emit("Reshape", [value, b.ints([-1, depth])])
    inputs = [value, b.read(op.input(1))]
    if op.input(2) >= 0:
        inputs.append(b.read(op.input(2)))
    product = b.emit("Gemm", inputs, transB=1)
    if len(result.shape) != 2 or result.shape[-1] != weight.shape[0]:
        if sum(size < 0 for size in result.signature) > 1 and len(shape) == len(result.shape):
            leading = b.emit("Slice", [b.emit("Shape", [b.read(op.input(0))]), b.ints([0]), b.ints([-1])])
            sizes = b.emit("Concat", [leading, b.ints([weight.shape[0]])], axis=0)
        else:
            sizes = b.ints(free_first(b, op.outputs[0]))
        product = b.emit("Reshape", [product, sizes])
    b.finish(op, product)


def batch_matmul(b: GraphBuilder, op: OperatorCall) -> None:
    """BATCH_MATMUL, either side transposed or not."""
    left = _matrix(b, op.input(0), bool(op.options.integer("adj_x")))
    right = _matrix(b, op.input(1), bool(op.options.integer("adj_y")))
    b.write(op.outputs[0], b.emit("MatMul", [left, right]))


def _matrix(b: GraphBuilder, index: int, transposed: bool) -> ir.Value:
    if not transposed:
        return b.read(index)
    rank = len(b.info(index).shape)
    permutation = (*range(rank - 2), rank - 1, rank - 2)
    if b.info(index).constant is not None and index not in b.held:
        return b.weight(index, permutation)
    return b.emit("Transpose", [b.read(index)], perm=permutation)


def free_first(b: GraphBuilder, index: int) -> list[int]:
    """A tensor's shape for a Reshape. The first size that the file leaves open is computed at run time."""
    info = b.info(index)
    sizes = list(info.shape)
    open_axes = [axis for axis, size in enumerate(info.signature) if size < 0]
    if open_axes:
        sizes[open_axes[0]] = -1
    return sizes
