"""Writes a model's tensors as an ONNX model without inputs whose outputs are the decoded tensors.

A plain tensor is an initializer and an output. A quantized tensor is an initializer of codes, with nodes that decode
it. An initializer alone would be enough to store a tensor, but not to say how its codes are decoded. As an output,
each tensor can be computed and checked by any ONNX runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT32, is_integer
from nibblecast.converters.errors import Unsupported, UsageError, printable
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.interfaces import Capabilities
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.pieces import ExternalData, NewInitializer, Pieces
from nibblecast.formats.onnx.file.schema import ELEMENT_TYPES
from nibblecast.formats.onnx.file.serialize import (
    encode_constant,
    encode_graph,
    encode_model,
    encode_node,
    encode_output,
)
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.options import OnnxOptions
from nibblecast.formats.onnx.writing.decode_nodes import DecodeNodes, carrier, widened
from nibblecast.formats.onnx.writing.files import EXTERNAL_FROM, LARGEST_IN_ONE_FILE, OnnxPlan, onnx_plan
from nibblecast.formats.onnx.writing.from_onnx_ir import Lowerable, Missing
from nibblecast.formats.onnx.writing.graph_writer import plan_kept, plan_made


class OnnxWriter:
    """Writes .onnx files."""

    options: ClassVar[type] = OnnxOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=frozenset(ELEMENT_TYPES), nested_scale=False, compute_dtype=False
    )

    def plan(self, model: Model, target: Path, options: OnnxOptions) -> OnnxPlan:
        """Lays out the file. Reads no payload, except integer zero points whose dtype differs from that of the codes:
        whether they fit the codes' dtype decides how they are written. Raises Unsupported for a dtype that ONNX does
        not have and for a model file of 2 GiB, UsageError for an operator set that is unknown or lacks a dtype."""
        graph: object = model.graph
        if isinstance(graph, OnnxGraph):
            return plan_kept(model, graph, target, options)
        if options.graph and isinstance(graph, Lowerable):
            return plan_made(model, graph, target, options)
        if options.layout or options.weights:
            wanted = f"layout={options.layout}" if options.layout else f"weights={options.weights}"
            raise UsageError(f"{wanted} is for models with a graph, and this one has weights only")
        return _weights_only(model, target, options)


def _weights_only(model: Model, target: Path, options: OnnxOptions) -> OnnxPlan:
    opset = _opset(model, options.opset)
    names, losses = _names(model)
    shared = _shared_parameters(model)
    allowance = Allowance(sum(data.nbytes for tensor in model.values() for data in tensor.stored()))
    known = {key: names[name] for key, name in shared.items()}
    lowering = DecodeNodes(opset, UniqueNames(names.values()), known, allowance)
    initializers: list[NewInitializer] = []
    outputs: list[bytes] = []
    for name, tensor in model.items():
        if tensor.quantization is None:
            dtype = carrier(tensor.dtype, opset) if is_integer(tensor.dtype) else tensor.dtype
            initializers.append(NewInitializer.of(names[name], widened(tensor, dtype)))
            outputs.append(encode_output(names[name], dtype, tensor.shape))
        else:
            parts = {"codes": tensor, **dict(tensor.quantization.parameters())}
            for one in lowering.lower(tensor, tensor.quantization, names[name]):
                made = partial(widened, dtype=one.dtype)
                new = NewInitializer(one.name, one.dims, one.dtype, parts[one.role], made, one.properties)
                initializers.append(new)
            outputs.append(encode_output(names[name], FLOAT32, tensor.shape))
    constants = [encode_constant(one.name, one.values, one.properties) for one in lowering.constants.values()]
    graph = encode_graph([encode_node(node) for node in lowering.nodes], constants, outputs)
    external_from: int | None = options.external_data
    if external_from is None and sum(new.payload.nbytes for new in initializers) + len(graph) > LARGEST_IN_ONE_FILE:
        external_from = EXTERNAL_FROM
    external = ExternalData(f"{target.name}.data", external_from, has_any=False)
    pieces = Pieces()
    pieces.add(graph)
    for new in initializers:
        pieces.message(schema.GRAPH.fields["initializer"].number, external.tensor(new))
    whole = Pieces()
    whole.add(encode_model(opset, {schema.LAYOUT: schema.WEIGHTS_LAYOUT}))
    whole.message(schema.MODEL.fields["graph"].number, pieces)
    losses = [*_graph_losses(model), *losses, *_widenings(model, opset)]
    return onnx_plan(target, whole, external, losses=losses, expected=_renamed(model, names))


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
    """The losses of an operator set without integers of 2 and 4 bits."""
    codes = {name: tensor.dtype for name, tensor in model.items() if is_integer(tensor.dtype)}
    widened = {name: dtype for name, dtype in codes.items() if carrier(dtype, opset) != dtype}
    return [
        Loss(name, "widened", f"each {dtype} code takes a byte, because opset {opset} has no {dtype}")
        for name, dtype in widened.items()
    ]


def _names(model: Model) -> tuple[dict[str, str], list[Loss]]:
    """Each tensor's name in the file: its own name, unless ONNX cannot hold it. A changed name is a note."""
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
    """The names, by identity, of plain tensors that are also (as the same object) a parameter of another tensor."""
    named = {id(tensor): name for name, tensor in model.items() if tensor.quantization is None}
    used: dict[int, str] = {}
    for tensor in model.values():
        for _, parameter in tensor.quantization.parameters() if tensor.quantization else ():
            if id(parameter) in named:
                used[id(parameter)] = named[id(parameter)]
    return used
