"""Output files that appear complete or not at all.

They are written to a temporary folder beside the target, under their own names, flushed to disk, and renamed.

Why a folder, not files with temporary names. Nobody else can put a link in it. Files that refer to each other can be
read there before they replace others (`--verify`). One removal cleans up everything.
Why this order. If one output is several files, the old main file is removed before any other is replaced, and the new
one comes last. So a main file always has the files that belong to it, even after a crash at any instant.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import OutputFile
from nibblecast.converters.output.creation import refuse_special
from nibblecast.converters.output.large_files import new_file
from nibblecast.converters.output.private_folder import PART, PrivateFolder, hidden_name, make_temporary


@dataclass(slots=True)
class StagedFiles:
    """Files that will become `paths`; the first is the main one. `streams` are the binary streams to write to, and
    `places` the temporary paths, in the same order."""

    paths: Sequence[Path]
    streams: list[BinaryIO] = field(default_factory=list)
    places: list[Path] = field(default_factory=list)
    _folders: dict[Path, PrivateFolder] = field(default_factory=dict)

    @property
    def main(self) -> Path:
        """The temporary path of the main file."""
        return self.places[0]

    def has(self, file: OutputFile) -> bool:
        """Whether a file is complete already: never, because these are always written anew."""
        return False

    @contextmanager
    def file(self, file: OutputFile) -> Iterator[BinaryIO]:
        """A file to write; it is flushed to disk (fsync) when the block ends without an exception."""
        stream = self.streams[self.paths.index(file.path)]
        yield stream
        _complete(stream)

    def complete(self) -> None:
        """Flushes all files to disk and closes them. Raises OSError, e.g. for a full disk."""
        for stream in self.streams:
            if not stream.closed:
                _complete(stream)

    def make(self) -> None:
        """Creates the files. Raises UsageError."""
        for path in self.paths:
            refuse_special(path)
            parent = path.parent
            try:
                folder = self._folders.get(parent)
                if folder is None:
                    prefix = hidden_name(self.paths[0].name)
                    folder = self._folders[parent] = make_temporary(parent, prefix, PART)
                self.places.append(folder.path / path.name)
                self.streams.append(new_file(self.places[-1]))
            except OSError as error:
                raise UsageError(f"cannot be written: {error.strerror or error}", path=path) from error

    def put_in_place(self) -> None:
        """Renames all files to their final paths. Raises OSError."""
        placed = list(zip(self.places, self.paths, strict=True))
        for place, path in placed:
            _keep_mode(path, place)
        if len(placed) > 1:
            self.paths[0].unlink(missing_ok=True)
        for place, path in reversed(placed):
            place.replace(path)
        for folder in self._folders:
            sync_folder(folder)

    def discard(self) -> None:
        """Removes all files that were not put in place. Raises nothing."""
        for stream in self.streams:
            with suppress(OSError):  # closing flushes again, which a full disk refuses again
                stream.close()
        for folder in self._folders.values():
            folder.remove()


@contextmanager
def atomic_outputs(paths: Sequence[Path]) -> Iterator[StagedFiles]:
    """Files that become `paths` when the block ends without an exception. After an exception nothing is left, and
    former files are untouched. Raises UsageError if a folder is missing or not writable, and for an existing target
    that is not a file."""
    staged = StagedFiles(paths)
    try:
        staged.make()
        yield staged
        staged.complete()
        staged.put_in_place()
    finally:
        staged.discard()


def _complete(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _keep_mode(path: Path, staged: Path) -> None:
    """Copies the permissions of the file that is replaced: an output that was made private stays private."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            staged.chmod(stat.S_IMODE(status.st_mode) & 0o777)


def sync_folder(folder: Path) -> None:
    """Makes the renames in the folder durable, if the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
