"""Folders that this program has created itself, for outputs and downloads until they are complete.

Why marks. A name proves nothing: a repository, an archive or another user may create a file, a folder or a link of any
name, including the names used here. So a folder is always created, never taken over. An existing folder is continued or
removed only if it is a folder and not a link, belongs to this user, and has a mark: a file with the folder's inode
number. Nobody knows that number before the folder is created, so no archive can contain a mark that fits. A lock on the
mark shows that the folder's maker still runs; the system releases it when the process ends, however it ends.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nibblecast.converters.output.creation import open_beside_others

MARK = ".nibblecast-mark"
#: The suffix of folders that hold outputs until they are complete.
PART = ".nibblecast-part"
_TEMPORARY = "temporary"
_RESUMABLE = "resumable"  # of equal length, because it overwrites the other in place
_MOST_MARK_BYTES = 64
_NAME_BYTES = 150  # a name may have 255
_TOKEN_BYTES = 8

#: The temporary folders of this process.
_alive: set[Path] = set()


class NotOurs(Exception):
    """The folder exists, and nothing proves that this program made it."""


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """A folder of this program, and the handle whose lock shows that its maker still runs."""

    path: Path
    handle: int

    def remove(self) -> None:
        """Removes the folder with its content, and releases the lock. Raises nothing."""
        _remove(self.path)
        _alive.discard(self.path)
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        with suppress(OSError):
            os.close(self.handle)


def make_temporary(parent: Path, prefix: str, suffix: str = "") -> PrivateFolder:
    """A new folder in `parent` that only this user can enter, `PREFIXRANDOMSUFFIX`. Raises OSError."""
    while True:
        path = parent / f"{prefix}{os.urandom(_TOKEN_BYTES).hex()}{suffix}"
        if os.path.lexists(path):
            continue
        _alive.add(path)  # first: an interruption may come at any moment
        try:
            path.mkdir(mode=0o700)
            return PrivateFolder(path, _marked(path, _TEMPORARY))
        except FileExistsError:
            _alive.discard(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            _alive.discard(path)
            raise


def open_resumable(path: Path, *, shared: bool) -> PrivateFolder:
    """The folder `path`, locked; an earlier run may have made it. With `shared` it must exist, and other processes may
    share the lock; without, it is created if needed and locked for this process alone. Raises BlockingIOError if
    another process holds it, FileNotFoundError if a shared one does not exist, NotOurs, and other kinds of OSError."""
    if not shared and not os.path.lexists(path) and (made := _make_resumable(path)) is not None:
        return made
    handle = _open_mark(path, _RESUMABLE, _TEMPORARY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return PrivateFolder(path, handle)


def _make_resumable(path: Path) -> PrivateFolder | None:
    """Creates the folder under another name and renames it with its mark, so that a kill at any instant leaves nothing
    without a mark. None if something else has taken the name meanwhile."""
    made = make_temporary(path.parent, hidden_name(path.name[1:].removesuffix(PART)), PART)
    try:
        made.path.rename(path)
    except OSError as error:
        made.remove()
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return None
        raise
    _alive.discard(made.path)
    os.pwrite(made.handle, _text(path.stat().st_ino, _RESUMABLE), 0)
    return PrivateFolder(path, made.handle)


def remove_left_behind(candidates: Iterable[Path]) -> None:
    """Removes the temporary folders whose makers ended without removing them; everything else is untouched."""
    for path in candidates:
        with suppress(OSError, NotOurs):
            handle = _open_mark(path, _TEMPORARY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def remove_all() -> None:
    """Removes the temporary folders of this process: before it ends at once, and at each normal end, in case an earlier
    removal was interrupted."""
    for path in tuple(_alive):
        _remove(path)


atexit.register(remove_all)
os.register_at_fork(after_in_child=_alive.clear)  # they belong to its parent


def _remove(path: Path) -> None:
    """Removes a folder, its mark last: after a kill the rest can still be recognised as ours. Raises nothing."""
    with suppress(OSError):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != MARK:
                Path(entry).unlink()
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()


def hidden_name(name: str) -> str:
    """The prefix of hidden names for an output `name`; it is cut because a name has 255 bytes at most."""
    return f".{os.fsencode(name)[:_NAME_BYTES].decode(sys.getfilesystemencoding(), 'ignore')}."


def _marked(path: Path, kind: str) -> int:
    """Creates the mark of a new folder, and returns its locked handle."""
    handle = os.open(path / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, _text(path.stat().st_ino, kind))  # after locking: a mark that can be read is locked
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open_mark(path: Path, *kinds: str) -> int:
    """The handle of a folder's mark. Raises NotOurs unless this program made the folder for this user, as one of these
    kinds."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise NotOurs
    try:
        handle = open_beside_others(path / MARK, os.O_RDWR)
    except OSError as error:
        raise NotOurs from error
    try:
        marked = os.fstat(handle)
        possible = [_text(status.st_ino, kind) for kind in kinds]
        if marked.st_uid != status.st_uid or os.read(handle, _MOST_MARK_BYTES) not in possible:
            raise NotOurs
    except BaseException:
        os.close(handle)
        raise
    return handle


def _text(inode: int, kind: str) -> bytes:
    return f"{kind} {inode}\n".encode()


def temporary_folders(parent: Path, name: str | None = None, *, below: bool = False) -> Iterator[Path]:
    """Possible temporary folders in `parent` (with `below`, also in the folders below it): all, or those for an output
    `name`. Only the mark tells whether they are."""
    pattern = f".*{PART}"
    for path in parent.rglob(pattern) if below else parent.glob(pattern):
        beginning = hidden_name(name) if name is not None else ""
        token = path.name.removeprefix(beginning).removesuffix(PART)
        if name is None or (path.name.startswith(beginning) and len(token) == 2 * _TOKEN_BYTES):
            yield path
