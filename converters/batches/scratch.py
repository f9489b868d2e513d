"""Temporary folders of this machine for what comes from, or goes to, another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nibblecast.converters.output.private_folder import make_temporary, remove_left_behind

_PREFIX = "nibblecast-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for as long as the block lasts. What processes that were killed have left is removed first: folders
    that are marked as this user's temporary ones, and whose maker is gone."""
    parent = Path(tempfile.gettempdir()).resolve()
    remove_left_behind(parent.glob(f"{_PREFIX}*"))
    folder = make_temporary(parent, _PREFIX)
    try:
        yield folder.path
    finally:
        folder.remove()
