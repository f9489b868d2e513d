"""Protobuf's wire format: just enough to read and to write ONNX without building objects of its payloads.

A message is described by a `Schema`; nested messages, bytes and packed arrays are met as ranges of the file, never
copied. https://protobuf.dev/programming-guides/encoding/ is the source.
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
    """What a field holds. Messages, bytes and arrays are met as ranges of the file; an array may come in several."""

    INT = "integer"
    FLOAT = "float32"
    TEXT = "string"
    RANGE = "message or bytes"
    ARRAY = "array"


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message: its number there, and what it holds."""

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
    """The fields of a message that matter, by name; all others are passed over."""

    def __init__(self, message: str, **fields: Field) -> None:
        self.message = message
        self.fields: Mapping[str, Field] = fields
        self.by_number: Mapping[int, tuple[str, Kind]] = {f.number: (name, f.kind) for name, f in fields.items()}


class Message:
    """The fields found in one message, in the file's order; what a field holds is a list, empty where it is absent."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, list[Any]]) -> None:
        self.values = values

    def ints(self, name: str) -> list[int]:
        """All integers of a repeated field, packed or not."""
        return self.values.get(name, [])

    def integer(self, name: str, default: int) -> int:
        """A single integer; of several the last one counts, as protobuf has it."""
        return int(self.values[name][-1]) if name in self.values else default

    def floats(self, name: str) -> list[float]:
        """All numbers of a repeated float field that is not packed."""
        return self.values.get(name, [])

    def texts(self, name: str) -> list[str]:
        """All strings of a repeated field."""
        return self.values.get(name, [])

    def text(self, name: str) -> str:
        """A single string, empty where there is none."""
        texts = self.texts(name)
        return texts[-1] if texts else ""

    def ranges(self, name: str) -> list[Range]:
        """Where each message, or run of bytes, of a repeated field lies."""
        return self.values.get(name, [])


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SINT_BITS = 64


def read_varint(view: memoryview, at: int, stop: int) -> tuple[int, int]:
    """An unsigned integer and the position after it. Raises CorruptFile when it passes `stop` or 64 bits."""
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
    """The fields of a message in order: number, where the field begins, and its content, without the length of what
    has one. Raises CorruptFile for one that does not end where it must."""
    for number, _, start, content in _fields(view, where, message):
        yield number, start, content


def decode(view: memoryview, where: Range, schema: Schema) -> Message:
    """The fields of the message that lies in `where`. Raises CorruptFile when a length or a wire type is wrong."""
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
    """Number, wire type, beginning and content of each field."""
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
    """What bytes [at, end) say as a field of that kind: one element, or a packed array's; None where they cannot."""
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
    """How many integers a packed array holds."""
    return int(np.count_nonzero(np.frombuffer(view, np.uint8, where.nbytes, where.start) < 0x80))


def unpack_varints(view: memoryview, where: Range) -> NDArray[np.uint64]:
    """The integers of a packed array, shape (count,). Raises CorruptFile when the last one does not end, or one is
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
    """An integer as protobuf writes it; negative ones take ten bytes."""
    value &= (1 << _SINT_BITS) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def bytes_head(number: int, nbytes: int) -> bytes:
    """What comes before the `nbytes` bytes of a field of known length."""
    return varint(number << 3 | _BYTES) + varint(nbytes)


def encode(schema: Schema, **values: Any) -> bytes:
    """A message. An integer, a string, or bytes (a nested message is given encoded), or a sequence of one of these for
    a repeated field; fields are written in the order in which they are given. What of a string is not Unicode is
    written as backslash escapes, as it is read."""
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
