"""Arrays of C whose elements lie in a file of their own, which the assembler or the compiler reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.containment import contained_file
from nibblecast.converters.storage import FileRange, MappedFile
from nibblecast.formats.cheader.reading.source import ArrayText, Declarations, Placement


@dataclass(frozen=True, slots=True, eq=False)
class StoredData(FileRange):
    """The first bytes of an array in a mapped file, each of which must be below `limit`, where there is one."""

    array: ArrayText
    tensor: str
    limit: int | None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), not copied. Raises CorruptFile for one that is not below the limit."""
        elements = FileRange.read(self, start, stop)
        if self.limit is not None and elements.size and int(elements.max()) >= self.limit:
            raise CorruptFile(
                f"{self.array.name} holds {elements.max()}; below {self.limit} is needed",
                path=self.file.path,
                tensor=self.tensor,
            )
        return elements


@dataclass(slots=True, eq=False)
class PayloadFiles:
    """The files that declarations place elements in, each mapped once; `allowance` is the model's."""

    declarations: Declarations
    allowance: Allowance
    files: dict[Path, MappedFile] = field(default_factory=dict)

    def data(self, array: ArrayText, place: Placement, nbytes: int, tensor: str, limit: int | None) -> StoredData:
        """The first `nbytes` bytes of an array of one-byte elements; all others must be zero. Raises CorruptFile when
        the array is shorter, when its file is not there or ends before it, or leads out of the folder."""
        offset = self.declarations.integer(place.offset, place.file, place.at)
        placed = self.declarations.integer(place.nbytes, place.file, place.at)
        length = self.declarations.length_of(array)
        if length not in (None, placed) or placed < nbytes:
            declared = "" if length is None else f" and is declared with {length}"
            raise CorruptFile(
                f"{array.name} has {placed} bytes of a file{declared}, but {nbytes} are needed: it is damaged",
                path=place.file.path,
            )
        whole = self._file(array, place).range(offset, placed)
        self.allowance.hold(placed)  # all of it, as all of it is looked at
        if whole.read(nbytes, placed).any():
            raise CorruptFile(
                f"{array.name} holds more than the {nbytes} elements that the table says", path=whole.file.path
            )
        return StoredData(whole.file, offset, nbytes, array, tensor, limit)

    def _file(self, array: ArrayText, place: Placement) -> MappedFile:
        location = self.declarations.string(place.location, place.file, place.at)
        try:
            path = contained_file(place.file.path.parent, location)
            if path not in self.files:
                self.files[path] = MappedFile.open(path)
                self.allowance.include(self.files[path].view.size)
        except CorruptFile as error:
            error.message += f"; the elements of {array.name} lie in it: copy it beside {place.file.path.name}"
            error.path = error.path or place.file.path
            raise
        return self.files[path]
