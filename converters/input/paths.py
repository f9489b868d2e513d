"""Checks paths from users before they reach the system.

Python's own functions raise ValueError for an impossible path, and take an empty one for the current folder: a script
with an empty variable would convert whatever lies there.
"""

from __future__ import annotations

import os
from pathlib import Path

from nibblecast.converters.errors import CorruptFile, Error, UsageError

#: A path as the public functions take it.
AnyPath = str | os.PathLike[str]


def input_path(given: str | os.PathLike[str]) -> Path:
    """The path of an input. Raises CorruptFile for a path that no file can have."""
    return _checked(given, CorruptFile)


def output_path(given: str | os.PathLike[str]) -> Path:
    """The path of an output. Raises UsageError for a path that no file can have."""
    return _checked(given, UsageError)


def _checked(given: str | os.PathLike[str], kind: type[Error]) -> Path:
    text = os.fspath(given)
    if not text:
        raise kind("the path is empty: name a file")
    if "\0" in text:
        raise kind("has a zero byte in its path, which no file can have", path=Path(text))
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise kind(f"has a path that this system cannot encode ({error.encoding})", path=Path(text)) from error
    return Path(text)
