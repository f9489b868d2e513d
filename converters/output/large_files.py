"""Files that are written in large pieces: past the system's cache, and without filling it.

Copying to the cache takes more of the processor than decoding does, and of writes of some MiB Linux makes large pages
there, which a virtual machine may have to get from its host first (measured eight times slower). So what is written in
a row goes to the disk directly (O_DIRECT), while more is computed, where the file system can do that, and through the
cache in writes of 64 KiB where it cannot, or where there is less of it.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the latter imported when a file is large
    from concurrent.futures import Future, ThreadPoolExecutor

    from _typeshed import ReadableBuffer

_SMALL_PIECE = 1 << 13
_MOST_AT_ONCE = 1 << 16
_ON_ITS_WAY = 1 << 26

_DIRECT: int = getattr(os, "O_DIRECT", 0)
#: What offsets, lengths and memory are multiples of: no disk has larger sectors.
_SECTOR = 4096
_BLOCK = 1 << 22
#: Directly goes what is written so many bytes at a time, in a file that has become so large.
_LARGE_PIECE = 1 << 18
_LARGE_FILE = 1 << 26


def new_file(path: Path) -> BinaryIO:
    """A file to write from its beginning to its end, made anew: it cannot be read, and nothing can seek in it. Raises
    FileExistsError where there is anything of that name, a link included."""
    return cast("BinaryIO", _LargeFile(path))


class _LargeFile(io.BufferedIOBase):
    """Collects what is small. Holds what goes to the disk directly until it is a block, and has a thread write that.
    `fileno` settles both first: who has the handle finds all bytes that were written."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "x")
        self._path = path
        self._handle = self._file.fileno()
        self._direct_handle: int | None = None
        self._small = bytearray()
        self._position = 0  # of the next byte after the small ones
        self._since = 0
        self._can_be_direct = _DIRECT != 0
        self._held = 0  # bytes before the position, in the first block
        self._blocks: list[NDArray[np.uint8]] = []  # the second is the one that is on its way
        self._pool: ThreadPoolExecutor | None = None
        self._on_its_way: Future[None] | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        with memoryview(data).cast("B") as view:
            if len(view) < _SMALL_PIECE:
                self._small += view
            if len(view) >= _SMALL_PIECE or len(self._small) >= _SMALL_PIECE:
                self.flush()
            if len(view) >= _SMALL_PIECE:
                self._write_all(view)
            return len(view)

    def flush(self) -> None:
        """Hands on what is small."""
        if self._small:
            small, self._small = self._small, bytearray()
            with memoryview(small) as view:
                self._write_all(view)

    def _write_all(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            rest = data[done:]
            is_direct = len(rest) >= _LARGE_PIECE and self._position >= _LARGE_FILE and self._can_be_direct
            begun = self._position % _SECTOR
            if self._held or (is_direct and not begun):
                count = self._hold(rest)
            else:
                self._wait()
                count = self._write_through_cache(rest[: _SECTOR - begun] if is_direct else rest, self._position)
            self._position += count
            done += count

    def _hold(self, data: memoryview) -> int:
        if not self._blocks:
            from concurrent.futures import ThreadPoolExecutor

            pages = (mmap.mmap(-1, _BLOCK) for _ in range(2))  # memory of which the beginning is that of a page
            self._blocks = [np.frombuffer(each, np.uint8) for each in pages]
            self._pool = ThreadPoolExecutor(1)
        count = min(len(data), _BLOCK - self._held)
        self._blocks[0][self._held : self._held + count] = np.frombuffer(data[:count], np.uint8)
        self._held += count
        if self._held == _BLOCK:
            self._hand_over(self._position + count)
        return count

    def _hand_over(self, end: int) -> None:
        """Has what is held, up to position `end`, written while more comes."""
        self._wait()
        if self._pool is not None and self._held:
            held = self._blocks[0][: self._held].data
            self._on_its_way = self._pool.submit(self._write_block, held, end - self._held)
            self._blocks.reverse()
        self._held = 0

    def _wait(self) -> None:
        pending, self._on_its_way = self._on_its_way, None
        if pending is not None:
            pending.result()

    def _settle(self) -> None:
        """Writes all that is held."""
        self._hand_over(self._position)
        self._wait()

    def _write_block(self, data: memoryview, position: int) -> None:
        done, whole = 0, len(data) // _SECTOR * _SECTOR
        with data:
            while done < whole and done % _SECTOR == 0 and self._can_be_direct:
                done += self._write_directly(data[done:whole], position + done)
            while done < len(data):
                done += self._write_through_cache(data[done:], position + done)

    def _write_directly(self, data: memoryview, position: int) -> int:
        try:
            if self._direct_handle is None:
                handle = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | _DIRECT)
                self._direct_handle = handle
                if not os.path.samestat(os.fstat(handle), os.fstat(self._handle)):
                    raise FileNotFoundError(errno.ENOENT, "has been replaced while it was written", str(self._path))
            return os.pwrite(self._direct_handle, data, position)
        except OSError:  # the file system cannot do it; an error of the disk comes again by the other way
            self._can_be_direct = False
            return 0

    def _write_through_cache(self, data: memoryview, position: int) -> int:
        """What is written so goes to the disk while more is computed."""
        count = os.pwrite(self._handle, data[:_MOST_AT_ONCE], position)
        self._since += count
        if self._since >= _ON_ITS_WAY and hasattr(os, "posix_fadvise"):
            begin = max(0, position + count - self._since)
            os.posix_fadvise(self._handle, begin, self._since, os.POSIX_FADV_DONTNEED)
            self._since = 0
        return count

    def tell(self) -> int:
        return self._position + len(self._small)

    def fileno(self) -> int:
        self.flush()
        self._settle()
        return self._handle

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            self._settle()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            self._blocks.clear()
            if self._direct_handle is not None:
                os.close(self._direct_handle)
                self._direct_handle = None
            self._file.close()
            super().close()
