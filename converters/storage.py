"""Where a tensor's canonical bytes come from: memory, a mapped file, or a computation. All of them are lazy.

One small interface, `Data`: how many bytes there are, and any range of them as a uint8 array.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptFile, MissingFile


@runtime_checkable
class Data(Protocol):
    """The canonical bytes of one tensor (`converters.packing` gives the order)."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        ...

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), contiguous, shape (stop - start,); they may be a read-only view, never to be changed."""
        ...


def read_into(data: Data, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [start, stop), in the first bytes of `out` where the data can be computed there, and elsewhere otherwise:
    new memory costs as much as the work."""
    into = getattr(data, "read_into", None)
    return data.read(start, stop) if into is None else into(start, stop, out)


def release(data: Data, start: int, stop: int) -> None:
    """Lets go of the memory that bytes [start, stop) of `data` take, where these have a `release` of their own; a later
    `read` brings them back."""
    let_go = getattr(data, "release", None)
    if let_go is not None:
        let_go(start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Bytes that are already here: `array` is uint8 of shape (nbytes,)."""

    array: NDArray[np.uint8]

    @classmethod
    def of(cls, array: NDArray[Any]) -> InMemory:
        """The bytes of any array whose dtype is at least a byte wide, in row-major order."""
        return cls(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8))

    @property
    def nbytes(self) -> int:
        return self.array.size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.array[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """Bytes that a function makes when they are asked for: `compute(start, stop)` gives bytes [start, stop). `sources`
    are the data that it reads: `in_order` says that a share of the bytes is made of about the same share of each of
    them; where it is made of everything (a transposed matrix), sources are let go of with the last byte only.
    `compute_into` is a way to make them in memory that the caller has, at least stop - start bytes."""

    nbytes: int
    compute: Callable[[int, int], NDArray[np.uint8]]
    sources: tuple[Data, ...] = ()
    in_order: bool = True
    compute_into: Callable[[int, int, NDArray[np.uint8]], NDArray[np.uint8]] | None = None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.compute(start, stop))  # a column of an array may be a view that is not

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Like `read`, perhaps in `out`."""
        return self.read(start, stop) if self.compute_into is None else self.compute_into(start, stop, out)

    def release(self, start: int, stop: int) -> None:
        """Lets go of what of the sources bytes [start, stop) were made of."""
        is_end = stop >= self.nbytes
        if not self.in_order:
            start, stop = 0, self.nbytes if is_end else 0
        if stop <= start:
            return
        for source in self.sources:
            first, last = start * source.nbytes // self.nbytes, -(-stop * source.nbytes // self.nbytes)
            release(source, first, source.nbytes if is_end else last)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Data one after the other."""

    sources: tuple[Data, ...]

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self.sources)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        pieces = [data.read(first, last) for data, first, last in self._within(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint8), *pieces])

    def release(self, start: int, stop: int) -> None:
        """Lets go of what these bytes take."""
        for data, first, last in self._within(start, stop):
            release(data, first, last)

    def _within(self, start: int, stop: int) -> Iterator[tuple[Data, int, int]]:
        """The data that bytes [start, stop) lie in, with the range of each."""
        begin = 0
        for data in self.sources:
            first, last = max(start, begin), min(stop, begin + data.nbytes)
            if first < last:
                yield data, first - begin, last - begin
            begin += data.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A range of other data."""

    data: Data
    start: int
    nbytes: int

    @property
    def sources(self) -> tuple[Data, ...]:
        """What it is a range of."""
        return (self.data,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.data.read(self.start + start, self.start + min(stop, self.nbytes))

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return read_into(self.data, self.start + start, self.start + min(stop, self.nbytes), out)

    def release(self, start: int, stop: int) -> None:
        release(self.data, self.start + start, self.start + stop)


@dataclass(frozen=True, slots=True, eq=False)
class MappedFile:
    """A file mapped into memory read-only; `view` is uint8 of shape (file size,). Closed when nothing refers to it."""

    path: Path
    view: NDArray[np.uint8]
    mapping: mmap.mmap | None

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Maps `path` whole. Raises CorruptFile when it is not a readable regular file: MissingFile when it is none."""
        try:
            if not path.is_file():
                if path.exists():
                    raise CorruptFile("is no file", path=path)
                raise MissingFile("does not exist", file=path, path=path)
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size == 0:  # an empty file cannot be mapped
                    return cls(path, np.zeros(0, np.uint8), None)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorruptFile(f"cannot be read: {error.strerror or error}", path=path) from error
        return cls(path, np.frombuffer(mapping, np.uint8), mapping)

    def range(self, offset: int, nbytes: int) -> FileRange:
        """Bytes [offset, offset + nbytes) of the file as tensor data. Raises CorruptFile when it ends before that."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.view.size:
            raise CorruptFile(
                f"data at bytes {offset} to {offset + nbytes} lie outside the file of {self.view.size} bytes: "
                "it is truncated or damaged",
                path=self.path,
            )
        return FileRange(self, offset, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class FileRange:
    """A range of a mapped file; `read` copies nothing."""

    file: MappedFile
    offset: int
    nbytes: int

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.file.view[self.offset + start : self.offset + min(stop, self.nbytes)]

    def release(self, start: int, stop: int) -> None:
        """Lets the system drop the pages of bytes [start, stop) from this process; a later `read` brings them back."""
        if self.file.mapping is not None and stop > start:
            first = (self.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
            self.file.mapping.madvise(mmap.MADV_DONTNEED, first, self.offset + stop - first)


def files_of(data: Data) -> Iterator[MappedFile]:
    """The files that data are read from, be it through computations."""
    file = getattr(data, "file", None)
    if isinstance(file, MappedFile):
        yield file
    for source in getattr(data, "sources", ()):
        yield from files_of(source)
