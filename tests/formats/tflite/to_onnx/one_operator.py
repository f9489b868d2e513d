"""TFLite models of one operator, made with LiteRT's own schema classes, and what LiteRT computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as official
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

Array = NDArray[Any]
TYPES = {
    np.dtype(name): getattr(official.TensorType, name.upper())
    for name in ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
}


@dataclass(frozen=True)
class Case:
    """An operator, its options, its inputs, and how its first results are quantized. Inputs that are in `constant` are
    constants of the model; `quantized` gives (scale, zero point) by input."""

    operator: str
    inputs: Sequence[Array]
    options: Mapping[str, Any] = field(default_factory=dict)
    constant: Sequence[int] = ()
    quantized: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    result: np.dtype[Any] | type = np.float32
    result_quantized: tuple[float, int] | None = None
    results: int = 1
    second_result: type | None = None
    version: int = 1
    optimized: bool = False

    def __str__(self) -> str:
        extra = "-".join(f"{key}={value}" for key, value in self.options.items() if not isinstance(value, list))
        dtype = np.dtype(self.inputs[0].dtype).name if self.inputs else ""
        return "-".join(part for part in (self.operator, dtype, extra) if part)


def _quantization(scale: float, zero_point: int) -> Any:
    made = official.QuantizationParametersT()
    made.scale, made.zeroPoint = [scale], [zero_point]
    return made


def options_class(operator: str) -> str:
    """The name of the table of an operator's options in the official schema."""
    special = {
        "ARG_MAX": "ArgMaxOptions",
        "ARG_MIN": "ArgMinOptions",
        "AVERAGE_POOL_2D": "Pool2DOptions",
        "BATCH_MATMUL": "BatchMatMulOptions",
        "CALL_ONCE": "CallOnceOptions",
        "CONV_2D": "Conv2DOptions",
        "CONV_3D": "Conv3DOptions",
        "CONV_3D_TRANSPOSE": "Conv3DOptions",
        "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
        "L2_NORMALIZATION": "L2NormOptions",
        "L2_POOL_2D": "Pool2DOptions",
        "LOCAL_RESPONSE_NORMALIZATION": "LocalResponseNormalizationOptions",
        "LSTM": "LSTMOptions",
        "MAX_POOL_2D": "Pool2DOptions",
        "STABLEHLO_COMPOSITE": "StableHLOCompositeOptions",
        "SVDF": "SVDFOptions",
        "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTMOptions",
        **dict.fromkeys(
            "MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD REDUCE_ALL REDUCE_ANY".split(),
            "ReducerOptions",
        ),
    }
    return special.get(operator) or "".join(word.capitalize() for word in operator.split("_")) + "Options"


def model(case: Case, shapes: Sequence[Sequence[int]] | None = None) -> bytes:
    """The model; the results' shapes are what LiteRT finds them to be, unless they are given."""
    buffers, tensors = [official.BufferT()], []
    for position, array in enumerate(case.inputs):
        tensor = official.TensorT()
        tensor.name, tensor.shape, tensor.type = f"input_{position}", list(array.shape), TYPES[array.dtype]
        if position in case.constant:
            buffer = official.BufferT()
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            tensor.buffer = len(buffers)
            buffers.append(buffer)
        if position in case.quantized:
            tensor.quantization = _quantization(*case.quantized[position])
        tensors.append(tensor)
    for position in range(case.results):
        tensor = official.TensorT()
        dtype = case.second_result if position and case.second_result else case.result
        tensor.name, tensor.type = f"result_{position}", TYPES[np.dtype(dtype)]
        tensor.shape = [] if shapes is None else list(shapes[position])
        if case.result_quantized is not None:
            tensor.quantization = _quantization(*case.result_quantized)
        tensors.append(tensor)
    operator, code = official.OperatorT(), official.OperatorCodeT()
    operator.inputs = list(range(len(case.inputs)))
    operator.outputs = list(range(len(case.inputs), len(tensors)))
    name = options_class(case.operator)
    if hasattr(official, f"{name}T"):
        options = getattr(official, f"{name}T")()
        for key, value in case.options.items():
            assert hasattr(options, key), f"{name} has no {key}"
            setattr(options, key, value)
        operator.builtinOptionsType = getattr(official.BuiltinOptions, name)
        operator.builtinOptions = options
    code.builtinCode = getattr(official.BuiltinOperator, case.operator)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = case.version
    graph = official.SubGraphT()
    graph.tensors, graph.operators, graph.name = tensors, [operator], "main"
    graph.inputs = [position for position in range(len(case.inputs)) if position not in case.constant]
    graph.outputs = list(operator.outputs)
    made = official.ModelT()
    made.version, made.subgraphs, made.buffers, made.operatorCodes = 3, [graph], buffers, [code]
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), file_identifier=b"TFL3")
    content = bytes(builder.Output())
    if shapes is None:
        return model(case, [result.shape for result in run(content, case)])
    return content


def fed(case: Case) -> dict[str, Array]:
    """The inputs that are no constants, by name."""
    return {f"input_{k}": array for k, array in enumerate(case.inputs) if k not in case.constant}


def run(content: bytes, case: Case) -> list[Array]:
    """What LiteRT's reference kernels compute; the default ones where the case wants those, or there are no others."""
    resolvers = [OpResolverType.BUILTIN] if case.optimized else [OpResolverType.BUILTIN_REF, OpResolverType.BUILTIN]
    for resolver in resolvers:
        try:
            interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
            interpreter.allocate_tensors()
            break
        except ValueError:  # no kernel
            if resolver is resolvers[-1]:
                raise
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], fed(case)[detail["name"]])
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
