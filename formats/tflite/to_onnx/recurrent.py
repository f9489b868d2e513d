"""Recurrent operators. Their states are variables: graph inputs that are zero by default, and graph outputs.

ONNX graphs have no state between runs, so the caller passes the outputs of one run to the next. Layers over a sequence
are a Scan of the cell and not ONNX's LSTM, which has neither a projection nor normalization within the gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall

_GATES = ("input", "forget", "cell", "output")


def svdf(b: GraphBuilder, op: OperatorCall) -> None:
    """SVDF (lite/kernels/internal/reference/svdf.h): inputs are x, the feature weights [F, I], the time weights
    [F, memory], perhaps a bias [units], the state [B, F * memory]. The state moves by one step; F is units * rank."""
    feature, time, state = b.info(op.input(1)).shape, b.info(op.input(2)).shape, op.input(4)
    filters, memory, rank = feature[0], time[1], max(1, op.options.integer("rank"))
    wanted, found = (filters * memory,), b.info(state).shape[1:]
    if found != wanted or filters % rank:
        raise CorruptFile(f"SVDF has a state of {found} for each batch, and {filters} filters: {wanted} is needed")
    before = b.emit("Reshape", [b.variable(state), b.ints([-1, filters, memory])])
    now = b.emit("Gemm", [b.read(op.input(0)), b.read(op.input(1))], transB=1)
    older = b.emit("Slice", [before, b.ints([1]), b.ints([memory]), b.ints([2])])
    after = b.emit("Concat", [older, b.emit("Unsqueeze", [now, b.ints([2])])], axis=2)
    b.assign(state, b.emit("Reshape", [after, b.ints([-1, filters * memory])]))
    sums = b.emit("ReduceSum", [b.emit("Mul", [after, b.read(op.input(2))]), b.ints([2])], keepdims=0)
    if rank > 1:
        grouped = b.emit("Reshape", [sums, b.ints([-1, filters // rank, rank])])
        sums = b.emit("ReduceSum", [grouped, b.ints([2])], keepdims=0)
    if op.input(3) >= 0:
        sums = b.emit("Add", [sums, b.read(op.input(3))])
    b.finish(op, sums)


@dataclass(frozen=True, slots=True, eq=False)
class _Cell:
    """The weights of an LSTM, None if absent. lite/kernels/lstm_shared.h has the positions of the inputs."""

    input: dict[str, ir.Value]
    recurrent: dict[str, ir.Value]
    peephole: dict[str, ir.Value]
    bias: dict[str, ir.Value]
    normalization: dict[str, ir.Value]
    projection: ir.Value | None
    projection_bias: ir.Value | None
    clip: float
    projection_clip: float
    activation: int
    grids: dict[str, int]
    """Tensors whose scales an integer kernel uses for rounding: of the gates before normalization, of the result before
    projection ("hidden"), and of the cell's state ("state")."""

    @classmethod
    def of(cls, b: GraphBuilder, op: OperatorCall) -> _Cell:
        """The weights of an operator with 20 or 24 inputs."""

        def some(first: int, names: tuple[str, ...]) -> dict[str, ir.Value]:
            found = {name: op.input(first + k) for k, name in enumerate(names)}
            return {name: b.read(index) for name, index in found.items() if index >= 0}

        def one(position: int) -> ir.Value | None:
            return b.read(op.input(position)) if op.input(position) >= 0 else None

        return cls(
            some(1, _GATES),
            some(5, _GATES),
            some(9, ("input", "forget", "output")),
            some(12, _GATES),
            some(20, _GATES),
            one(16),
            one(17),
            op.options.number("cell_clip"),
            op.options.number("proj_clip"),
            op.options.integer("fused_activation"),
            dict(zip((*_GATES, "hidden"), op.intermediates, strict=False)) | {"state": op.input(19)},
        )

    def step(self, b: GraphBuilder, x: ir.Value, hidden: ir.Value, cell: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The next hidden and cell states, [B, outputs] and [B, cells]."""
        forget = b.emit("Sigmoid", [self._gate(b, "forget", x, hidden, cell)])
        if "input" in self.input:
            update = b.emit("Sigmoid", [self._gate(b, "input", x, hidden, cell)])
        else:  # coupled to the forget gate
            update = b.emit("Sub", [b.constant(np.float32(1), name="one"), forget])
        candidate = b.activated(self._gate(b, "cell", x, hidden, cell), self.activation)
        kept, added = b.emit("Mul", [forget, cell]), b.emit("Mul", [update, candidate])
        after = b.rounded(self._clipped(b, b.emit("Add", [kept, added]), self.clip), self.grids["state"])
        output = b.emit("Sigmoid", [self._gate(b, "output", x, hidden, after)])
        result = b.emit("Mul", [output, b.activated(after, self.activation)])
        if self.projection is not None:
            result = b.rounded(result, self.grids.get("hidden", -1))
            inputs = [result, self.projection] + ([self.projection_bias] if self.projection_bias is not None else [])
            result = self._clipped(b, b.emit("Gemm", inputs, transB=1), self.projection_clip)
        return result, after

    def _gate(self, b: GraphBuilder, name: str, x: ir.Value, hidden: ir.Value, cell: ir.Value) -> ir.Value:
        of_x = b.emit("Gemm", [x, self.input[name]], transB=1)
        if name in self.normalization:  # an integer kernel saturates each part separately
            of_x = b.rounded(of_x, self.grids.get(name, -1))
        total = b.emit("Add", [of_x, b.emit("Gemm", [hidden, self.recurrent[name]], transB=1)])
        if name in self.peephole:
            total = b.emit("Add", [total, b.emit("Mul", [cell, self.peephole[name]])])
        if name in self.normalization:
            total = _normalized(b, b.rounded(total, self.grids.get(name, -1)))
            total = b.emit("Mul", [total, self.normalization[name]])
        return b.emit("Add", [total, self.bias[name]]) if name in self.bias else total

    def _clipped(self, b: GraphBuilder, value: ir.Value, limit: float) -> ir.Value:
        if not limit:
            return value
        return b.emit("Clip", [value, *(b.constant(np.float32(sign * limit), name="limit") for sign in (-1, 1))])


def _normalized(b: GraphBuilder, value: ir.Value) -> ir.Value:
    """A value with mean 0 and variance 1 along the last axis (MeanStddevNormalization, which adds 1e-8 to the
    variance)."""
    centred = b.emit("Sub", [value, b.reduced("ReduceMean", value, [-1])])
    variance = b.reduced("ReduceMean", b.emit("Mul", [centred, centred]), [-1])
    spread = b.emit("Sqrt", [b.emit("Add", [variance, b.constant(np.float32(1e-8), name="least")])])
    return b.emit("Div", [centred, spread])


def sequence_lstm(b: GraphBuilder, op: OperatorCall) -> None:
    """UNIDIRECTIONAL_SEQUENCE_LSTM: x is [time, B, I] or [B, time, I]; states are inputs 18 and 19."""
    time_axis = 0 if op.options.integer("time_major") else 1
    x, cell = b.read(op.input(0)), _Cell.of(b, op)
    states = [b.variable(op.input(18)), b.variable(op.input(19))]
    inner = b.inner()
    shapes = [b.info(op.input(0)).shape, b.info(op.input(18)).shape, b.info(op.input(19)).shape]
    batch = shapes[0][1 - time_axis]
    hidden, memory, now = (
        inner.argument(name, [batch, shape[-1]])
        for name, shape in (("hidden", shapes[1]), ("memory", shapes[2]), ("now", shapes[0]))
    )
    next_hidden, next_memory = cell.step(inner, now, hidden, memory)
    result = inner.emit("Identity", [next_hidden])
    body = inner.body([hidden, memory, now], [next_hidden, next_memory, result])
    made = b.emit_all(
        "Scan",
        [*states, x],
        outputs=3,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[time_axis],
        scan_output_axes=[time_axis],
    )
    b.assign(op.input(18), made[0])
    b.assign(op.input(19), made[1])
    b.write(op.outputs[0], made[2])


def lstm_cell(b: GraphBuilder, op: OperatorCall) -> None:
    """LSTM, one step: the full kernel (20 or 24 inputs), or the basic one (x, h, weights, bias, c)."""
    if op.options.integer("kernel_type") == 0:
        hidden, memory = _Cell.of(b, op).step(
            b, b.read(op.input(0)), b.variable(op.input(18)), b.variable(op.input(19))
        )
        b.assign(op.input(18), hidden)
        b.assign(op.input(19), memory)
        b.write(op.outputs[0], hidden)
        return
    if len(op.inputs) != 5 or len(op.outputs) != 4:
        raise Unsupported(f"LSTM with {len(op.inputs)} inputs and {len(op.outputs)} outputs is not known")
    joined = b.emit("Concat", [b.read(op.input(0)), b.read(op.input(1))], axis=-1)
    gates = b.emit("Gemm", [joined, b.read(op.input(2)), b.read(op.input(3))], transB=1)
    depth = b.info(op.input(4)).shape[-1]
    update, candidate, forget, output = b.emit_all("Split", [gates, b.ints([depth] * 4)], outputs=4, axis=-1)
    kept = b.emit("Mul", [b.emit("Sigmoid", [forget]), b.read(op.input(4))])
    memory = b.emit("Add", [kept, b.emit("Mul", [b.emit("Sigmoid", [update]), b.emit("Tanh", [candidate])])])
    hidden = b.emit("Mul", [b.emit("Sigmoid", [output]), b.emit("Tanh", [memory])])
    for index, value in zip(op.outputs, (hidden, memory, joined, gates), strict=True):
        b.write(index, value)
