"""The graph of a TFLite file, for writers that can hold one. Nothing of it is read until a writer asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32, INT8, INT16, bits_of, in_range, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.shapes import MOST_DIMENSIONS
from nibblecast.converters.ir import Tensor, WeightPlace
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.options import OPTIONS, Options

if TYPE_CHECKING:
    import onnx_ir as ir

    from nibblecast.formats.tflite.to_onnx.builder import OperatorCall, TensorInfo
    from nibblecast.formats.tflite.to_onnx.graph import Subgraph

_LARGEST_METADATA = 1 << 16
#: A tensor by subgraph and index.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class TFLiteGraph:
    """The subgraphs of one model. `operators` are the names of its operator codes, `constants` the model's tensors by
    subgraph and index. `allowance` is the part of the model's allowance that the tensors leave."""

    model: schema.Model
    operators: list[str]
    constants: Mapping[Key, Tensor]
    allowance: Allowance

    @property
    def signatures(self) -> Mapping[str, int]:
        """The subgraphs by the names of the file's signatures."""
        return {found.signature_key or "": found.subgraph_index for found in self.model.signature_defs}

    @property
    def preferred_opset(self) -> int:
        """21, which has int16 codes; 20 if some activations are int8 and none is int16. In opset 21, onnxruntime 1.32
        on x86-64 makes a model invalid by its optimizations if int8 activations are reshaped, transposed or sliced."""
        self.model.flatbuffer.renew()
        codes = {
            _dtype(table)
            for at, graph in enumerate(self.model.subgraphs)
            for index, table in enumerate(graph.tensors)
            if table.quantization is not None and table.quantization.scale is not None
            if (at, index) not in self.constants
        }
        return 20 if INT8 in codes and INT16 not in codes else 21

    def onnx_ir(self) -> ir.Model:
        """The main graph in ONNX's operators. Weights are decoded to floats when they are read."""
        return self.lowered(opset=self.preferred_opset)[0]

    def lowered(
        self,
        *,
        opset: int,
        signature: str = "",
        channels_first: bool = False,
        custom_domain: str = "",
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[ir.Model, Mapping[str, WeightPlace]]:
        """The graph of a signature (empty: the first subgraph) in an operator set of ONNX, and which of its
        initializers are the model's weights. Images at inputs and outputs are channels first if that is wanted.
        Operators without a lowering go to `custom_domain`; Unsupported is raised if that is empty. Activations that
        TFLite quantizes become floats if `weights`, the model's weights after the stages, were all dequantized."""
        from nibblecast.formats.tflite.to_onnx.graph import Wishes, lowered

        self.model.flatbuffer.renew()
        known = self.signatures
        if signature and signature not in known:
            listed = ", ".join(f"'{name}'" for name in known) or "none"
            raise Unsupported(f"has no signature '{signature}': it has {listed}")
        only_floats = weights is not None and self._dequantized(weights)
        subgraphs = [self._subgraph(i, graph, only_floats) for i, graph in enumerate(self.model.subgraphs)]
        main = known[signature] if signature else 0
        if not 0 <= main < len(subgraphs):
            raise CorruptFile(f"has {len(subgraphs)} subgraphs, and {main} is wanted")
        wishes = Wishes(opset, channels_first, custom_domain)
        model, places = lowered(subgraphs, main, wishes, self.model.description or "", self.allowance.rest())
        model.metadata_props.update(self._properties())
        return model, places

    def _dequantized(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether the file has quantized weights and none of them is still quantized."""
        read_quantized = {tensor.name for tensor in self.constants.values() if tensor.quantization is not None}
        return any(name in read_quantized for name in weights) and not any(
            tensor.quantization is not None for tensor in weights.values()
        )

    def _properties(self) -> dict[str, str]:
        """What the file says about itself: its signatures, with the names of their inputs and outputs, and its
        metadata, as text or in hexadecimal."""
        properties = {}
        tensors = [graph.tensors for graph in self.model.subgraphs]
        for found in self.model.signature_defs:
            key, index = found.signature_key or "", found.subgraph_index
            if index >= len(tensors):
                raise CorruptFile(
                    f"its signature '{key}' is of subgraph {index} of {len(tensors)}: the file is damaged"
                )
            ports = {
                what: {
                    port.name or "": tensors[index][port.tensor_index].name or ""
                    for port in each
                    if port.tensor_index < len(tensors[index])
                }
                for what, each in (("inputs", found.inputs), ("outputs", found.outputs))
            }
            properties[f"tflite.signature.{key}"] = json.dumps(ports)
        buffers = self.model.buffers
        for entry in self.model.metadata:
            data = buffers[entry.buffer].data if entry.buffer < len(buffers) else None
            if data is not None and data.size <= _LARGEST_METADATA:
                properties[f"tflite.metadata.{entry.name or ''}"] = _text(data.tobytes())
        return properties

    def _subgraph(self, index: int, graph: schema.SubGraph, only_floats: bool) -> Subgraph:
        from nibblecast.formats.tflite.to_onnx.graph import Subgraph

        names: set[str] = set()
        tensors = [self._tensor((index, at), table, names) for at, table in enumerate(graph.tensors)]
        if only_floats:
            tensors = [replace(t, dtype=FLOAT32, scale=None) if t.is_quantized else t for t in tensors]
        operators = [self._operator(operator) for operator in graph.operators]
        inputs, outputs = (
            tuple(int(at) for at in ([] if found is None else found)) for found in (graph.inputs, graph.outputs)
        )
        return Subgraph(graph.name or "", tensors, operators, inputs, outputs)

    def _tensor(self, key: Key, table: schema.Tensor, names: set[str]) -> TensorInfo:
        from nibblecast.formats.tflite.to_onnx.builder import TensorInfo

        name = table.name or f"tensor{key[1]}"
        while name in names:
            name = f"{name}_{key[1]}"
        names.add(name)
        shape = _sizes(table.shape, name)
        signature = shape if table.shape_signature is None else _sizes(table.shape_signature, name)
        scale, zero_point = _per_tensor(table)
        constant = self.constants.get(key)
        return TensorInfo(name, shape, signature, _dtype(table), scale, zero_point, constant, bool(table.is_variable))

    def _operator(self, operator: schema.Operator) -> OperatorCall:
        from nibblecast.formats.tflite.to_onnx.builder import OperatorCall

        name = self.operators[operator.opcode_index]
        table = operator.builtin_options_2 if name == "STABLEHLO_COMPOSITE" else operator.builtin_options
        inputs, outputs = (
            tuple(int(at) for at in ([] if found is None else found)) for found in (operator.inputs, operator.outputs)
        )
        intermediates = () if operator.intermediates is None else tuple(int(at) for at in operator.intermediates)
        custom = b"" if operator.custom_options is None else operator.custom_options.tobytes()
        options = Options(name, table if name in OPTIONS else None)
        return OperatorCall(name, inputs, outputs, options, intermediates, custom)


def _sizes(values: NDArray[Any] | None, name: str) -> tuple[int, ...]:
    """The sizes of a computed tensor, which can be anything. Those of constants are already checked."""
    if values is not None and values.size > MOST_DIMENSIONS:
        message = f"has {values.size} dimensions; {MOST_DIMENSIONS} are the most that can be read"
        raise Unsupported(message, tensor=name)
    return () if values is None else tuple(values.tolist())


def _text(data: bytes) -> str:
    """Text without its padding of zeros; bytes that are not text in hexadecimal."""
    try:
        text = data.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError:
        return data.hex()
    return text if text.isprintable() else data.hex()


def _per_tensor(table: schema.Tensor) -> tuple[float | None, int]:
    parameters = table.quantization
    if parameters is None or parameters.details_type:
        return None, 0
    scale, zero_point = parameters.scale, parameters.zero_point
    if scale is None or scale.size != 1:
        return None, 0
    first = 0 if zero_point is None or not zero_point.size else int(zero_point[0])
    dtype = _dtype(table)
    if is_integer(dtype) and dtype.itemsize * 8 == bits_of(dtype) and not in_range(first, dtype):
        raise CorruptFile(f"has zero point {first}, which {dtype} does not hold", tensor=table.name)
    return float(scale[0]), first


def _dtype(table: schema.Tensor) -> np.dtype[Any]:
    """The dtype of a tensor's elements; object for strings and resources, which are only passed on."""
    kind = schema.TENSOR_TYPES[table.type] if 0 <= table.type < len(schema.TENSOR_TYPES) else ""
    return schema.DTYPES.get(kind, np.dtype(object))
