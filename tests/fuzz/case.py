"""One input of the fuzzer: a file, or several that belong together, as bytes and on disk.

Engines and the minimizer know bytes only. A single file is its own bytes; several files are one after the other, each
behind its name and its length.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

_MAGIC = b"\xf0several files\n"
_LENGTHS = struct.Struct("<HI")
#: What a folder is called when all of it is the input.
FOLDER = "."

#: Contents by file name; the first one is what is read, unless the reader takes the folder.
Case = dict[str, bytes]


def joined(case: Case) -> bytes:
    """The bytes that stand for a case."""
    if len(case) == 1:
        return next(iter(case.values()))
    parts = [_MAGIC]
    for name, content in case.items():
        parts += [_LENGTHS.pack(len(name), len(content)), name.encode(), content]
    return b"".join(parts)


def divided(blob: bytes, name: str) -> Case:
    """The files in these bytes; those of a single file are called `name`. Cut or damaged ones give what there is."""
    if not blob.startswith(_MAGIC):
        return {name: blob}
    case: Case = {}
    position = len(_MAGIC)
    while position + _LENGTHS.size <= len(blob):
        length, size = _LENGTHS.unpack_from(blob, position)
        position += _LENGTHS.size
        called = blob[position : position + length].decode("ascii", "replace")
        position += length
        if _is_plain(called):
            case[called] = blob[position : position + size]
        position += size
    return case or {name: b""}


def write(case: Case, folder: Path) -> None:
    """The case's files in a folder, which has nothing else then. They are new files: what still maps old ones keeps
    them."""
    emptied(folder)
    for name, content in case.items():
        (folder / name).write_bytes(content)


def emptied(folder: Path) -> None:
    """Makes a folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _is_plain(name: str) -> bool:
    return name.isprintable() and name.isascii() and name not in ("", ".", "..") and "/" not in name
