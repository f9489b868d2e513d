"""Writes an ONNX file by hand, payloads streamed: protobuf objects would hold all of them in memory.

The file is one ModelProto: its small fields, then the graph, whose last fields are the initializers, each a header and
the payload right after it. Larger payloads may lie in a second file. All sizes are known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.ir import Tensor
from nibblecast.converters.output.streaming import pieces
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.file.schema import ELEMENT_TYPES
from nibblecast.formats.onnx.file.wire import bytes_head, encode, is_unicode
from nibblecast.formats.onnx.writing.decode_nodes import Constant, Initializer

PRODUCER = "nibblecast"
#: A protobuf message is no longer than this: https://protobuf.dev/programming-guides/proto-limits/
LARGEST_MODEL = (1 << 31) - 1
#: Offsets of external payloads: whole pages (mmap's, as onnx.proto asks) for those that fill one, else a cache line.
PAGE, CACHE_LINE = 4096, 64
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """What goes into the model file for an initializer, from which position on, and where its payload goes: right
    after that (`offset` is None), or to this offset of the file of external data."""

    position: int
    head: bytes
    offset: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes: `head` is all before the first initializer; `places` has these by name, in order."""

    head: bytes
    places: Mapping[str, Span]
    model_nbytes: int
    data_nbytes: int


def encode_node(node: Node) -> bytes:
    """A node as NodeProto, named as its first output if it has no name of its own."""
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


def encode_constant(constant: Constant) -> bytes:
    """A constant as TensorProto, its values included."""
    values = np.ascontiguousarray(constant.values)
    head = tensor_head(constant.name, values.dtype, values.shape, constant.properties)
    return head + encode(schema.TENSOR, raw_data=values.tobytes())


def encode_graph(nodes: Sequence[bytes], constants: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    """A graph without the initializers whose payloads are streamed."""
    return encode(schema.GRAPH, name="weights", node=nodes, initializer=constants, output=outputs)


def lay_out(
    graph: bytes,
    initializers: Sequence[Initializer],
    opset: int,
    properties: Mapping[str, str],
    location: str,
    external_from: int | None,
) -> Layout:
    """Places the initializers, in their order, after `graph`; payloads of at least `external_from` bytes in the file
    called `location`. Raises Unsupported when the model file would be larger than protobuf allows."""
    initializer_field = schema.GRAPH.fields["initializer"].number
    raw_field = schema.TENSOR.fields["raw_data"].number
    entries: list[tuple[Initializer, bytes, int | None]] = []
    graph_nbytes, end = len(graph), 0
    for initializer in initializers:
        head = tensor_head(initializer.name, initializer.dtype, initializer.dims, initializer.properties)
        offset = None
        if external_from is not None and initializer.nbytes >= max(1, external_from):
            offset = aligned(end, initializer.nbytes)
            end = offset + initializer.nbytes
            head += external_entries(location, offset, initializer.nbytes)
            tensor_nbytes = len(head)
        else:
            head += bytes_head(raw_field, initializer.nbytes)
            tensor_nbytes = len(head) + initializer.nbytes
        head = bytes_head(initializer_field, tensor_nbytes) + head
        entries.append((initializer, head, offset))
        graph_nbytes += len(head) + (initializer.nbytes if offset is None else 0)
    model = encode(
        schema.MODEL,
        ir_version=schema.IR_VERSIONS[opset],
        producer_name=PRODUCER,
        opset_import=encode(schema.OPERATOR_SET, domain="", version=opset),
        metadata_props=[encode(schema.ENTRY, key=key, value=value) for key, value in properties.items()],
    )
    model += bytes_head(schema.MODEL.fields["graph"].number, graph_nbytes)
    nbytes = len(model) + graph_nbytes
    if nbytes > LARGEST_MODEL:
        raise Unsupported(
            f"an ONNX file of {nbytes} bytes is more than protobuf's {LARGEST_MODEL}: "
            "put weights into a second file with --opt external_data=1M"
        )
    places: dict[str, Span] = {}
    position = len(model) + len(graph)
    for initializer, head, offset in entries:
        places[initializer.name] = Span(position, head, offset)
        position += len(head) + (initializer.nbytes if offset is None else 0)
    return Layout(model + graph, places, nbytes, end)


class Stream:
    """Writes a layout's files: the head, then each initializer where it belongs, front to back as long as they come in
    the layout's order. The second of `streams` is the external data's, needed only where there are any."""

    def __init__(self, layout: Layout, streams: Sequence[BinaryIO]) -> None:
        self.layout = layout
        self.streams = streams
        streams[0].write(layout.head)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one initializer: the canonical bytes of `tensor`, in pieces."""
        place = self.layout.places[name]
        target = self.streams[0]
        go_to(target, place.position)
        target.write(place.head)
        if place.offset is not None:
            target = self.streams[1]
            go_to(target, place.offset)
        for piece in pieces(tensor, _PIECE_BYTES):
            target.write(piece.data)


def go_to(stream: BinaryIO, position: int) -> None:
    """Moves to a position of a stream, if it is not there already."""
    if stream.tell() != position:  # a seek flushes the stream's buffer
        stream.seek(position)


def tensor_head(
    name: str, dtype: np.dtype[Any], dims: tuple[int, ...], properties: tuple[tuple[str, str], ...]
) -> bytes:
    """A TensorProto's fields but for those of the payload."""
    entries = [encode(schema.ENTRY, key=key, value=value) for key, value in properties]
    number = ELEMENT_TYPES[dtype].number
    return encode(schema.TENSOR, dims=dims, data_type=number, name=name, metadata_props=entries)


def external_entries(location: str, offset: int, nbytes: int) -> bytes:
    """TensorProto's fields that say where in a file of external data a payload is. Raises UsageError for a name that
    the model file cannot hold."""
    if not is_unicode(location):
        raise UsageError("an ONNX file names its file of external data, and this name is not Unicode: give it another")
    entries = {"location": location, "offset": str(offset), "length": str(nbytes)}
    encoded = [encode(schema.ENTRY, key=key, value=value) for key, value in entries.items()]
    return encode(schema.TENSOR, external_data=encoded, data_location=schema.DATA_LOCATION_EXTERNAL)


def aligned(offset: int, nbytes: int) -> int:
    """The first place from `offset` on for a payload of so many bytes."""
    alignment = PAGE if nbytes >= PAGE else CACHE_LINE
    return -(-offset // alignment) * alignment
