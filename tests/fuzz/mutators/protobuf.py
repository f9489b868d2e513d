"""Changes of protobuf messages, field by field, without their schema: what can be read as a message is taken for one.

Format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from random import Random

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, real, text

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_DEEPEST = 8
_LONGEST = 1 << 12
_MOST_NUMBER = 60
_MASK = (1 << 64) - 1

#: A field: its number, its wire type, and its value: an integer, bytes, or the fields of a message.
Field = tuple[int, int, "int | bytes | list[Field]"]


def message(data: bytes, other: bytes, random: Random) -> bytes:
    """A message with one field changed, at some depth."""
    fields = _fields(data)
    if not fields:
        return havoc(data, other, random)
    return _encoded(_changed(fields, _all_of(_fields(other) or []), random))


def _changed(fields: list[Field], others: list[Field], random: Random) -> list[Field]:
    nested = [at for at, field in enumerate(fields) if isinstance(field[2], list)]
    if nested and random.random() < 0.8:
        at = random.choice(nested)
        number, wire, inner = fields[at]
        assert isinstance(inner, list)
        return [*fields[:at], (number, wire, _changed(inner, others, random)), *fields[at + 1 :]]
    return edited(random, fields, others, lambda field: _other_value(field, random))


def _other_value(field: Field, random: Random) -> Field:
    number, wire, value = field
    if random.random() < 0.1:
        return random.choice((integer(random, number, 70) or 1, number)), wire, value
    if isinstance(value, int):
        return number, wire, integer(random, value, _MASK)
    if isinstance(value, list):
        depth = random.choice((1, 2, 300))
        inner = value
        for _ in range(depth):
            inner = [(number, wire, inner)]
        return number, wire, inner
    if wire in _WIDTHS:
        pack = "<d" if wire == _FIXED64 else "<f"
        try:
            return number, wire, struct.pack(pack, real(random))
        except OverflowError:
            return number, wire, havoc(value, b"", random)[: _WIDTHS[wire]].ljust(_WIDTHS[wire], b"\0")
    if random.random() < 0.5:
        return number, wire, text(random, value.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return number, wire, havoc(value, b"", random)


def _fields(data: bytes, depth: int = 0) -> list[Field] | None:
    """The fields of a message; None for what is none."""
    found: list[Field] = []
    position = 0
    try:
        while position < len(data):
            key, position = _varint(data, position)
            number, wire = key >> 3, key & 7
            if not 0 < number < _MOST_NUMBER:
                return None
            value: int | bytes | list[Field]
            if wire == _VARINT:
                value, position = _varint(data, position)
            else:
                length = _WIDTHS.get(wire)
                if length is None:
                    if wire != _LENGTH:
                        return None
                    length, position = _varint(data, position)
                value = data[position : position + length]
                position += length
                if position > len(data):
                    return None
                if wire == _LENGTH and depth < _DEEPEST and 2 <= length <= (_LONGEST if depth > 1 else len(data)):
                    value = (None if value.isalnum() else _fields(value, depth + 1)) or value
            found.append((number, wire, value))
    except IndexError:
        return None
    return found


def _all_of(fields: list[Field]) -> list[Field]:
    found = list(fields)
    for field in found:  # which grows meanwhile
        if isinstance(field[2], list):
            found += field[2]
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            return value & _MASK, position


def _encoded(fields: list[Field]) -> bytes:
    parts = []
    for number, wire, value in fields:
        parts.append(_varint_of(number << 3 | wire))
        if isinstance(value, int):
            parts.append(_varint_of(value))
            continue
        content = _encoded(value) if isinstance(value, list) else value
        if wire == _LENGTH:
            parts.append(_varint_of(len(content)))
        parts.append(content)
    return b"".join(parts)


def _varint_of(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
