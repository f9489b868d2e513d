"""Changes of GGUF files: counts, key-values, and what is said of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from random import Random

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, real, text

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES = 41
_U64 = (1 << 64) - 1
_MOST = 1 << 16


@dataclass(frozen=True)
class _KeyValue:
    key: bytes
    kind: int
    value: bytes


@dataclass(frozen=True)
class _Tensor:
    name: bytes
    sizes: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class _File:
    version: int
    keys: list[_KeyValue]
    tensors: list[_Tensor]
    data: bytes


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize(form)
        return int(value) if form not in "fd" else 0

    def string(self) -> bytes:
        length = self.number("Q")
        if length > len(self.data):
            raise ValueError
        self.position += length
        return self.data[self.position - length : self.position]

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if count > _MOST:
                raise ValueError
            for _ in range(count):
                self.skip(of)
        else:
            self.number(_FORMATS[kind])


def model(data: bytes, other: bytes, random: Random) -> bytes:
    """A GGUF file with one of its parts changed."""
    file = _parsed(data)
    if file is None:
        return havoc(data, other, random)
    second = _parsed(other) or file
    choice = random.random()
    if choice < 0.4:
        file = replace(file, tensors=edited(random, file.tensors, second.tensors, lambda each: _tensor(each, random)))
    elif choice < 0.85:
        file = replace(file, keys=edited(random, file.keys, second.keys, lambda each: _key_value(each, random)))
    elif choice < 0.9:
        file = replace(file, version=integer(random, file.version, 0xFFFFFFFF))
    elif choice < 0.95:
        file = replace(file, data=havoc(file.data, second.data, random))
    counts = len(file.tensors), len(file.keys)
    if random.random() < 0.05:
        counts = integer(random, counts[0], _U64), integer(random, counts[1], _U64)
    return _written(file, counts)


def _tensor(tensor: _Tensor, random: Random) -> _Tensor:
    choice = random.randrange(5)
    if choice == 0:
        return replace(tensor, name=_text(tensor.name, random))
    if choice == 1:
        return replace(tensor, kind=random.choice((random.randrange(_TYPES), integer(random, tensor.kind, 0xFFFFFFFF))))
    if choice == 2:
        return replace(tensor, offset=integer(random, tensor.offset, _U64))
    sizes = list(tensor.sizes)
    return replace(tensor, sizes=tuple(edited(random, sizes, sizes, lambda size: integer(random, size, _U64))))


def _key_value(pair: _KeyValue, random: Random) -> _KeyValue:
    choice = random.random()
    if choice < 0.2:
        return replace(pair, key=_text(pair.key, random))
    if choice < 0.3:
        return replace(pair, kind=random.choice((random.randrange(14), integer(random, pair.kind, 0xFFFFFFFF))))
    if pair.kind == _STRING:
        content = _text(pair.value[8:], random)
        claimed = len(content) if random.random() < 0.9 else integer(random, len(content), _U64)
        return replace(pair, value=struct.pack("<Q", claimed) + content)
    if pair.kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", pair.value)
        kind = random.choice((kind, integer(random, kind, 0xFFFFFFFF)))
        return replace(pair, value=struct.pack("<IQ", kind, integer(random, count, _U64)) + pair.value[12:])
    if pair.kind in (6, 12):
        return replace(pair, value=struct.pack("<d", real(random))[-len(pair.value) :])
    width = len(pair.value)
    value = integer(random, int.from_bytes(pair.value, "little"), (1 << 8 * width) - 1)
    return replace(pair, value=value.to_bytes(width, "little"))


def _text(value: bytes, random: Random) -> bytes:
    return text(random, value.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def _parsed(data: bytes) -> _File | None:
    cursor = _Cursor(data)
    try:
        if data[:4] != b"GGUF":
            return None
        cursor.position = 4
        version, tensors, keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if max(tensors, keys) > _MOST:
            return None
        pairs = []
        for _ in range(keys):
            key, kind = cursor.string(), cursor.number("I")
            start = cursor.position
            cursor.skip(kind)
            pairs.append(_KeyValue(key, kind, data[start : cursor.position]))
        found = []
        for _ in range(tensors):
            name, rank = cursor.string(), cursor.number("I")
            sizes = tuple(cursor.number("Q") for _ in range(min(rank, _MOST)))
            found.append(_Tensor(name, sizes, cursor.number("I"), cursor.number("Q")))
    except (struct.error, ValueError, KeyError, RecursionError):
        return None
    return _File(version, pairs, found, data[cursor.position + -cursor.position % 32 :])


def _written(file: _File, counts: tuple[int, int]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", file.version, *counts)]
    for pair in file.keys:
        parts += [struct.pack("<Q", len(pair.key)), pair.key, struct.pack("<I", pair.kind), pair.value]
    for tensor in file.tensors:
        sizes = struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes)
        parts += [struct.pack("<Q", len(tensor.name)), tensor.name, sizes]
        parts.append(struct.pack("<IQ", tensor.kind, tensor.offset))
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + file.data
