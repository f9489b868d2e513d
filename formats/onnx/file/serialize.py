"""Encodes the messages of an ONNX file without their payloads.

onnx's protobuf objects would hold all payloads in memory, and cannot serialize more than 2 GiB. Here headers are
encoded by hand, and the payloads are streamed between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import UsageError
from nibblecast.converters.names import is_unicode
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.file.schema import ELEMENT_TYPES
from nibblecast.formats.onnx.file.wire import encode

PRODUCER = "nibblecast"
#: Alignment of external payloads: a page for payloads that fill one (for mmap, as onnx.proto asks), else a cache line.
PAGE, CACHE_LINE = 4096, 64


def encode_node(node: Node) -> bytes:
    """A node as NodeProto. It gets the name of its first output if it has no name of its own."""
    attributes = [
        encode(schema.ATTRIBUTE, name=name, i=value, type=schema.ATTRIBUTE_INT) for name, value in node.integers.items()
    ]
    fields: dict[str, Any] = {"input": node.inputs, "output": node.outputs, "name": node.name or node.outputs[0]}
    domain = {"domain": node.domain} if node.domain else {}
    return encode(schema.NODE, **fields, op_type=node.op_type, attribute=[*node.others, *attributes], **domain)


def encode_output(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """A graph output as ValueInfoProto."""
    dims = [encode(schema.DIMENSION, dim_value=size) for size in shape]
    number = ELEMENT_TYPES[dtype].number
    tensor_type = encode(schema.TENSOR_TYPE, elem_type=number, shape=encode(schema.SHAPE, dim=dims))
    return encode(schema.VALUE_INFO, name=name, type=encode(schema.TYPE, tensor_type=tensor_type))


def encode_constant(name: str, values: NDArray[Any], properties: tuple[tuple[str, str], ...]) -> bytes:
    """A constant as TensorProto, its values included."""
    values = np.ascontiguousarray(values)
    return tensor_head(name, values.dtype, values.shape, properties) + encode(schema.TENSOR, raw_data=values.tobytes())


def encode_graph(nodes: Sequence[bytes], constants: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    """A graph without the initializers whose payloads are streamed."""
    return encode(schema.GRAPH, name="weights", node=nodes, initializer=constants, output=outputs)


def encode_model(opset: int, properties: Mapping[str, str]) -> bytes:
    """The fields of ModelProto that come before its graph."""
    return encode(
        schema.MODEL,
        ir_version=schema.IR_VERSIONS[opset],
        producer_name=PRODUCER,
        opset_import=encode(schema.OPERATOR_SET, domain="", version=opset),
        metadata_props=[encode(schema.ENTRY, key=key, value=value) for key, value in properties.items()],
    )


def tensor_head(
    name: str, dtype: np.dtype[Any], dims: tuple[int, ...], properties: tuple[tuple[str, str], ...]
) -> bytes:
    """A TensorProto's fields, without those of the payload."""
    entries = [encode(schema.ENTRY, key=key, value=value) for key, value in properties]
    number = ELEMENT_TYPES[dtype].number
    return encode(schema.TENSOR, dims=dims, data_type=number, name=name, metadata_props=entries)


def external_entries(location: str, offset: int, nbytes: int) -> bytes:
    """The TensorProto fields that say where a payload is in a file of external data. Raises UsageError for a file name
    that the model file cannot hold."""
    if not is_unicode(location):
        raise UsageError("an ONNX file names its file of external data, and this name is not Unicode: give it another")
    entries = {"location": location, "offset": str(offset), "length": str(nbytes)}
    encoded = [encode(schema.ENTRY, key=key, value=value) for key, value in entries.items()]
    return encode(schema.TENSOR, external_data=encoded, data_location=schema.DATA_LOCATION_EXTERNAL)


def aligned(offset: int, nbytes: int) -> int:
    """The first aligned offset from `offset` on for a payload of `nbytes` bytes."""
    alignment = PAGE if nbytes >= PAGE else CACHE_LINE
    return -(-offset // alignment) * alignment
