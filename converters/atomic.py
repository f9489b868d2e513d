"""Output files that appear whole or not at all.

Each is written under a temporary name beside its target, flushed to the disk, and renamed. Where one output is several
files, the old main file is removed before any of the others is replaced and the new one comes last: whoever finds the
main file finds the files that belong to it, even after a crash at any instant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from converters.errors import UsageError
from converters.large_files import new_file

_NUMBERS = count()


@contextmanager
def atomic_outputs(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Seekable binary files that become `paths` when the block ends without an exception; the first is the main one.
    On an exception nothing is left and what was there before is untouched. Raises UsageError when a folder is missing
    or not writable."""
    streams: list[BinaryIO] = []
    temporary = [_temporary_name(path) for path in paths]
    try:
        for path, name in zip(paths, temporary, strict=True):
            streams.append(_create(path, name))
        yield streams
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        if len(paths) > 1:
            paths[0].unlink(missing_ok=True)
        for path, name in reversed(list(zip(paths, temporary, strict=True))):
            name.replace(path)
        for folder in {path.parent for path in paths}:
            sync_folder(folder)
    finally:
        for stream in streams:
            stream.close()
        for name in temporary:
            with suppress(OSError):
                name.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:150]}.{os.getpid()}-{next(_NUMBERS)}.nibblecast-part")


def _create(path: Path, temporary: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise UsageError("is a folder; the name of a file is needed", path=path)
        return new_file(temporary)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror or error}", path=path) from error


def sync_folder(folder: Path) -> None:
    """Makes the renames in it durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
