"""Operators that change how a tensor is stored: quantized or not, sparse or not, of another type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from nibblecast.converters.errors import CorruptFile
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall

_MOST_BITS = 16  # lite/kernels/fake_quant.cc


def unpacked(b: GraphBuilder, op: OperatorCall) -> None:
    """DEQUANTIZE and DENSIFY: a constant becomes the same constant as floats. Other values are floats already."""
    source = b.info(op.input(0))
    if source.constant is not None and op.input(0) not in b.held:
        result = b.info(op.outputs[0])
        b.tensors[op.outputs[0]] = replace(result, constant=source.constant, scale=None)
    elif b.is_first(op.input(0)):
        b.write(op.outputs[0], b.read_first(op.input(0)), first=True)
    else:
        b.write(op.outputs[0], b.read(op.input(0)))


def quantize(b: GraphBuilder, op: OperatorCall) -> None:
    """QUANTIZE: from floats or from other codes to the scale and zero point of the result."""
    first = b.is_first(op.input(0))
    b.write(op.outputs[0], b.read_first(op.input(0)) if first else b.read(op.input(0)), first=first)


def cast(b: GraphBuilder, op: OperatorCall) -> None:
    """CAST."""
    dtype = ir.DataType.from_numpy(b.info(op.outputs[0]).dtype)
    first = b.is_first(op.input(0))
    value = b.read_first(op.input(0)) if first else b.read(op.input(0))
    b.write(op.outputs[0], b.emit("Cast", [value], to=int(dtype)), first=first)


def fake_quant(b: GraphBuilder, op: OperatorCall) -> None:
    """FAKE_QUANT (lite/kernels/internal/reference/fake_quant.h): rounds to the nearest of 2 ** num_bits values from min
    to max. The range is shifted so that 0 is one of these values."""
    options = op.options
    bits = options.integer("num_bits")
    if not 1 <= bits <= _MOST_BITS:
        raise CorruptFile(f"FAKE_QUANT to {bits} bits: 1 to {_MOST_BITS} are possible")
    lowest, highest = options.integer("narrow_range"), (1 << bits) - 1
    low, high = np.float32(options.number("min")), np.float32(options.number("max"))
    scale = (high - low) / np.float32(highest - lowest)
    zero_point = np.floor(np.clip(lowest - low / scale, lowest, highest) + np.float32(0.5))
    first = b.is_first(op.input(0))
    value = b.read_first(op.input(0)) if first else b.read(op.input(0))

    def number(value: float | np.floating[Any]) -> ir.Value:
        return b.constant(np.float32(value), name="number")

    start, end = (number((code - zero_point) * scale) for code in (lowest, highest))
    above = b.emit("Sub", [b.emit("Clip", [value, start, end]), start])
    steps = b.emit("Floor", [b.emit("Add", [b.emit("Mul", [above, number(1 / scale)]), number(0.5)])])
    b.write(op.outputs[0], b.emit("Add", [b.emit("Mul", [steps, number(scale)]), start]), first=first)


def zeros_like(b: GraphBuilder, op: OperatorCall) -> None:
    """ZEROS_LIKE."""
    value = b.read(op.input(0))
    zero = np.zeros(1, np.float32 if b.info(op.input(0)).is_quantized else b.info(op.input(0)).dtype)
    b.write(op.outputs[0], b.emit("ConstantOfShape", [b.emit("Shape", [value])], value=ir.tensor(zero)))
