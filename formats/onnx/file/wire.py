"""Protobuf's wire format: just enough to read and to write ONNX without building objects of its payloads.

A message is described by a `Schema`. Nested messages, bytes and packed arrays are ranges of the file and never copied.
Source: https://protobuf.dev/programming-guides/encoding/.

The protobuf package would be less code. But it parses a message only as a whole: it copies every payload, stops at
2 GiB, and does not say where a field lies in the file. Ranges keep a model of many GB on disk, and let the rewriter
copy what it does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile


class Kind(Enum):
    """What a field holds. Messages, bytes and arrays are ranges of the file; an array may come in several ranges."""

    INT = "integer"
    FLOAT = "float32"
    TEXT = "string"
    RANGE = "message or bytes"
    ARRAY = "array"


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message: its number, and what it holds."""

    number: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of the file."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Schema:
    """The fields of a message that are read, by name; all others are skipped."""

    def __init__(self, message: str, **fields: Field) -> None:
        self.message = message
        self.fields: Mapping[str, Field] = fields
        self.by_number: Mapping[int, tuple[str, Kind]] = {f.number: (name, f.kind) for name, f in fields.items()}


class Message:
    """The fields found in one message, in the file's order. Each field is a list, empty if the field is absent."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, list[Any]]) -> None:
        self.values = values

    def ints(self, name: str) -> list[int]:
        """All integers of a repeated field, packed or not."""
        return self.values.get(name, [])

    def integer(self, name: str, default: int) -> int:
        """A single integer; the last of several counts, as protobuf specifies."""
        return int(self.values[name][-1]) if name in self.values else default

    def floats(self, name: str) -> list[float]:
        """All numbers of a repeated float field that is not packed."""
        return self.values.get(name, [])

    def texts(self, name: str) -> list[str]:
        """All strings of a repeated field."""
        return self.values.get(name, [])

    def text(self, name: str) -> str:
        """A single string, empty if the field is absent."""
        texts = self.texts(name)
        return texts[-1] if texts else ""

    def ranges(self, name: str) -> list[Range]:
        """The range of each message, or of the bytes, of a repeated field."""
        return self.values.get(name, [])


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SINT_BITS = 64


def read_varint(view: memoryview, at: int, stop: int) -> tuple[int, int]:
    """An unsigned integer and the position after it. Raises CorruptFile if it goes beyond `stop` or 64 bits."""
    value = shift = 0
    while at < stop and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise CorruptFile(f"byte {at}: an integer does not end where it must: the file is truncated or no ONNX model")


def signed(value: int) -> int:
    """A 64-bit varint as the int64 that it encodes."""
    return value - (1 << _SINT_BITS) if value >> (_SINT_BITS - 1) else value


def raw_fields(view: memoryview, where: Range, message: str = "message") -> Iterator[tuple[int, int, Range]]:
    """The fields of a message in order: number, start of the field, and its content (without its length). Raises
    CorruptFile for a field that does not end where it must."""
    for number, _, start, content in _fields(view, where, message):
        yield number, start, content


def decode(view: memoryview, where: Range, schema: Schema) -> Message:
    """The fields of the message in the range `where`. Raises CorruptFile if a length or a wire type is wrong."""
    known = schema.by_number
    values: dict[str, list[Any]] = {}
    for number, wire_type, _, place in _fields(view, where, schema.message):
        if number in known:
            name, kind = known[number]
            content = _content(view, kind, wire_type, place.start, place.stop)
            if content is None:
                raise CorruptFile(
                    f"byte {place.start}: field {name} of a {schema.message} has wire type {wire_type}, not that of a "
                    f"{kind.value}: the file is damaged"
                )
            if content:  # a packed field may hold nothing
                values.setdefault(name, []).extend(content)
    return Message(values)


def _fields(view: memoryview, where: Range, message: str) -> Iterator[tuple[int, int, int, Range]]:
    """Number, wire type, start and content of each field."""
    at, stop = where.start, where.stop
    while at < stop:
        start = at
        tag, at = read_varint(view, at, stop)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _BYTES:
            length, at = read_varint(view, at, stop)
            end = at + length
        elif wire_type == _VARINT:
            _, end = read_varint(view, at, stop)
        elif wire_type in (_FIXED32, _FIXED64):
            end = at + (4 if wire_type == _FIXED32 else 8)
        else:
            raise CorruptFile(f"byte {at}: wire type {wire_type} in a {message}: this is not an ONNX model")
        if end > stop or number == 0:
            raise CorruptFile(
                f"byte {at}: field {number} of a {message} ends at byte {end}, the {message} at {stop}: "
                "the file is truncated or damaged"
            )
        yield number, wire_type, start, Range(at, end)
        at = end


def _content(view: memoryview, kind: Kind, wire_type: int, at: int, end: int) -> Sequence[Any] | None:
    """Bytes [at, end) read as a field of `kind`: one element, or those of a packed array. None if that is wrong."""
    if kind is Kind.ARRAY or (kind is Kind.RANGE and wire_type == _BYTES):
        return (Range(at, end),)
    if kind is Kind.INT and wire_type == _VARINT:
        return (signed(read_varint(view, at, end)[0]),)
    if kind is Kind.TEXT and wire_type == _BYTES:
        return (bytes(view[at:end]).decode("utf-8", "backslashreplace"),)
    if kind is Kind.INT and wire_type == _BYTES:
        return unpack_varints(view, Range(at, end)).view(np.int64).tolist()  # type: ignore[no-any-return]
    if kind is Kind.FLOAT and wire_type in (_FIXED32, _BYTES) and (end - at) % 4 == 0:
        return np.frombuffer(view[at:end], "<f4").tolist()  # type: ignore[no-any-return]
    return None


def count_varints(view: memoryview, where: Range) -> int:
    """The number of integers in a packed array."""
    return int(np.count_nonzero(np.frombuffer(view, np.uint8, where.nbytes, where.start) < 0x80))


def unpack_varints(view: memoryview, where: Range) -> NDArray[np.uint64]:
    """The integers of a packed array, shape (count,). Raises CorruptFile if the last integer does not end, or if one is
    longer than ten bytes."""
    data = np.frombuffer(view, np.uint8, where.nbytes, where.start)
    ends = np.flatnonzero(data < 0x80)
    if data.size and (ends.size == 0 or ends[-1] != data.size - 1):
        raise CorruptFile(f"byte {where.stop}: the last integer of an array does not end: the file is damaged")
    if data.size == ends.size:
        return data.astype(np.uint64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise CorruptFile(f"byte {where.start}: an integer of an array is longer than ten bytes: the file is damaged")
    shifts = (np.arange(data.size) - np.repeat(starts, lengths)) * 7
    bits = (data & np.uint8(0x7F)).astype(np.uint64) << shifts.astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts)


def varint(value: int) -> bytes:
    """An integer as protobuf writes it; negative integers take ten bytes."""
    value &= (1 << _SINT_BITS) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def bytes_head(number: int, nbytes: int) -> bytes:
    """The tag and length that come before the `nbytes` bytes of a field."""
    return varint(number << 3 | _BYTES) + varint(nbytes)


def encode(schema: Schema, **values: Any) -> bytes:
    """A message whose fields are written in the given order. A value is an integer, a string or bytes (nested messages
    are given encoded), or a sequence of these for a repeated field. Parts of a string that are not Unicode are written
    as backslash escapes, just as they are read."""
    out = bytearray()
    for name, value in values.items():
        number = schema.fields[name].number
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int):
                out += varint(number << 3 | _VARINT) + varint(item)
            else:
                content = item.encode(errors="backslashreplace") if isinstance(item, str) else item
                out += bytes_head(number, len(content)) + content
    return bytes(out)
