"""Arrays of C as tensor data: bytes that are read from the text when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import CorruptFile, Error
from nibblecast.converters.storage import Data, MappedFile
from nibblecast.formats.cheader.packings import Packing, in_other_order, row_of
from nibblecast.formats.cheader.reading.elements import Elements, Lines, all_elements, regular_elements
from nibblecast.formats.cheader.reading.payload import StoredData
from nibblecast.formats.cheader.reading.source import ELEMENT_TYPES, ArrayText


@dataclass(slots=True)
class CachedArrays:
    """The elements of the arrays of one tensor that had to be read as a whole."""

    tensor: str = ""
    elements: dict[str, Elements] = field(default_factory=dict)

    def of(self, tensor: str, array: ArrayText) -> Elements:
        if self.tensor != tensor:
            self.tensor, self.elements = tensor, {}
        if array.name not in self.elements:
            self.elements[array.name] = all_elements(array)
        return self.elements[array.name]


@dataclass(frozen=True, slots=True, eq=False)
class ElementData(Data):
    """The first `nbytes` bytes of an array's elements, read from its text when they are asked for; each must be below
    `limit`, where there is one, taken as `dtype`, however wide the words are that hold it. Words have their low byte
    first."""

    array: ArrayText
    nbytes: int
    length: int | None
    tensor: str
    dtype: np.dtype[Any]
    limit: int | None
    lines: Lines | None
    kept: CachedArrays

    @property
    def file(self) -> MappedFile:
        """The file that the text is in."""
        return self.array.file

    def files(self) -> Iterator[MappedFile]:
        yield self.file

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop). Raises CorruptFile when the text holds no such elements."""
        size = self.itemsize
        stop = min(stop, self.nbytes)
        first, last = start // size, -(-stop // size)
        try:
            elements = self._elements(first, max(first, last))
        except Error as error:
            error.tensor, error.path = self.tensor, self.file.path
            raise
        return elements.view(np.uint8)[start - first * size : stop - first * size]

    @property
    def itemsize(self) -> int:
        """Bytes of an element in C."""
        return np.dtype(ELEMENT_TYPES[self.array.element_type]).itemsize

    def _elements(self, first: int, last: int) -> Elements:
        needed = -(-self.nbytes // self.itemsize)
        elements = None
        if self.lines is not None and self._fits(self.lines.count):
            end = self.lines.count if last == needed else last  # what follows must be padding
            elements = regular_elements(self.array, self.lines, first, end)
            self._release(self.lines, first, end)
        if elements is None:
            whole = self.kept.of(self.tensor, self.array)
            lacking = (self.length or needed) - whole.size
            if lacking > int(self.array.is_string):  # a string may end in a NUL that is not written
                raise CorruptFile(
                    f"{self.array.name} holds {whole.size} elements, but {self.length or needed} are needed"
                )
            if self.length is not None and lacking < 0:
                raise CorruptFile(
                    f"{self.array.name} holds {whole.size} elements, more than the {self.length} declared"
                )
            elements = whole[first:] if last == needed else whole[first:last]
        if elements[last - first :].any():
            raise CorruptFile(f"{self.array.name} holds more than the {needed} elements that the table says")
        elements = elements[: last - first]
        self._check_limit(elements)
        return elements

    def _check_limit(self, elements: Elements) -> None:
        if self.limit is not None and elements.size:
            most = int(elements.view(f"u{self.dtype.itemsize}").max())
            if most >= self.limit:
                raise CorruptFile(f"{self.array.name} holds {most}; below {self.limit} is needed")

    def _fits(self, count: int) -> bool:
        """Whether so many elements are what is declared; a string may end in a NUL that is not written."""
        return self.length in (None, count, count + int(self.array.is_string))

    def _release(self, lines: Lines, first: int, last: int) -> None:
        """Lets go of the text's pages."""
        start = lines.start + first // lines.per_line * lines.stride
        stop = min(lines.start + -(-last // lines.per_line) * lines.stride, self.array.stop)
        if stop > start:
            self.file.range(start, stop - start).release(0, stop - start)


@dataclass(frozen=True, slots=True, eq=False)
class PackedData(Data):
    """The canonical bytes of codes of `dtype`, narrower than a byte, and `shape`, which `stored` has in another
    packing."""

    stored: ElementData | StoredData
    packing: Packing
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return packed_size(prod(self.shape), self._bits)

    def made_of(self) -> tuple[Data, ...]:
        return (self.stored,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop). Raises CorruptFile when the text holds no such elements."""
        if not self.packing.unpacked and not self.packing.rows_padded:
            return in_other_order(self.stored.read(start, min(stop, self.nbytes)), self._bits)
        per_byte = 8 // self._bits
        first, last = start * per_byte, min(stop * per_byte, prod(self.shape))
        read = self._unpacked if self.packing.unpacked else self._rows
        return pack(read(first, max(first, last)), self._bits)

    @property
    def _bits(self) -> int:
        return SUB_BYTE[self.dtype][0]

    def _unpacked(self, first: int, last: int) -> NDArray[Any]:
        """Codes [first, last), which have a byte each."""
        bits, storage = SUB_BYTE[self.dtype]
        codes: NDArray[Any] = self.stored.read(first, last).view(storage)
        signed = storage == np.int8
        least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        for code in (codes.min(), codes.max()) if codes.size else ():
            if not least <= code <= most:
                raise self._corrupt(f"holds {code}, which is not a code of {bits} bits")
        return codes

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        """Codes [first, last), each row of which begins at a byte."""
        row, per_byte = row_of(self.shape), 8 // self._bits
        padded = -(-row // per_byte) * per_byte
        begin, end = (code // row * padded + code % row for code in (first, last))
        origin = begin // per_byte
        stored = self.stored.read(origin, -(-end // per_byte))
        if self.packing.high_first:
            stored = in_other_order(stored, self._bits)
        codes = unpack(stored, self.dtype, stored.size * per_byte)[begin - origin * per_byte :][: end - begin]
        is_code = np.resize(np.arange(padded) < row, begin % padded + codes.size)[begin % padded :]
        if codes[~is_code].any():
            raise self._corrupt("holds something behind the end of a row")
        return codes[is_code]

    def _corrupt(self, message: str) -> CorruptFile:
        return CorruptFile(f"{self.stored.array.name} {message}", path=self.stored.file.path, tensor=self.stored.tensor)
