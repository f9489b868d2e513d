"""Arrays of C as tensor data: bytes that are read from the text when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptFile, Error
from converters.storage import MappedFile
from formats.cheader.c_elements import Elements, Lines, all_elements, regular_elements
from formats.cheader.c_source import ELEMENT_TYPES, ArrayText


@dataclass(slots=True)
class Kept:
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
class ElementData:
    """The first `nbytes` bytes of an array's elements, read from its text when they are asked for; each element must be
    below `limit`, where there is one. Words have their low byte first."""

    array: ArrayText
    nbytes: int
    length: int | None
    tensor: str
    limit: int | None
    lines: Lines | None
    kept: Kept

    @property
    def file(self) -> MappedFile:
        """The file that the text is in."""
        return self.array.file

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
        if self.limit is not None and elements.size and int(elements.max()) >= self.limit:
            raise CorruptFile(f"{self.array.name} holds {elements.max()}; below {self.limit} is needed")
        return elements

    def _fits(self, count: int) -> bool:
        """Whether so many elements are what is declared; a string may end in a NUL that is not written."""
        return self.length in (None, count, count + int(self.array.is_string))

    def _release(self, lines: Lines, first: int, last: int) -> None:
        """Lets go of the text's pages."""
        start = lines.start + first // lines.per_line * lines.stride
        stop = min(lines.start + -(-last // lines.per_line) * lines.stride, self.array.stop)
        if stop > start:
            self.file.range(start, stop - start).release(0, stop - start)
