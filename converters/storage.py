"""Where a tensor's canonical bytes come from: memory, a mapped file, or a computation. All of them are lazy.

The base class `Data` is small: the number of bytes, and any range of them as a uint8 array.

Why ranges of bytes, not whole arrays. A tensor may be larger than memory, and a writer needs it only piece by piece.
Files are memory-mapped: reading copies nothing, and the system may drop clean pages whenever memory is short. With
`read` of a file, each piece would be copied once more and would count as this process's memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import ChangedFile, CorruptFile, MissingFile


class Data(ABC):
    """The canonical bytes of one tensor (`converters.arithmetic.packing` gives the order).

    A subclass must define `nbytes` and `read` only. This is a base class, not a protocol, so that the defaults are
    written once. With optional members of a protocol, each caller would have to test for them.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # at run time a dataclass would use the inherited property as the default of its field `nbytes`

        @property
        @abstractmethod
        def nbytes(self) -> int:
            """How many bytes there are."""

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), contiguous, shape (stop - start,). Callers must not write to them: the result may be a
        view."""

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes [start, stop): in the first bytes of `out` if the data supports it, else in new memory. Reusing `out`
        matters: allocating costs as much as decoding."""
        return self.read(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Releases the memory that bytes [start, stop) take; a later `read` gets them again."""
        return

    def made_of(self) -> tuple[Data, ...]:
        """The data that this is computed from."""
        return ()

    def files(self) -> Iterator[MappedFile]:
        """The files that this is read from, directly or through computations."""
        for data in self.made_of():
            yield from data.files()


@dataclass(frozen=True, slots=True, eq=False)
class InMemory(Data):
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
class Computed(Data):
    """Bytes that a function computes on demand: `compute(start, stop)` gives bytes [start, stop).

    `sources` are the data that the function reads. `in_order` means that each part of the bytes comes from about the
    same part of each source. Where every part needs the whole source (a transposed matrix), sources are released only
    with the last byte. `compute_into` computes into the caller's memory, which has at least stop - start bytes.

    Why computed on demand: stages can be chained without an intermediate copy of the model. The price is that a second
    reader computes again; `converters.output.sharing` keeps what is small."""

    nbytes: int
    compute: Callable[[int, int], NDArray[np.uint8]]
    sources: tuple[Data, ...] = ()
    in_order: bool = True
    compute_into: Callable[[int, int, NDArray[np.uint8]], NDArray[np.uint8]] | None = None

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.compute(start, stop))  # a column of an array may be a view that is not

    def made_of(self) -> tuple[Data, ...]:
        return self.sources

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.read(start, stop) if self.compute_into is None else self.compute_into(start, stop, out)

    def release(self, start: int, stop: int) -> None:
        is_end = stop >= self.nbytes
        if not self.in_order:
            start, stop = 0, self.nbytes if is_end else 0
        if stop <= start:
            return
        for source in self.sources:
            first, last = start * source.nbytes // self.nbytes, -(-stop * source.nbytes // self.nbytes)
            source.release(first, source.nbytes if is_end else last)


@dataclass(frozen=True, slots=True, eq=False)
class Joined(Data):
    """Several data, concatenated."""

    sources: tuple[Data, ...]

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self.sources)

    def made_of(self) -> tuple[Data, ...]:
        return self.sources

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        pieces = [data.read(first, last) for data, first, last in self._within(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint8), *pieces])

    def release(self, start: int, stop: int) -> None:
        for data, first, last in self._within(start, stop):
            data.release(first, last)

    def _within(self, start: int, stop: int) -> Iterator[tuple[Data, int, int]]:
        """The data that hold bytes [start, stop), each with its own range."""
        begin = 0
        for data in self.sources:
            first, last = max(start, begin), min(stop, begin + data.nbytes)
            if first < last:
                yield data, first - begin, last - begin
            begin += data.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class DataSlice(Data):
    """A range of other data."""

    data: Data
    start: int
    nbytes: int

    def made_of(self) -> tuple[Data, ...]:
        return (self.data,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.data.read(self.start + start, self.start + min(stop, self.nbytes))

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.data.read_into(self.start + start, self.start + min(stop, self.nbytes), out)

    def release(self, start: int, stop: int) -> None:
        self.data.release(self.start + start, self.start + stop)


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading. Raises OSError if it is not a regular file: reading a FIFO, a device or a socket might
    never return, or never end. The check looks at the open file, because the path may be replaced between a check and
    the opening."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file (a FIFO, a device or a socket)", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path) -> bytes:
    """All bytes of a file. Raises OSError as `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


#: All mapped files: the handler of SIGBUS must find the one that was truncated.
_mapped: WeakSet[MappedFile] = WeakSet()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MappedFile:
    """A file mapped into memory read-only; `view` is uint8 of shape (file size,). It is closed when nothing refers to
    it. `identity` is the file's device, inode and modification time in nanoseconds when it was opened."""

    path: Path
    view: NDArray[np.uint8]
    mapping: mmap.mmap | None
    identity: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Maps all of `path`. Raises CorruptFile when it cannot be read or is not a regular file, MissingFile when it
        does not exist."""
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size == 0:  # an empty file cannot be mapped
                    return cls(path, np.zeros(0, np.uint8), None)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise MissingFile("does not exist", file=path, path=path) from error
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have, or a file that is now empty
            raise CorruptFile(f"cannot be read: {getattr(error, 'strerror', None) or error}", path=path) from error
        opened = cls(path, np.frombuffer(mapping, np.uint8), mapping, _identity(status))
        _mapped.add(opened)
        return opened

    def check_unchanged(self) -> None:
        """Raises ChangedFile if the file was written to or truncated since it was opened."""
        if self.mapping is None:
            return
        try:
            found, size = _identity(self.path.stat()), self.mapping.size()
        except OSError:
            return  # it was removed, but the mapping stays valid
        is_another = found[:2] != self.identity[:2]  # another file has this path now; the mapping stays valid
        if size != self.view.size or not (is_another or found == self.identity):
            raise ChangedFile(
                f"changed while it was read: it had {self.view.size} bytes and now has {size}; convert it again when "
                "nothing writes to it",
                path=self.path,
            )

    def range(self, offset: int, nbytes: int) -> FileRange:
        """Bytes [offset, offset + nbytes) of the file as tensor data. Raises CorruptFile when it ends before that."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.view.size:
            raise CorruptFile(
                f"data at bytes {offset} to {offset + nbytes} lie outside the file of {self.view.size} bytes: "
                "it is truncated or damaged",
                path=self.path,
            )
        return FileRange(self, offset, nbytes)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class FileRange(Data):
    """A range of a mapped file; `read` copies nothing."""

    file: MappedFile
    offset: int
    nbytes: int

    def files(self) -> Iterator[MappedFile]:
        yield self.file

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.file.view[self.offset + start : self.offset + min(stop, self.nbytes)]

    def release(self, start: int, stop: int) -> None:
        """Lets the system drop the pages of bytes [start, stop) from this process."""
        if self.file.mapping is not None and stop > start:
            first = (self.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
            self.file.mapping.madvise(mmap.MADV_DONTNEED, first, self.offset + stop - first)


def truncated_file() -> MappedFile | None:
    """A mapped file that was truncated after it was opened: reading beyond its new end raises the signal SIGBUS, which
    ends the process."""
    for file in tuple(_mapped):
        if file.mapping is not None and file.mapping.size() < file.view.size:
            return file
    return None
