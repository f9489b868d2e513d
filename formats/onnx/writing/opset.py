"""The operator set that a model's weights need, and the graph in another one, made by onnx's version converter.

The converter knows what changed in each operator, which would be a long table here. But it works on objects and within
2 GiB. So it gets the file without its larger payloads, which stay in their file until they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import CARRIED, ParsedModel, TensorHeader
from nibblecast.formats.onnx.file.parse import domain_of, parse
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.file.pieces import ExternalData, Payload
from nibblecast.formats.onnx.file.rewrite import Rewriting
from nibblecast.formats.onnx.file.wire import Range
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.options import QuantizedLayout
from nibblecast.formats.onnx.weights.dataflow import Dataflow
from nibblecast.formats.onnx.writing.transposing import Blobs, transposed

_LEFT_INSIDE = 1024  # bytes; the converter reads axes, shapes and similar constants


def required_opset(model: Model, graph: OnnxGraph, layout: QuantizedLayout) -> int:
    """The operator set that weights need if DequantizeLinear will decode them."""
    needed = 0
    for name, tensor in model.items():
        before = graph.tensors[name]
        is_changed = before.data is not tensor.data or before.quantization is not tensor.quantization
        if tensor.quantization is None or not (is_changed or layout == "qdq"):
            continue
        if layout == "matmulnbits" and len(tensor.shape) == 2 and (Blobs.of(tensor) or Blobs.of(transposed(tensor))):
            continue
        needed = max(needed, _opset_of(tensor))
    return needed


def _opset_of(tensor: Tensor) -> int:
    q = tensor.quantization
    opset = schema.ELEMENT_TYPES[tensor.dtype].opset
    if q is None or q.offset is not None or q.codebook is not None or q.group_index is not None:
        return opset
    split = [size for size, block in zip(tensor.shape, q.block_shape, strict=True) if 1 < block < size]
    blocks = schema.BLOCKS_SINCE if split else 0
    return max(opset, blocks, schema.DEQUANTIZE_LINEAR_SINCE.get(tensor.dtype, 0))


def raised(graph: OnnxGraph, opset: int) -> OnnxGraph:
    """The graph in another operator set. Raises UsageError for an unknown operator set, Unsupported if onnx's version
    converter fails."""
    if opset not in schema.IR_VERSIONS:
        known = sorted(schema.IR_VERSIONS)
        raise UsageError(f"opset {opset} cannot be written: give one from {known[0]} to {known[-1]}, or none")
    if graph.parsed.functions:
        raise Unsupported("has functions, which onnx's version converter drops: leave out --opt opset")
    import onnx
    from onnx import version_converter

    skeleton, carried = _skeleton(graph)
    try:
        model = version_converter.convert_version(onnx.ModelProto.FromString(skeleton), opset)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unsupported(f"onnx's version converter does not bring it to opset {opset}: {reason}") from error
    converted = np.frombuffer(model.SerializeToString(), np.uint8)
    file = MappedFile(graph.payloads.file.path, converted, None)
    payloads = PayloadTensors(file, carried, graph.payloads.allowance)
    parsed = parse(payloads.view, file.path)
    return replace(graph, parsed=parsed, payloads=payloads, headers=_same_headers(graph, parsed))


def _skeleton(graph: OnnxGraph) -> tuple[bytes, Mapping[int, Tensor]]:
    """The file without its larger payloads, and the tensors of these, by their offsets as external data."""
    external = ExternalData(CARRIED, _LEFT_INSIDE, has_any=True)
    opsets = dict.fromkeys(_domains(graph.parsed) - set(graph.parsed.opsets), 1)  # only the converter needs imports
    allowance = graph.payloads.allowance.rest()
    rewriting = Rewriting(graph.parsed, graph.payloads, {}, external, set(), opsets, graph.parsed.ir_version, allowance)
    out = bytearray()
    for piece in rewriting.model().items:
        if isinstance(piece, Payload):
            out += piece.tensor.packed().data
        else:
            out += graph.payloads.view[piece.start : piece.stop] if isinstance(piece, Range) else piece
    return bytes(out), {offset: payload.tensor for offset, payload in external.placed}


def _domains(parsed: ParsedModel) -> set[str]:
    return {domain_of(node.domain) for scope in Dataflow.of(parsed).scopes for node in scope.graph.nodes}


def _same_headers(graph: OnnxGraph, converted: ParsedModel) -> dict[str, TensorHeader]:
    """The initializers of the converted graph for the model's tensors."""
    before, after = Dataflow.of(graph.parsed).scopes, Dataflow.of(converted).scopes
    places = {id(header): (i, name) for i, scope in enumerate(before) for name, header in scope.headers.items()}
    headers = {}
    for name, header in graph.headers.items():
        scope, own = places[id(header)]
        if scope >= len(after) or own not in after[scope].headers:
            raise Unsupported("is not found in what onnx's version converter makes of the model", tensor=name)
        headers[name] = after[scope].headers[own]
    return headers
