"""Temporary folders of this machine for files that come from, or go to, another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nibblecast.converters.output.private_folder import make_temporary, remove_left_behind

_PREFIX = "nibblecast-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that exists during the block. Folders that killed processes left behind are removed first: their marks
    show that they are temporary, belong to this user, and that their maker is gone."""
    parent = Path(tempfile.gettempdir()).resolve()
    remove_left_behind(parent.glob(f"{_PREFIX}*"))
    folder = make_temporary(parent, _PREFIX)
    try:
        yield folder.path
    finally:
        folder.remove()
