"""Where a tensor's canonical bytes come from: memory, a mapped file, or a computation. All of them are lazy.

One small base class, `Data`: how many bytes there are, and any range of them as a uint8 array.
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

    Only `nbytes` and `read` must be there. A base class and not a protocol: the defaults are written once, and nobody
    has to ask what another class of data can do.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # a dataclass would take an inherited property for the default of its field of that name

        @property
        @abstractmethod
        def nbytes(self) -> int:
            """How many bytes there are."""

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), contiguous, shape (stop - start,); they may be a read-only view, never to be changed."""

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes [start, stop): in the first bytes of `out` if the data supports it, else in new memory. Reusing `out`
        matters: allocating costs as much as decoding."""
        return self.read(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Lets go of the memory that bytes [start, stop) take; a later `read` brings them back."""
        return

    def made_of(self) -> tuple[Data, ...]:
        """The data that it is computed from."""
        return ()

    def files(self) -> Iterator[MappedFile]:
        """The files that it is read from, be it through computations."""
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
    """Data one after the other."""

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
        """The data that bytes [start, stop) lie in, with the range of each."""
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
    """A file to read from its beginning. Raises OSError for whatever is not a regular file: a FIFO, a device or a
    socket would have the reader wait for ever, or read without end. The kind is that of the open file, so that nothing
    can take its place after it was looked at."""
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


#: All files that are mapped, for whoever has to tell which of them has become shorter.
_mapped: WeakSet[MappedFile] = WeakSet()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MappedFile:
    """A file mapped into memory read-only; `view` is uint8 of shape (file size,). Closed when nothing refers to it.
    `identity` is what the system said of the file when it was opened: device, inode, and when it was last written to
    in nanoseconds."""

    path: Path
    view: NDArray[np.uint8]
    mapping: mmap.mmap | None
    identity: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Maps `path` whole. Raises CorruptFile when it cannot be read or is not a regular file, MissingFile when it is
        not there."""
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
        """Raises ChangedFile where the file has been written to or cut off since it was opened."""
        if self.mapping is None:
            return
        try:
            found, size = _identity(self.path.stat()), self.mapping.size()
        except OSError:
            return  # it has been removed; what is mapped stays
        is_another = found[:2] != self.identity[:2]  # that has been put in its place; what is mapped stays
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
    """A mapped file that has become shorter since: reading what is gone ends a process by the signal SIGBUS."""
    for file in tuple(_mapped):
        if file.mapping is not None and file.mapping.size() < file.view.size:
            return file
    return None
