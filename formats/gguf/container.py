"""The header of a GGUF file: key-values, tensors and where their data are.

    magic "GGUF", version u32, number of tensors u64, number of key-values u64
    key-value     key string, type u32, value          string: length u64, bytes; array: type u32, count u64, elements
    tensor        name string, axes u32, sizes u64 (the innermost first), type u32, offset u64 from where the data begin
    data          from the next multiple of general.alignment on (32 if the key is absent)

Version 3, little-endian; version 2 is the same. ggml, docs/gguf.md; checked with gguf 0.19.

The reader is our own because gguf's GGUFReader makes NumPy views of every element of every array, e.g. of 100,000
tokens, and trusts counts from the file. Here nothing is allocated before the file is known to be long enough for it.
Arrays are skipped. Each key-value keeps its bytes, so that the writer can copy it unchanged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from nibblecast.converters.errors import CorruptFile, Unsupported, brief, located
from nibblecast.converters.input.shapes import MOST_DIMENSIONS, checked_shape
from nibblecast.converters.storage import FileRange, MappedFile

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
_MOST_NESTED = 8

UINT32, STRING, _ARRAY = 4, 8, 9
#: struct's formats for the types of values that have a size of their own.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LAYOUTS = {kind: struct.Struct(f"<{kind}") for kind in _NUMBERS.values()}
_NAMES = {
    0: "uint8",
    1: "int8",
    2: "uint16",
    3: "int16",
    4: "uint32",
    5: "int32",
    6: "float32",
    7: "bool",
    8: "string",
    9: "array",
    10: "uint64",
    11: "int64",
    12: "float64",
}
#: The fewest bytes that an element of an array, a key-value and a tensor can take.
_LEAST = {STRING: 8, _ARRAY: 12}
_LEAST_KEY_VALUE = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the metadata: the name of its type, and a number, a bool or a str. For an array, the number is that of
    its elements."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in the header. `shape` has the innermost axis last; `offset` counts from the start of data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class GGUFHeader:
    """The key-values and the tensors of a file, in its order. The data begin at `data_offset`. `entries` has the bytes
    of each key-value as they are in the file, its key included."""

    file: MappedFile
    metadata: dict[str, Value]
    entries: dict[str, FileRange]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_offset: int

    def data_of(self, tensor: TensorInfo, nbytes: int) -> FileRange:
        """The `nbytes` bytes of a tensor. Raises CorruptFile if they do not lie in the file."""
        if tensor.offset % self.alignment:
            raise CorruptFile(
                f"has its data at offset {tensor.offset}, which is not a multiple of the alignment {self.alignment}",
                tensor=tensor.name,
            )
        with located(tensor=tensor.name):
            return self.file.range(self.data_offset + tensor.offset, nbytes)


def open_container(file: MappedFile) -> GGUFHeader:
    """Reads the header. Raises CorruptFile for damage, Unsupported for big-endian files and other versions."""
    cursor = _Cursor(file)
    if cursor.take(4) != MAGIC:
        raise CorruptFile(f"begins with {brief(file.view[:4].tobytes())}, not with {brief(MAGIC)}")
    version = cursor.number("I")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise Unsupported("is big-endian: convert it with gguf's gguf-convert-endian")
        raise Unsupported(f"is GGUF version {version}: 2 and 3 are read")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    cursor.expect(tensor_count * _LEAST_TENSOR + value_count * _LEAST_KEY_VALUE, "tensors and key-values")
    metadata: dict[str, Value] = {}
    entries: dict[str, FileRange] = {}
    for _ in range(value_count):
        start = cursor.position
        key = cursor.string()
        if key in metadata:
            raise CorruptFile(f"has the key {brief(key)} twice")
        metadata[key] = cursor.value()
        entries[key] = file.range(start, cursor.position - start)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        info = cursor.tensor()
        if info.name in tensors:
            raise CorruptFile("is there twice", tensor=info.name)
        tensors[info.name] = info
    alignment = _alignment(metadata)
    data_offset = -(-cursor.position // alignment) * alignment
    return GGUFHeader(file, metadata, entries, tensors, alignment, data_offset)


def _alignment(metadata: dict[str, Value]) -> int:
    found = metadata.get(_ALIGNMENT, Value("uint32", DEFAULT_ALIGNMENT))
    alignment = found.value
    if found.kind != "uint32" or alignment == 0 or alignment & (alignment - 1):
        raise CorruptFile(f"has the {_ALIGNMENT} {brief(found.value)} ({found.kind}): a power of two is needed")
    return int(alignment)


class _Cursor:
    """A position in the file that moves on with each read."""

    def __init__(self, file: MappedFile) -> None:
        self._bytes = file.view
        self.position = 0

    def expect(self, nbytes: int, what: str) -> None:
        """Raises CorruptFile unless `nbytes` bytes follow."""
        left = self._bytes.size - self.position
        if nbytes > left:
            raise CorruptFile(
                f"has {what} of {nbytes} bytes at byte {self.position}, where the file ends after {left}: "
                "it is truncated or damaged"
            )

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        self.expect(nbytes, "a field")
        self.position += nbytes
        return self._bytes[self.position - nbytes : self.position].tobytes()

    def number(self, kind: str) -> Any:
        """The next number, of struct's format `kind`."""
        layout = _LAYOUTS[kind]
        return layout.unpack(self.take(layout.size))[0]

    def string(self) -> str:
        """The next string."""
        taken = self.take(self.number("Q"))
        try:
            return taken.decode()
        except UnicodeDecodeError as error:
            raise CorruptFile(f"has the string {brief(taken[:40])}, which is not UTF-8: {error.reason}") from None

    def value(self) -> Value:
        """The next value; its type comes before it."""
        kind = self.number("I")
        if kind in _NUMBERS:
            return Value(_NAMES[kind], self.number(_NUMBERS[kind]))
        if kind == STRING:
            return Value(_NAMES[kind], self.string())
        if kind == _ARRAY:
            return Value(_NAMES[kind], self._skip_array(0))
        raise CorruptFile(f"has a value of type {kind} at byte {self.position}: types 0 to 12 are known")

    def _skip_array(self, depth: int) -> int:
        kind, count = self.number("I"), self.number("Q")
        if depth > _MOST_NESTED:
            raise CorruptFile(f"nests arrays more than {_MOST_NESTED} deep")
        if kind in _NUMBERS:
            nbytes = count * _LAYOUTS[_NUMBERS[kind]].size
            self.expect(nbytes, "an array")
            self.position += nbytes
            return int(count)
        if kind not in _LEAST:
            raise CorruptFile(f"has an array of type {kind} at byte {self.position}: types 0 to 12 are known")
        self.expect(count * _LEAST[kind], "an array")
        for _ in range(count):
            if kind == _ARRAY:
                self._skip_array(depth + 1)
            else:
                nbytes = self.number("Q")
                self.expect(nbytes, "a string")
                self.position += nbytes
        return int(count)

    def tensor(self) -> TensorInfo:
        """The next tensor's entry."""
        name, axes = self.string(), self.number("I")
        self.expect(axes * 8, f"the sizes of {axes} axes")
        if axes > MOST_DIMENSIONS:  # checked before the sizes are read: there may be millions
            raise Unsupported(f"has {axes} dimensions; {MOST_DIMENSIONS} are the most that can be read", tensor=name)
        sizes = struct.unpack(f"<{axes}Q", self.take(axes * 8))
        shape = checked_shape(tuple(reversed(sizes)), tensor=name)
        return TensorInfo(name, shape, self.number("I"), self.number("Q"))
