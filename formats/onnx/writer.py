"""Writes a model's tensors as an ONNX model that needs no input and gives each of them, decoded, as an output.

A plain tensor is an initializer and an output; a quantized one an initializer of codes, with the nodes that decode it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from nibblecast.converters.arithmetic.packing import bits_of, packed_size
from nibblecast.converters.errors import Unsupported, UsageError, printable
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.interfaces import Capabilities, OutputFile, Size, option
from nibblecast.converters.ir import Loss, Model, Tensor, is_integer
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.schema import ELEMENT_TYPES
from nibblecast.formats.onnx.file.serialize import (
    Layout,
    Stream,
    encode_constant,
    encode_graph,
    encode_node,
    encode_output,
    lay_out,
)
from nibblecast.formats.onnx.file.validation import validate
from nibblecast.formats.onnx.writing.decode_nodes import DecodeNodes, Initializer, carrier, widened
from nibblecast.formats.onnx.writing.from_onnx_ir import Lowerable, Missing
from nibblecast.formats.onnx.writing.graph_changes import OnnxGraph, QuantizedLayout
from nibblecast.formats.onnx.writing.graph_writer import (
    EXTERNAL_FROM,
    LARGEST_IN_ONE_FILE,
    KeptPlan,
    plan_kept,
    plan_made,
)

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """What can be chosen about an ONNX file."""

    opset: int | None = option(None, "operator set, 13 to 25; by default 21, or the first that has the model's types")
    external_data: Size | None = option(
        None, "weights of at least this many bytes go to FILE.data; by default only when the model would pass 1.5 GB"
    )
    layout: Literal["", "qdq", "matmulnbits", "nhwc", "nchw"] = option(
        "", "of a graph: what decodes weights, as `weights` says; or where images have channels at inputs and outputs"
    )
    weights: Literal["", "qdq", "matmulnbits"] = option(
        "", "what decodes the weights of a graph: qdq (DequantizeLinear), matmulnbits (com.microsoft); empty: as before"
    )
    custom: str = option("", "a domain for operators that ONNX has no like of; empty: they are an error")
    graph: bool = option(True, "false: only the weights, each decoded to an output, of a model of another format")
    signature: str = option("", "which signature of a TFLite model; empty: its first subgraph")
    ir_version: int | None = option(None, "IR version; by default the source's, or the first that has all types")

    @property
    def weight_layout(self) -> QuantizedLayout:
        """What decodes the weights of a graph."""
        return self.layout if self.layout in ("qdq", "matmulnbits") else self.weights


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """The files, and for each tensor the initializers that are written with it; `expected` is what reading gives."""

    notes: ClassVar[Sequence[str]] = ()
    report: ClassVar[Sequence[str]] = ()

    files: Sequence[OutputFile]
    losses: Sequence[Loss]
    layout: Layout
    initializers: Mapping[str, Sequence[Initializer]]
    expected: Model

    def validate(self, main: Path) -> Sequence[str]:
        """What onnx.checker says of the file."""
        return validate(main)

    def open(self, streams: Sequence[BinaryIO]) -> OnnxSink:
        """Starts writing; the second stream, where there are two, is the external data's."""
        return OnnxSink(self.initializers, Stream(self.layout, streams))


@dataclass(frozen=True, slots=True)
class OnnxSink:
    """Writes tensors as they come."""

    initializers: Mapping[str, Sequence[Initializer]]
    stream: Stream

    def write(self, tensor: Tensor) -> None:
        """Writes the tensor's initializers: its elements, and those parameters which are no tensors of their own."""
        parts: dict[str, Tensor] = {"codes": tensor}
        if tensor.quantization is not None:
            parts.update(tensor.quantization.parameters())
        for initializer in self.initializers[tensor.name]:
            self.stream.write(initializer.name, widened(parts[initializer.role], initializer.dtype))

    def close(self) -> None:
        """Nothing comes after the last tensor."""


class OnnxWriter:
    """Writes .onnx files."""

    options: ClassVar[type] = OnnxOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=frozenset(ELEMENT_TYPES), nested_scale=False, compute_dtype=False
    )

    def plan(self, model: Model, target: Path, options: OnnxOptions) -> OnnxPlan | KeptPlan:
        """Reads no payload, integer zero points of another dtype than the codes excepted: whether codes can be such a
        number decides how they are written. Raises Unsupported for a dtype that ONNX has not, and for a model file
        of 2 GiB; UsageError for an operator set that is not known or lacks one of the model's types."""
        graph: object = model.graph
        if isinstance(graph, OnnxGraph):
            return plan_kept(model, graph, target, options)
        if options.graph and isinstance(graph, Lowerable):
            return plan_made(model, graph, target, options)
        if options.layout or options.weights:
            wanted = f"layout={options.layout}" if options.layout else f"weights={options.weights}"
            raise UsageError(f"{wanted} is for models with a graph, and this one has weights only")
        opset = _opset(model, options.opset)
        names, losses = _names(model)
        shared = _shared_parameters(model)
        allowance = Allowance(sum(data.nbytes for tensor in model.values() for data in tensor.stored()))
        known = {key: names[name] for key, name in shared.items()}
        lowering = DecodeNodes(opset, UniqueNames(names.values()), known, allowance)
        initializers: dict[str, list[Initializer]] = {}
        outputs: list[bytes] = []
        for name, tensor in model.items():
            if tensor.quantization is None:
                dtype = carrier(tensor.dtype, opset) if is_integer(tensor.dtype) else tensor.dtype
                nbytes = packed_size(tensor.size, bits_of(dtype))
                initializers[tensor.name] = [Initializer(names[name], "codes", dtype, tensor.shape, nbytes)]
                outputs.append(encode_output(names[name], dtype, tensor.shape))
            else:
                initializers[tensor.name] = lowering.lower(tensor, tensor.quantization, names[name])
                outputs.append(encode_output(names[name], _FLOAT32, tensor.shape))
        constants = [encode_constant(constant) for constant in lowering.constants.values()]
        graph = encode_graph([encode_node(node) for node in lowering.nodes], constants, outputs)
        flat = [initializer for group in initializers.values() for initializer in group]
        external_from: int | None = options.external_data
        if external_from is None and sum(i.nbytes for i in flat) + len(graph) > LARGEST_IN_ONE_FILE:
            external_from = EXTERNAL_FROM
        location = f"{target.name}.data"
        properties = {schema.LAYOUT: schema.WEIGHTS_LAYOUT}
        layout = lay_out(graph, flat, opset, properties, location, external_from)
        files = [OutputFile(target, layout.model_nbytes)]
        if layout.data_nbytes:
            files.append(OutputFile(target.with_name(location), layout.data_nbytes))
        losses += _widenings(model, opset)
        return OnnxPlan(files, [*_graph_losses(model), *losses], layout, initializers, _renamed(model, names))


def _opset(model: Model, wanted: int | None) -> int:
    if wanted is not None and wanted not in schema.IR_VERSIONS:
        known = sorted(schema.IR_VERSIONS)
        raise UsageError(f"opset {wanted} cannot be written: give one from {known[0]} to {known[-1]}, or none")
    opset = schema.DEFAULT_OPSET if wanted is None else wanted
    for tensor in model.values():
        for dtype in _dtypes(tensor, max(schema.IR_VERSIONS) if wanted is None else wanted):
            element_type = ELEMENT_TYPES.get(dtype)
            if element_type is None:
                message = f"ONNX has no type for {dtype}: leave the tensor out with --skip, or add --dequantize"
                raise Unsupported(message, tensor=tensor.name)
            if wanted is not None and element_type.opset > wanted:
                message = f"opset {wanted} has no {dtype}: give {element_type.opset} or higher, or none"
                raise UsageError(message, tensor=tensor.name)
            opset = max(opset, element_type.opset)
    return opset


def _graph_losses(model: Model) -> list[Loss]:
    operators = sum(model.metadata.operators.values())
    if not operators and model.graph is None:
        return []
    reason = f" ({model.graph.missing})" if isinstance(model.graph, Missing) else ""
    return [Loss("", "dropped", f"its graph of {operators} operators: the ONNX file has only the weights{reason}")]


def _dtypes(tensor: Tensor, opset: int) -> Iterator[np.dtype[Any]]:
    """The dtypes of the initializers that a tensor needs."""
    if tensor.quantization is None:
        yield carrier(tensor.dtype, opset) if is_integer(tensor.dtype) else tensor.dtype
        return
    yield carrier(tensor.dtype, opset)
    for _, parameter in tensor.quantization.parameters():
        yield carrier(parameter.dtype, opset)


def _widenings(model: Model, opset: int) -> list[Loss]:
    """What an operator set without integers of 2 and 4 bits costs."""
    codes = {name: tensor.dtype for name, tensor in model.items() if is_integer(tensor.dtype)}
    widened = {name: dtype for name, dtype in codes.items() if carrier(dtype, opset) != dtype}
    return [
        Loss(name, "widened", f"each {dtype} code takes a byte, because opset {opset} has no {dtype}")
        for name, dtype in widened.items()
    ]


def _names(model: Model) -> tuple[dict[str, str], list[Loss]]:
    """What each tensor is called in the file: its own name, unless ONNX cannot hold that; such a change is a note."""
    fitting = {name: name.encode(errors="backslashreplace").decode() or "unnamed" for name in model}
    free = UniqueNames(name for name in model if fitting[name] == name)
    names = {name: name if fit == name else free.fresh(fit) for name, fit in fitting.items()}
    detail = "it is named '{}', because names in ONNX must be Unicode and not empty"
    return names, [Loss(name, "renamed", detail.format(printable(new))) for name, new in names.items() if name != new]


def _renamed(model: Model, names: Mapping[str, str]) -> Model:
    """The model with its tensors' names in the file."""
    if all(name == new for name, new in names.items()):
        return model
    tensors = {}
    for name, tensor in model.items():
        owner = tensor.parameter_of
        renamed = None if owner is None else names.get(owner, owner)
        tensors[names[name]] = replace(tensor, name=names[name], parameter_of=renamed)
    return replace(model, tensors=tensors)


def _shared_parameters(model: Model) -> dict[int, str]:
    """The names of those plain tensors that are, as the very same object, a parameter of another one, by identity."""
    named = {id(tensor): name for name, tensor in model.items() if tensor.quantization is None}
    used: dict[int, str] = {}
    for tensor in model.values():
        for _, parameter in tensor.quantization.parameters() if tensor.quantization else ():
            if id(parameter) in named:
                used[id(parameter)] = named[id(parameter)]
    return used
