"""Temporary folders that do not stay: what a killed process has left is removed by the next one that needs its own."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "nibblecast-"
_LOCK = ".nibblecast-lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for as long as the block lasts. A lock in it, which ends with the process, says that it is in use."""
    _remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        unheld = Path(name, ".lock")
        with unheld.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unheld.rename(unheld.with_name(_LOCK))  # no one sees it before it is held
            yield Path(name).resolve()


def _remove_left_behind() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
