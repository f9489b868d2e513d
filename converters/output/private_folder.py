"""Folders that this program has made itself: where outputs and downloads lie until they are complete.

A name proves nothing. A repository, an archive or another user may hold a file, a folder or a link of any name, those
used here included. So a folder is made anew, never taken over, and a folder that is found is only continued or removed
when all of this holds: it is a folder and not a link, it belongs to this user, and it has a mark, a file which holds
the folder's inode number. Nobody can know that number before the folder is made, so that no archive can bring a mark
that fits. A lock on the mark says that the folder's maker still runs; the system ends it with the process.
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
#: How the names of folders end in which outputs are staged.
PART = ".nibblecast-part"
_TEMPORARY = "temporary"
_RESUMABLE = "resumable"  # as long as the other, which it is written over
_MOST_MARK_BYTES = 64
_NAME_BYTES = 150  # of the 255 that a name may have
_TOKEN_BYTES = 8

#: The temporary folders of this process.
_alive: set[Path] = set()


class NotOurs(Exception):
    """A folder is there that this program cannot prove to have made."""


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """A folder that was made here, and the handle whose lock says that its maker still runs."""

    path: Path
    handle: int

    def remove(self) -> None:
        """Removes the folder with all that is in it, and lets go of the lock. Raises nothing."""
        _remove(self.path)
        _alive.discard(self.path)
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
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
    """The folder `path`, which a run before this one may have made, locked: `shared` with others, which needs one that
    is there, or for this process alone, which makes it where there is none. Raises BlockingIOError where another
    process holds it, FileNotFoundError where a shared one is not there, NotOurs, and other kinds of OSError."""
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
    """Made under another name and renamed with its mark, so that a kill at any instant leaves nothing in the way. None
    where something else has got that name meanwhile."""
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
    """Removes those temporary folders whose makers have ended without doing so; all else stays as it is."""
    for path in candidates:
        with suppress(OSError, NotOurs):
            handle = _open_mark(path, _TEMPORARY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def remove_all() -> None:
    """Removes the temporary folders of this process. For one that ends at once; and at the end of each, for those whose
    own removal was interrupted."""
    for path in tuple(_alive):
        _remove(path)


atexit.register(remove_all)
os.register_at_fork(after_in_child=_alive.clear)  # they are its parent's


def _remove(path: Path) -> None:
    """Removes a folder, its mark last: what a kill leaves of it can still be told to be ours. Raises nothing."""
    with suppress(OSError):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != MARK:
                Path(entry).unlink()
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()


def hidden_name(name: str) -> str:
    """The beginning of the hidden names for what becomes `name`: cut, for a name has 255 bytes at most."""
    return f".{os.fsencode(name)[:_NAME_BYTES].decode(sys.getfilesystemencoding(), 'ignore')}."


def _marked(path: Path, kind: str) -> int:
    """Makes the mark of a new folder, and gives its handle, which is locked."""
    handle = os.open(path / MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, _text(path.stat().st_ino, kind))  # after the lock: a mark that can be read is held
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open_mark(path: Path, *kinds: str) -> int:
    """The handle of a folder's mark. Raises NotOurs where the folder was not made by this program for this user, as one
    of these kinds."""
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
    """What may be temporary folders in `parent` (and, with `below`, in the folders below it): all of them, or those for
    an output called `name`. The mark tells whether they are."""
    pattern = f".*{PART}"
    for path in parent.rglob(pattern) if below else parent.glob(pattern):
        beginning = hidden_name(name) if name is not None else ""
        token = path.name.removeprefix(beginning).removesuffix(PART)
        if name is None or (path.name.startswith(beginning) and len(token) == 2 * _TOKEN_BYTES):
            yield path
