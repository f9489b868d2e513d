"""A reader of FlatBuffers that checks every offset and length against the buffer before it follows one.

Format: https://flatbuffers.dev/internals (little endian; a table begins with the signed distance back to its vtable,
whose entries are offsets of the fields from the table, 0 for an absent field).

The reader is our own because the official Python runtime (25.12) checks nothing and has no verifier. A damaged file can
make it raise any exception or allocate without end. Tables, vectors and strings may also be shared, so a few bytes can
stand for millions of objects. That is why bytes are counted each time they are read.

A schema is written as classes: each field is an attribute that names its slot.

    class Buffer(Table):
        data = vector(0, np.uint8)
        offset = scalar(1, "Q")
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import UINT8
from nibblecast.converters.errors import CorruptFile, Unsupported

#: Bytes that may be read into objects: this many times the flatbuffer's size, plus a minimum for small ones.
_MOST_READS = 2
_HARMLESS_BYTES = 1 << 16
#: The bytes that each table of a vector counts as, its offset included: about the smallest useful table.
_TABLE_BYTES = 20

T = TypeVar("T")
TableT = TypeVar("TableT", bound="Table")


class FlatBuffer:
    """The bytes of one flatbuffer: `content` is uint8 of shape (size,), a view of the file."""

    __slots__ = ("allowance", "content", "memory", "vtables")

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content = content
        self.memory = content.data
        self.vtables: dict[int, tuple[int, ...]] = {}
        self.renew()

    def renew(self) -> None:
        """Begins another pass, because each request for a model's graph reads the buffer again."""
        self.allowance = _MOST_READS * self.content.size + _HARMLESS_BYTES

    def spend(self, nbytes: int) -> None:
        """Counts bytes that become objects. Raises Unsupported if they are out of all proportion to the file."""
        self.allowance -= nbytes
        if self.allowance < 0:
            raise Unsupported(
                f"refers to the same parts of its {self.content.size} bytes again and again: refused as a bomb"
            )

    def unpack(self, format: str, position: int) -> int | float:
        """One little-endian scalar of a `struct` format. Raises CorruptFile if it lies outside the buffer."""
        if position < 0:
            raise CorruptFile(f"an offset points to byte {position}, before the flatbuffer: the file is damaged")
        try:
            value: int | float = struct.unpack_from("<" + format, self.memory, position)[0]
        except struct.error:
            raise CorruptFile(
                f"an offset points to byte {position}, beyond the flatbuffer's {len(self.memory)} bytes: "
                "the file is truncated or damaged"
            ) from None
        return value

    def integer(self, format: str, position: int) -> int:
        """Like `unpack`, for the integer formats."""
        return int(self.unpack(format, position))

    def follow(self, position: int) -> int:
        """The position that the unsigned offset at `position` points to."""
        offset = self.integer("I", position)
        if not offset:
            raise CorruptFile(f"the offset at byte {position} points to itself: the file is damaged")
        return position + offset

    def array(self, position: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The vector of scalars at `position` as a view, shape (length,)."""
        length = self.integer("I", position)
        start, nbytes = position + 4, length * dtype.itemsize
        if start + nbytes > self.content.size:
            raise CorruptFile(
                f"a vector at byte {position} claims {length} elements of {dtype}, which would end at byte "
                f"{start + nbytes} of {self.content.size}: the file is truncated or damaged"
            )
        return self.content[start : start + nbytes].view(dtype)

    def vtable(self, table: int) -> tuple[int, ...]:
        """The field offsets of the table at `table`, by slot."""
        position = table - self.integer("i", table)
        known = self.vtables.get(position)
        if known is None:
            size = self.integer("H", position)
            if size < 4 or size % 2 or position + size > self.content.size:
                raise CorruptFile(f"the vtable at byte {position} has size {size}: the file is truncated or damaged")
            known = struct.unpack_from(f"<{size // 2 - 2}H", self.memory, position + 4)
            self.vtables[position] = known
        return known


class Table:
    """A table at a position of a flatbuffer; subclasses list its fields."""

    __slots__ = ("_fields", "_position", "flatbuffer")

    def __init__(self, buffer: FlatBuffer, position: int) -> None:
        self.flatbuffer = buffer
        self._position = position
        self._fields = buffer.vtable(position)

    @classmethod
    def root(cls, content: NDArray[np.uint8]) -> Self:
        """The root table of a flatbuffer."""
        buffer = FlatBuffer(content)
        return cls(buffer, buffer.follow(0))

    def position_of(self, slot: int) -> int | None:
        """The position of the field with that slot; None if it is absent."""
        offset = self._fields[slot] if slot < len(self._fields) else 0
        return self._position + offset if offset else None


class Field(Generic[T]):
    """A field of a table. It is read at each access; an absent field has its default."""

    __slots__ = ("_decode", "_default", "_slot")

    def __init__(self, slot: int, decode: Callable[[FlatBuffer, int], T], default: T) -> None:
        self._slot, self._decode, self._default = slot, decode, default

    @overload
    def __get__(self, table: None, owner: type[Table]) -> Self: ...
    @overload
    def __get__(self, table: Table, owner: type[Table]) -> T: ...
    def __get__(self, table: Table | None, owner: type[Table]) -> Self | T:
        if table is None:
            return self
        position = table.position_of(self._slot)
        return self._default if position is None else self._decode(table.flatbuffer, position)

    @property
    def slot(self) -> int:
        """The field's number in the schema. A union takes two: its type, then its value."""
        return self._slot


def scalar(slot: int, format: str, default: int = 0) -> Field[int]:
    """An integer (or bool, "?") of a `struct` format."""
    return Field(slot, lambda buffer, position: buffer.integer(format, position), default)


def string(slot: int) -> Field[str | None]:
    """A string. Bytes that are not UTF-8, which some producers write, become backslash escapes."""

    def decode(buffer: FlatBuffer, position: int) -> str | None:
        characters = buffer.array(buffer.follow(position), UINT8)
        buffer.spend(characters.size)
        return characters.tobytes().decode("utf-8", "backslashreplace")

    return Field(slot, decode, None)


def vector(slot: int, dtype: type[np.generic]) -> Field[NDArray[Any] | None]:
    """A vector of scalars as a view of the file, shape (length,); None if it is absent."""
    little_endian = np.dtype(dtype).newbyteorder("<")

    def decode(buffer: FlatBuffer, position: int) -> NDArray[Any] | None:
        values = buffer.array(buffer.follow(position), little_endian)
        buffer.spend(values.nbytes)
        return values

    return Field(slot, decode, None)


def payload(slot: int) -> Field[NDArray[np.uint8] | None]:
    """A vector of bytes as a view that is not read here, shape (length,); None if it is absent."""

    def decode(buffer: FlatBuffer, position: int) -> NDArray[np.uint8] | None:
        return buffer.array(buffer.follow(position), UINT8)

    return Field(slot, decode, None)


def table(slot: int, schema: type[TableT]) -> Field[TableT | None]:
    """A table, or the value of a union whose type is known; None if it is absent."""

    def decode(buffer: FlatBuffer, position: int) -> TableT | None:
        return schema(buffer, buffer.follow(position))

    return Field(slot, decode, None)


def tables(slot: int, schema: type[TableT]) -> Field[list[TableT]]:
    """A vector of tables; empty if it is absent."""

    def decode(buffer: FlatBuffer, position: int) -> list[TableT]:
        start = buffer.follow(position)
        offsets = buffer.array(start, np.dtype("<u4"))
        buffer.spend(offsets.size * _TABLE_BYTES)
        return [schema(buffer, start + 4 + 4 * i + offset) for i, offset in enumerate(offsets.tolist())]

    return Field(slot, decode, [])
