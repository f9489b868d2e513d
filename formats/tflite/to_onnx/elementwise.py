"""Operators that compute each element independently: activations, arithmetic, comparisons, selections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from nibblecast.formats.tflite.to_onnx.builder import TO_FIRST, GraphBuilder, OperatorCall

Lowering = Callable[[GraphBuilder, OperatorCall], None]


def unary(operator: str) -> Lowering:
    """One ONNX operator on one input."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        value, first = _either(b, op.input(0))
        b.write(op.outputs[0], b.emit(operator, [value]), first=first)

    return lower


def binary(operator: str, *, fused: bool = False) -> Lowering:
    """One ONNX operator on two inputs that broadcast."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        values, first = aligned(b, op.inputs[:2])
        value = b.emit(operator, values)
        if fused:
            b.finish(op, value, first=first)
        else:
            b.write(op.outputs[0], value, first=first)

    return lower


def negated(lowering: str) -> Lowering:
    """A comparison and Not."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        values, first = aligned(b, op.inputs[:2])
        b.write(op.outputs[0], b.emit("Not", [b.emit(lowering, values)]), first=first)

    return lower


def aligned(b: GraphBuilder, indices: Sequence[int]) -> tuple[list[ir.Value], bool]:
    """Inputs that broadcast against each other, all channels last or all channels first, and whether they are first."""
    rank = max(len(b.info(index).shape) for index in indices)
    if rank in TO_FIRST and any(b.is_first(index) for index in indices):
        values = [_broadcast_first(b, index, rank) for index in indices]
        if all(value is not None for value in values):
            return [value for value in values if value is not None], True
    return [b.read(index) for index in indices], False


def _broadcast_first(b: GraphBuilder, index: int, rank: int) -> ir.Value | None:
    """An input in a shape that broadcasts to channels-first values of `rank`; None if a reshape is not enough."""
    shape = b.info(index).shape
    if len(shape) == rank:
        return b.read_first(index)
    if all(size == 1 for size in shape):
        return b.read(index)
    if len(shape) == 1:  # one for each channel
        return b.emit("Reshape", [b.read(index), b.ints([shape[0], *(1,) * (rank - 2)])])
    return None


def _either(b: GraphBuilder, index: int) -> tuple[ir.Value, bool]:
    return (b.read_first(index), True) if b.is_first(index) else (b.read(index), False)


def reciprocal_square_root(b: GraphBuilder, op: OperatorCall) -> None:
    """RSQRT."""
    value, first = _either(b, op.input(0))
    b.write(op.outputs[0], b.emit("Reciprocal", [b.emit("Sqrt", [value])]), first=first)


def square(b: GraphBuilder, op: OperatorCall) -> None:
    """SQUARE."""
    value, first = _either(b, op.input(0))
    b.write(op.outputs[0], b.emit("Mul", [value, value]), first=first)


def squared_difference(b: GraphBuilder, op: OperatorCall) -> None:
    """SQUARED_DIFFERENCE."""
    values, first = aligned(b, op.inputs[:2])
    difference = b.emit("Sub", values)
    b.write(op.outputs[0], b.emit("Mul", [difference, difference]), first=first)


def add_n(b: GraphBuilder, op: OperatorCall) -> None:
    """ADD_N."""
    values, first = aligned(b, op.inputs)
    b.write(op.outputs[0], b.emit("Sum", values), first=first)


def clipped(low: float, high: float | None) -> Lowering:
    """RELU6, RELU_N1_TO_1, RELU_0_TO_1."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        value, first = _either(b, op.input(0))
        limits = [b.constant(np.float32(limit), name="limit") for limit in (low, high) if limit is not None]
        b.write(op.outputs[0], b.emit("Clip", [value, *limits]), first=first)

    return lower


def leaky_relu(b: GraphBuilder, op: OperatorCall) -> None:
    """LEAKY_RELU."""
    value, first = _either(b, op.input(0))
    alpha = op.options.number("alpha")
    b.write(op.outputs[0], b.emit("LeakyRelu", [value], alpha=alpha), first=first)


def hard_swish(b: GraphBuilder, op: OperatorCall) -> None:
    """HARD_SWISH: x * relu6(x + 3) / 6."""
    value, first = _either(b, op.input(0))
    if b.opset >= 14:
        result = b.emit("HardSwish", [value])
    else:
        result = b.emit("Mul", [value, b.emit("HardSigmoid", [value], alpha=1 / 6, beta=0.5)])
    b.write(op.outputs[0], result, first=first)


def gelu(b: GraphBuilder, op: OperatorCall) -> None:
    """GELU, exact or by tanh. Before opset 20, which has Gelu, it is made of other operators."""
    value, first = _either(b, op.input(0))
    approximate = bool(op.options.integer("approximate"))
    if b.opset >= 20:
        result = b.emit("Gelu", [value], approximate="tanh" if approximate else "none")
    else:
        result = _gelu(b, value, approximate=approximate)
    b.write(op.outputs[0], result, first=first)


def _gelu(b: GraphBuilder, value: ir.Value, *, approximate: bool) -> ir.Value:
    def number(x: float) -> ir.Value:
        return b.constant(np.float32(x), name="number")

    if approximate:
        cube = b.emit("Mul", [b.emit("Mul", [value, value]), value])
        inner = b.emit("Add", [value, b.emit("Mul", [cube, number(0.044715)])])
        half = b.emit("Tanh", [b.emit("Mul", [inner, number(np.sqrt(2 / np.pi))])])
    else:
        half = b.emit("Erf", [b.emit("Mul", [value, number(np.sqrt(0.5))])])
    return b.emit("Mul", [b.emit("Mul", [value, number(0.5)]), b.emit("Add", [half, number(1.0)])])


def prelu(b: GraphBuilder, op: OperatorCall) -> None:
    """PRELU: alpha broadcasts to one image, [H, W, C] or [1, 1, C]."""
    alpha = b.info(op.input(1))
    if not b.is_first(op.input(0)):
        b.write(op.outputs[0], b.emit("PRelu", [b.read(op.input(0)), b.read(op.input(1))]))
        return
    if len(alpha.shape) == 3 and alpha.constant is not None:
        slope = b.weight(op.input(1), (2, 0, 1))
    else:
        slope = _broadcast_first(b, op.input(1), 4) or b.read(op.input(1))
    b.write(op.outputs[0], b.emit("PRelu", [b.read_first(op.input(0)), slope]), first=True)


def softmax(b: GraphBuilder, op: OperatorCall) -> None:
    """SOFTMAX along the last axis."""
    value, beta = b.read(op.input(0)), op.options.number("beta")
    if beta != 1.0:
        value = b.emit("Mul", [value, b.constant(np.float32(beta), name="beta")])
    b.write(op.outputs[0], b.emit("Softmax", [value], axis=-1))


def log_softmax(b: GraphBuilder, op: OperatorCall) -> None:
    """LOG_SOFTMAX along the last axis."""
    b.write(op.outputs[0], b.emit("LogSoftmax", [b.read(op.input(0))], axis=-1))


def floor_div(b: GraphBuilder, op: OperatorCall) -> None:
    """FLOOR_DIV, towards minus infinity for integers as well."""
    values, first = aligned(b, op.inputs[:2])
    dtype = b.info(op.input(0)).dtype
    if dtype.kind == "f" or b.info(op.input(0)).is_quantized:
        result = b.emit("Floor", [b.emit("Div", values)])
    else:  # (a - mod(a, b)) / b, where Mod has the sign of the divisor
        rest = b.emit("Mod", values)
        result = b.emit("Div", [b.emit("Sub", [values[0], rest]), values[1]])
    b.write(op.outputs[0], result, first=first)


def floor_mod(b: GraphBuilder, op: OperatorCall) -> None:
    """FLOOR_MOD: the result has the sign of the divisor."""
    values, first = aligned(b, op.inputs[:2])
    if b.info(op.input(0)).dtype.kind == "f" or b.info(op.input(0)).is_quantized:
        quotient = b.emit("Floor", [b.emit("Div", values)])
        result = b.emit("Sub", [values[0], b.emit("Mul", [quotient, values[1]])])
    else:
        result = b.emit("Mod", values)
    b.write(op.outputs[0], result, first=first)


def right_shift(b: GraphBuilder, op: OperatorCall) -> None:
    """RIGHT_SHIFT by at most all bits but one. BitShift does not take signed integers; these are divided by a power of
    two, rounded towards minus infinity."""
    (value, amount), first = aligned(b, op.inputs[:2])
    dtype, kind = b.info(op.input(0)).dtype, int(b.type_of(op.input(0)))
    long = int(ir.DataType.INT64)
    limits = [b.constant(np.int64(limit), name="limit") for limit in (0, 8 * dtype.itemsize - 1)]
    amount = b.emit("Clip", [b.emit("Cast", [amount], to=long), *limits])
    if dtype.kind == "u":
        result = b.emit("BitShift", [value, b.emit("Cast", [amount], to=kind)], direction="RIGHT")
    else:
        value = b.emit("Cast", [value], to=long)
        power = b.emit("Pow", [b.constant(np.int64(2), name="two"), amount])
        rest = b.emit("Mod", [value, power])
        result = b.emit("Cast", [b.emit("Div", [b.emit("Sub", [value, rest]), power])], to=kind)
    b.write(op.outputs[0], result, first=first)


def select(b: GraphBuilder, op: OperatorCall) -> None:
    """SELECT and SELECT_V2. The condition of SELECT may have one value for each row."""
    condition, shape = b.info(op.input(0)).shape, b.info(op.input(1)).shape
    if op.name == "SELECT" and len(condition) == 1 and len(shape) > 1:
        rows = b.emit("Reshape", [b.read(op.input(0)), b.ints([condition[0], *(1,) * (len(shape) - 1)])])
        b.write(op.outputs[0], b.emit("Where", [rows, b.read(op.input(1)), b.read(op.input(2))]))
        return
    values, first = aligned(b, op.inputs[:3])
    b.write(op.outputs[0], b.emit("Where", values), first=first)


def l2_normalization(b: GraphBuilder, op: OperatorCall) -> None:
    """L2_NORMALIZATION along the last axis. The reference kernel keeps the norm above 1e-6."""
    value = b.read(op.input(0))
    squares = b.emit("Mul", [value, value])
    norm = b.emit("Sqrt", [b.emit("ReduceSum", [squares, b.ints([-1])], keepdims=1)])
    b.finish(op, b.emit("Div", [value, b.emit("Max", [norm, b.constant(np.float32(1e-6), name="least")])]))


def local_response_normalization(b: GraphBuilder, op: OperatorCall) -> None:
    """LOCAL_RESPONSE_NORMALIZATION over channels. TFLite's alpha is for each channel, ONNX's for the whole window."""
    options, window = op.options, 2 * op.options.integer("radius") + 1
    alpha, beta, bias = (options.number(name) for name in ("alpha", "beta", "bias"))
    value = b.emit("LRN", [b.read_first(op.input(0))], size=window, bias=bias, alpha=alpha * window, beta=beta)
    b.write(op.outputs[0], value, first=True)


def arc_tangent_2(b: GraphBuilder, op: OperatorCall) -> None:
    """ATAN2: the angle of (x, y); y is the first input."""
    (y, x), first = aligned(b, op.inputs[:2])

    def number(value: float) -> ir.Value:
        return b.constant(np.float32(value), name="number")

    zero, pi = number(0.0), number(np.pi)
    is_zero = b.emit("Equal", [x, zero])
    angle = b.emit("Atan", [b.emit("Div", [y, b.emit("Where", [is_zero, number(1.0), x])])])
    turn = b.emit("Where", [b.emit("Less", [y, zero]), number(-np.pi), pi])
    angle = b.emit("Where", [b.emit("Less", [x, zero]), b.emit("Add", [angle, turn]), angle])
    upright = b.emit("Mul", [b.emit("Sign", [y]), number(np.pi / 2)])
    b.write(op.outputs[0], b.emit("Where", [is_zero, upright, angle]), first=first)
