"""One-operator models for the TFLite Micro interpreter of the `tflite-micro` wheel, and the same operator in NumPy with
the multipliers that this package computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

import nibblecast
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.device.fixed_point import fixed_point

VERSIONS = {"FULLY_CONNECTED": 4, "CONV_2D": 5, "DEPTHWISE_CONV_2D": 6}
CHANNEL_AXES = {"FULLY_CONNECTED": 0, "CONV_2D": 0, "DEPTHWISE_CONV_2D": 3}


@dataclass(frozen=True, slots=True)
class Case:
    """An operator: codes, and the scale and zero point of its input, its weight and its output. The convolutions have
    stride 1 and no padding; `bits` are those of the weight, `width` those of the activations."""

    operator: str
    bits: int
    data: NDArray[Any]
    weight: NDArray[np.int8]
    bias: NDArray[Any]
    input_scale: np.float32
    input_zero_point: int
    weight_scales: NDArray[np.float32]
    output_scale: np.float32
    output_zero_point: int
    output_shape: tuple[int, ...]

    @property
    def depth_multiplier(self) -> int:
        return self.weight.shape[-1] // self.data.shape[-1]


def random_case(operator: str, bits: int, rng: np.random.Generator, *, per_tensor: bool, wide: bool = False) -> Case:
    """Sizes, scales and codes at random, with outputs that use the range of int8 (int16 if `wide`)."""
    height, width, channels, outputs = (int(size) for size in rng.integers(1, 4, 4))
    outputs += 1  # a single one would be per-tensor
    if operator == "FULLY_CONNECTED":
        channels = int(rng.integers(1, 40))
        weight_shape, data_shape = (outputs, channels), (int(rng.integers(1, 3)), channels)
        output_shape, depth = (data_shape[0], outputs), channels
    else:
        size = (1, height + int(rng.integers(0, 4)), width + int(rng.integers(0, 4)), channels)
        data_shape = size
        if operator == "CONV_2D":
            weight_shape, depth = (outputs, height, width, channels), height * width * channels
        else:
            outputs = int(channels * rng.integers(1, 3))
            weight_shape, depth = (1, height, width, outputs), height * width
        output_shape = (1, size[1] - height + 1, size[2] - width + 1, outputs)
    activation = np.int16 if wide else np.int8
    limits = np.iinfo(activation)
    top = (1 << bits - 1) - 1
    count = 1 if per_tensor else outputs
    input_scale = np.float32(10 ** rng.uniform(-4, 1))
    weight_scales = (10 ** (rng.uniform(-4, 0) + rng.uniform(-1, 0, count))).astype(np.float32)
    spread = float(weight_scales.max()) * float(input_scale) * top * limits.max * np.sqrt(depth)
    output_scale = np.float32(spread / limits.max * 10 ** rng.uniform(-0.5, 0.5))
    zero_points = [0, 0] if wide else rng.integers(-128, 128, 2).tolist()
    bias = rng.integers(-limits.max * top, limits.max * top, outputs)
    return Case(
        operator,
        bits,
        rng.integers(limits.min, limits.max + 1, data_shape).astype(activation),
        rng.integers(-top - (bits == 4), top + 1, weight_shape).astype(np.int8),
        bias.astype(np.int64 if wide else np.int32),
        input_scale,
        zero_points[0],
        weight_scales,
        output_scale,
        zero_points[1],
        tuple(int(size) for size in output_shape),
    )


def edge_case(operator: str, rng: np.random.Generator, folder: Path, *, per_tensor: bool, above: bool) -> Case:
    """A case whose results change when any multiplier is one less (`above`) or one more (not `above`).

    The data are the zero point, so that accumulators are the biases, and these are chosen next to a change: real
    multipliers are around 2 ** -24 and accumulators around 2 ** 31, so that one unit of the multiplier is one unit
    before the shift by 24 bits.
    """
    outputs, channels, shift = 48, 2 if operator != "DEPTHWISE_CONV_2D" else 48, 24
    count = 1 if per_tensor else outputs
    input_scale, output_scale = (np.float32(10 ** rng.uniform(-3, 1)) for _ in range(2))
    real = 2.0**-shift * rng.uniform(0.5, 1, count)
    weight_shape = {"FULLY_CONNECTED": (outputs, channels), "CONV_2D": (outputs, 1, 1, channels)}
    data_shape = (1, channels) if operator == "FULLY_CONNECTED" else (1, 1, 1, channels)
    case = Case(
        operator,
        4 if per_tensor or operator != "FULLY_CONNECTED" else 8,
        np.full(data_shape, 5, np.int8),
        np.ones(weight_shape.get(operator, (1, 1, 1, outputs)), np.int8),
        np.zeros(outputs, np.int32),
        input_scale,
        5,
        (real * float(output_scale) / float(input_scale)).astype(np.float32),
        output_scale,
        0,
        (1, outputs) if operator == "FULLY_CONNECTED" else (1, 1, 1, outputs),
    )
    found = fixed_point(read_weight(model_bytes(case), folder))
    assert found is not None
    multipliers = np.broadcast_to(found.multipliers().astype(np.int64), (outputs,))
    edges = ((multipliers * 126 >> 31) << shift) + (1 << shift - 1)  # the least that are rounded up
    twice = ((2 * edges - 1) << 30) + multipliers - 1
    biases = twice // multipliers - (0 if above else 1)
    return replace(case, bias=biases.astype(np.int32))


def model_bytes(case: Case) -> bytes:
    """The case as a .tflite."""
    from tflite_micro import runtime

    s = runtime.schema_fb
    types = {"int8": s.TensorType.INT8, "int16": s.TensorType.INT16, "int32": s.TensorType.INT32}
    types |= {"int64": s.TensorType.INT64, "float32": s.TensorType.FLOAT32}
    activation = types[case.data.dtype.name]
    outputs = case.bias.size
    per_channel = np.broadcast_to(case.weight_scales, (outputs,)) if case.weight_scales.size > 1 else case.weight_scales
    packed = pack(case.weight.view(np.uint8).reshape(-1) & 15, 4) if case.bits == 4 else case.weight
    weight_type = s.TensorType.INT4 if case.bits == 4 else s.TensorType.INT8
    axis = CHANNEL_AXES[case.operator]
    bias_scales = per_channel * case.input_scale
    zeros = [0] * per_channel.size
    tensors = [
        _tensor(s, "input", case.data.shape, activation, 1, [case.input_scale], [case.input_zero_point]),
        _tensor(s, "weight", case.weight.shape, weight_type, 2, per_channel, zeros, axis),
        _tensor(s, "bias", (outputs,), types[case.bias.dtype.name], 3, bias_scales, zeros),
        _tensor(s, "output", case.output_shape, activation, 4, [case.output_scale], [case.output_zero_point]),
    ]
    graph = s.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.name = tensors, [0], [3], "main"
    graph.operators = [_operator(s, case)]
    model = s.ModelT()
    model.version, model.subgraphs = 3, [graph]
    code = s.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(s.BuiltinOperator, case.operator)
    code.version = VERSIONS[case.operator]
    model.operatorCodes = [code]
    payloads = [b"", b"", packed.tobytes(), case.bias.tobytes(), b""]
    model.buffers = [_buffer(s, payload) for payload in payloads]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run_in_tflm(model: bytes, data: NDArray[Any]) -> NDArray[Any]:
    """What the interpreter computes; RuntimeError where it refuses the model."""
    from tflite_micro import runtime

    interpreter = runtime.Interpreter.from_bytes(model, arena_size=1 << 17)
    interpreter.set_input(data, 0)
    interpreter.invoke()
    return interpreter.get_output(0)


def print_allocations(model: bytes) -> None:
    """Has the interpreter say, on stderr, what it took of its arena."""
    from tflite_micro import runtime

    runtime.Interpreter.from_bytes(model, arena_size=1 << 17).print_allocations()


def read_weight(model: bytes, folder: Path) -> Tensor:
    """The weight, as this project's own reader sees it."""
    path = folder / "case.tflite"
    path.write_bytes(model)
    return nibblecast.load(path)["weight"]


def run_in_numpy(case: Case, weight: Tensor, error: int = 0) -> NDArray[Any]:
    """The operator on integers alone, with the multipliers of `weight`, to which `error` is added."""
    found = fixed_point(weight)
    assert found is not None
    data = case.data.astype(np.int64) + found.input_offset
    codes = weight.codes().astype(np.int64)
    accumulators = ACCUMULATE[case.operator](data, codes, case) + case.bias
    requantize = _requantize_int16 if case.data.dtype == np.int16 else _requantize
    multipliers, shifts = (array.astype(np.int64) for array in (found.multipliers() + error, found.shifts()))
    scaled = requantize(accumulators, multipliers, shifts) + found.output_offset
    limits = np.iinfo(case.data.dtype)
    return np.clip(scaled, limits.min, limits.max).astype(case.data.dtype)


def _requantize(
    accumulators: NDArray[np.int64], multiplier: NDArray[np.int64], shift: NDArray[np.int64]
) -> NDArray[np.int64]:
    """gemmlowp's SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT: it rounds twice."""
    product = (accumulators << np.maximum(shift, 0)) * multiplier
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.sign(product + nudge) * (np.abs(product + nudge) >> 31)  # C's division: towards zero
    right = np.maximum(-shift, 0)
    mask = (np.int64(1) << right) - 1
    remainder = high & mask
    return (high >> right) + (remainder > (mask >> 1) + (high < 0))


def _requantize_int16(
    accumulators: NDArray[np.int64], multiplier: NDArray[np.int64], shift: NDArray[np.int64]
) -> NDArray[np.int64]:
    """MultiplyByQuantizedMultiplier of an int64: the multiplier in 16 bits, one rounding."""
    reduced = np.where(multiplier < 0x7FFF0000, (multiplier + (1 << 15)) >> 16, 0x7FFF)
    total = 15 - shift
    return (accumulators * reduced + (np.int64(1) << (total - 1))) >> total


def _fully_connected(data: NDArray[Any], codes: NDArray[Any], case: Case) -> NDArray[Any]:
    return data @ codes.T


def _windows(data: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Shape (1, rows, columns, C, height, width)."""
    return np.lib.stride_tricks.sliding_window_view(data, (height, width), (1, 2))


def _conv(data: NDArray[Any], codes: NDArray[Any], case: Case) -> NDArray[Any]:
    groups = data.shape[-1] // codes.shape[-1]
    parts = zip(np.split(data, groups, 3), np.split(codes, groups, 0), strict=True)
    windows = ((_windows(part, *codes.shape[1:3]), own) for part, own in parts)
    return np.concatenate([np.einsum("byxchw,ohwc->byxo", part, own) for part, own in windows], axis=3)


def _depthwise(data: NDArray[Any], codes: NDArray[Any], case: Case) -> NDArray[Any]:
    repeated = np.repeat(data, case.depth_multiplier, axis=3)
    return np.einsum("byxchw,hwc->byxc", _windows(repeated, *codes.shape[1:3]), codes[0])


ACCUMULATE = {"FULLY_CONNECTED": _fully_connected, "CONV_2D": _conv, "DEPTHWISE_CONV_2D": _depthwise}


def _operator(s: Any, case: Case) -> Any:
    operator = s.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1, 2], [3]
    if case.operator == "FULLY_CONNECTED":
        options = s.FullyConnectedOptionsT()
        operator.builtinOptionsType = s.BuiltinOptions.FullyConnectedOptions
    else:
        options = s.Conv2DOptionsT() if case.operator == "CONV_2D" else s.DepthwiseConv2DOptionsT()
        name = "Conv2DOptions" if case.operator == "CONV_2D" else "DepthwiseConv2DOptions"
        operator.builtinOptionsType = getattr(s.BuiltinOptions, name)
        options.strideW = options.strideH = 1
        options.padding = s.Padding.VALID
        if case.operator == "DEPTHWISE_CONV_2D":
            options.depthMultiplier = case.depth_multiplier
    operator.builtinOptions = options
    return operator


def _tensor(
    s: Any, name: str, shape: Any, type: int, buffer: int, scale: Any, zero_point: list[int], axis: int = 0
) -> Any:
    tensor = s.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, [int(size) for size in shape], type, buffer
    tensor.hasRank = True
    quantization = s.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = [float(value) for value in scale], zero_point
    quantization.quantizedDimension = axis
    tensor.quantization = quantization
    return tensor


def _buffer(s: Any, payload: bytes) -> Any:
    buffer = s.BufferT()
    buffer.data = np.frombuffer(payload, np.uint8) if payload else None
    return buffer
