"""Files that are written in large pieces: past the system's cache, or through it without filling it.

Why not plain writes. Copying to the cache takes more processor time than decoding. For writes of some MiB, Linux also
allocates large pages there, which a virtual machine may have to get from its host first (measured: eight times slower).
So large sequential data go directly to disk (O_DIRECT) while more is computed, if the file system supports it. If not,
or if there is less data, they go through the cache in writes of 64 KiB.
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
#: Offsets, lengths and memory addresses of direct I/O are multiples of this: no disk has larger sectors.
_SECTOR = 4096
_BLOCK = 1 << 22
#: Direct I/O is used for writes of at least the first size, once the file has reached the second.
_LARGE_PIECE = 1 << 18
_LARGE_FILE = 1 << 26


def new_file(path: Path) -> BinaryIO:
    """A new file to write from beginning to end, without reading and seeking. Raises FileExistsError if the name
    exists, even as a link."""
    return cast("BinaryIO", _LargeFile(path))


class _LargeFile(io.BufferedIOBase):
    """Collects small writes. Holds data for direct I/O until they fill a block, which a thread then writes. `fileno`
    writes both out first, so that the handle's user finds all bytes."""

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
        """Passes on the collected small writes."""
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

            pages = (mmap.mmap(-1, _BLOCK) for _ in range(2))  # direct I/O needs memory that is aligned to pages
            self._blocks = [np.frombuffer(each, np.uint8) for each in pages]
            self._pool = ThreadPoolExecutor(1)
        count = min(len(data), _BLOCK - self._held)
        self._blocks[0][self._held : self._held + count] = np.frombuffer(data[:count], np.uint8)
        self._held += count
        if self._held == _BLOCK:
            self._hand_over(self._position + count)
        return count

    def _hand_over(self, end: int) -> None:
        """Starts writing the held bytes, up to position `end`, in the thread."""
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
        """Writes all held bytes, and waits for them."""
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
        except OSError:  # the file system does not support it; an error of the disk will come again through the cache
            self._can_be_direct = False
            return 0

    def _write_through_cache(self, data: memoryview, position: int) -> int:
        """Writes through the cache. From time to time the system is told to write to disk, while more is computed."""
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
