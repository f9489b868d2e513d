"""Folders that appear complete or not at all, and can be resumed shard by shard.

All files are written to a folder beside the target, `.NAME.nibblecast-part/NAME`. Each has a temporary name until it is
complete and on disk. After the last one, NAME is moved to its place. A run that is killed leaves the folder behind. The
next run starts again or, with `resume`, keeps the complete shards if both runs have the same intent.

Why the outer folder has a fixed name: the next run must find it. But anyone could create that name first, so it is used
and emptied only if its mark proves that a run of this user made it (`converters.output.private_folder`).
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Companion, OutputFile, Plan
from nibblecast.converters.output.atomic import sync_folder
from nibblecast.converters.output.large_files import new_file
from nibblecast.converters.output.private_folder import MARK, PART, NotOurs, open_resumable
from nibblecast.converters.storage import open_regular
from nibblecast.converters.version import __version__

_INTENT = ".nibblecast-intent"
_FORMER = ".nibblecast-former"
_INCOMPLETE = ".incomplete"
_INDEX = ".index.json"


@dataclass(frozen=True, slots=True)
class StagedFolder:
    """A folder that is being written: `main` now, `target` at the end. `around` is the private folder that holds it."""

    target: Path
    main: Path
    around: Path

    def has(self, file: OutputFile) -> bool:
        """Whether an earlier run has completed the file."""
        try:
            status = self._place(file).lstat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == file.nbytes

    @contextmanager
    def file(self, file: OutputFile) -> Iterator[BinaryIO]:
        """A file to write; it gets its name when the block ends without an exception."""
        path = self._place(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_name(path.name + _INCOMPLETE)
        incomplete.unlink(missing_ok=True)  # left by a run that was killed
        with new_file(incomplete) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        incomplete.replace(path)

    def _place(self, file: OutputFile) -> Path:
        return self.main / file.path.relative_to(self.target)

    @property
    def is_begun(self) -> bool:
        """Whether any file is complete."""
        return any(not entry.name.startswith(".") and entry.suffix != _INCOMPLETE for entry in self.main.iterdir())


def intent(plan: Plan, request: Mapping[str, Any]) -> str:
    """What a run will write, as text: two runs of the same intent write the same bytes. `request` has the options and
    the source files."""
    document = {
        "nibblecast": __version__,
        "request": dict(request),
        "shards": [[_name(s.file), s.file.nbytes, s.digest] for s in plan.shards],
        "companions": [[_name(c.file), _digest(c)] for c in plan.companions],
    }
    return json.dumps(document, sort_keys=True, default=str)


def _name(file: OutputFile) -> str:
    return str(file.path if file.folder is None else file.path.relative_to(file.folder))


def _digest(companion: Companion) -> str:
    if isinstance(companion.content, bytes):
        return sha256(companion.content).hexdigest()
    status = companion.content.stat()
    return f"{companion.content} {status.st_size} {status.st_mtime_ns}"


@contextmanager
def atomic_folder(folder: Path, plan: Plan, intended: str, *, resume: bool) -> Iterator[StagedFolder]:
    """A folder to write files to; it becomes the plan's folder when the block ends without an exception. After an
    interruption or an error of the system (a full disk) complete files are kept for `resume`. After any other exception
    nothing is left. Raises UsageError if the target holds files that the plan does not write, if its parent folder is
    missing, and if another run is writing it."""
    with _staging(folder, plan) as staged:
        _begin(staged, intended, resume=resume)
        try:
            yield staged
            _put_in_place(staged)
        except (KeyboardInterrupt, SystemExit, OSError):
            if not staged.is_begun:
                shutil.rmtree(staged.around, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(staged.around, ignore_errors=True)
            raise


def begin_folder(folder: Path, plan: Plan, intended: str) -> None:
    """Creates the folder that `begun_folder` and `atomic_folder` with `resume` continue. Raises as `atomic_folder`."""
    with _staging(folder, plan) as staged:
        _begin(staged, intended, resume=True)


@contextmanager
def begun_folder(folder: Path, plan: Plan, intended: str) -> Iterator[StagedFolder]:
    """A folder that was begun, for one of several processes that write its shards. Raises UsageError if it was not
    begun, or was begun with another intent."""
    with _staging(folder, plan, shared=True) as staged:
        if _text_of(staged.around / _INTENT) != intended:
            raise UsageError("was started for another source, or with other options", path=folder)
        yield staged


@contextmanager
def _staging(folder: Path, plan: Plan, *, shared: bool = False) -> Iterator[StagedFolder]:
    """The folder beside the target, locked: by one process, which may create it, or by several that share it."""
    _check_replaceable(folder, plan)
    path = folder.with_name(f".{folder.name}{PART}")
    try:
        held = open_resumable(path, shared=shared)
    except BlockingIOError as error:
        raise UsageError("is being written by another run: wait for it, or stop it", path=folder) from error
    except NotOurs:
        raise UsageError(
            f"cannot be written: '{path.name}' beside it is in the way, and cannot be proved to be left by a run of "
            "this user: remove it, or name another folder",
            path=folder,
        ) from None
    except FileNotFoundError as error:
        if shared:
            raise UsageError("was not started", path=folder) from error
        raise UsageError(f"cannot be written: {error.strerror}", path=folder) from error
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror or error}", path=folder) from error
    try:
        yield StagedFolder(folder, held.path / folder.name, held.path)
    finally:
        held.close()


def _begin(staged: StagedFolder, intended: str, *, resume: bool) -> None:
    """With `resume`, keeps the files of a run with the same intent; otherwise empties the folder."""
    if not (resume and staged.main.is_dir() and _text_of(staged.around / _INTENT) == intended):
        _empty(staged.around)
        staged.main.mkdir()
        with new_file(staged.around / _INTENT) as stream:
            stream.write(intended.encode("utf-8", "surrogatepass"))


def _check_replaceable(folder: Path, plan: Plan) -> None:
    """Raises UsageError for a folder that holds anything but files of the kind that will be written: replacing it would
    delete them."""
    try:
        status = folder.lstat()
    except OSError:
        return  # it does not exist; or it is not accessible, which creating the folder beside it will report
    if stat.S_ISLNK(status.st_mode):
        raise UsageError("is a link; a folder is put in its place whole: name the folder itself", path=folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError("is not a folder; give the name of a folder", path=folder)
    written = {file.path.relative_to(folder).parts[0] for file in plan.files}
    # an earlier conversion may have had another number of shards
    shards = {(shard.file.path.stem.partition("-")[0], shard.file.path.suffix) for shard in plan.shards}
    for entry in folder.iterdir():
        former = (entry.stem.partition("-")[0], entry.suffix) in shards or entry.name in {
            f"{stem}{suffix}{_INDEX}" for stem, suffix in shards
        }
        if entry.name not in written and not former:
            raise UsageError(
                f"is a folder that holds '{entry.name}', which would be deleted: name a new folder, or empty this one",
                path=folder,
            )


def _text_of(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            return stream.read().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError):
        return ""


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()


def _put_in_place(staged: StagedFolder) -> None:
    """Moves the staged folder to its place. A former folder is moved into the private folder, which is then removed."""
    folder = staged.target
    for entry in staged.main.iterdir():
        if entry.is_dir():
            sync_folder(entry)
    sync_folder(staged.main)
    if folder.exists():
        staged.main.chmod(stat.S_IMODE(folder.stat().st_mode))
        former = staged.around / _FORMER
        folder.rename(former)
        try:
            staged.main.rename(folder)
        except OSError:
            former.rename(folder)
            raise
    else:
        staged.main.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(staged.around, ignore_errors=True)
