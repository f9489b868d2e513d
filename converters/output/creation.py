"""The one way to create files and open lock files: never through a link, never over an existing file.

Why. A target folder may be shared or come from an archive. A link in it would let its author overwrite any file that
this user may write.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import IO

from nibblecast.converters.errors import UsageError

_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def refuse_special(path: Path) -> None:
    """Raises UsageError if `path` exists and is not a file: a folder, a device, a FIFO or a socket, or a link to one of
    these. A link to a file, or to nothing, is not followed: the output replaces the link itself."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror or error}", path=path) from error
    if stat.S_ISDIR(status.st_mode):
        raise UsageError("is a folder; give the name of a file", path=path)
    what = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), None)
    if what is not None:
        raise UsageError(f"is {what}, not a file: outputs are files that are put in place whole", path=path)


def open_beside_others(path: Path, flags: int) -> int:
    """The handle of a file that other processes open too; created if `flags` contain O_CREAT. Raises OSError for a link
    and for anything but a regular file with a single name."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(handle)
        raise OSError(f"is not a regular file of its own: {path}")
    return handle


def lock(path: Path) -> IO[str]:
    """A file that is locked for this process until it is closed. Raises BlockingIOError if another process holds the
    lock, and OSError as in `open_beside_others`."""
    stream = os.fdopen(open_beside_others(path, os.O_RDWR | os.O_CREAT), "r+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        stream.close()
        raise
    return stream
