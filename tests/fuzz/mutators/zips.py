"""ZIP archives that may lie: written entry by entry, every field of which can be another than the truth.

Format: APPNOTE.TXT 6.3, of PKWARE. Dates are always the same, so that the same entries are the same bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from zlib import crc32

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, text

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_DATE = 33  # 1980-01-01
_U32 = 0xFFFFFFFF

#: Changes what an entry holds, given what the entry of that name in another archive holds.
Change = Callable[[bytes, bytes, Random], bytes]


@dataclass(frozen=True)
class Entry:
    """A record: its name and bytes as stored; None is the truth."""

    name: bytes
    content: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    offset: int | None = None
    local_name: bytes | None = None
    local_method: int | None = None
    extra: bytes = b""


def archive(entries: Sequence[Entry]) -> bytes:
    """The bytes of the archive."""
    parts: list[bytes] = []
    directory: list[bytes] = []
    position = 0
    for entry in entries:
        size = len(entry.content) if entry.size is None else entry.size
        name = entry.name if entry.local_name is None else entry.local_name
        method = entry.method if entry.local_method is None else entry.local_method
        common = entry.flags, method, 0, _DATE, crc32(entry.content), len(entry.content) & _U32, size & _U32
        head = _LOCAL.pack(b"PK\x03\x04", 20, *common, len(name), len(entry.extra)) + name + entry.extra
        offset = position if entry.offset is None else entry.offset
        common = entry.flags, entry.method, 0, _DATE, crc32(entry.content), len(entry.content) & _U32, size & _U32
        directory.append(
            _CENTRAL.pack(b"PK\x01\x02", 20, 20, *common, len(entry.name), 0, 0, 0, 0, 0, offset & _U32) + entry.name
        )
        parts += [head, entry.content]
        position += len(head) + len(entry.content)
    listing = b"".join(directory)
    count = len(entries) & 0xFFFF
    return b"".join((*parts, listing, _END.pack(b"PK\x05\x06", 0, 0, count, count, len(listing), position, 0)))


def entries_of(data: bytes) -> list[Entry]:
    """The records of an archive. Raises ValueError for what is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            return [Entry(info.filename.encode("utf-8", "replace"), file.read(info)) for info in file.infolist()]
    except Exception as error:  # whatever zipfile makes of a damaged one
        raise ValueError from error


def changed(data: bytes, other: bytes, random: Random, change: Change) -> bytes:
    """An archive with one of its records changed: mostly by `change`, which is given the content; or what is said of
    one; or which there are."""
    try:
        entries, others = entries_of(data), _try(other)
    except ValueError:
        return havoc(data, other, random)
    choice = random.random()
    if choice < 0.75 and entries:
        at = _chosen(entries, random)
        entry = entries[at]
        counterpart = next((each.content for each in others if _stem(each.name) == _stem(entry.name)), b"")
        entries[at] = replace(entry, content=change(entry.content, counterpart, random))
        return archive(entries)
    made = archive(edited(random, entries, others, lambda entry: _lying(entry, random)))
    return made if choice < 0.95 else havoc(made, other, random)


def _chosen(entries: Sequence[Entry], random: Random) -> int:
    """Which record: pickles and JSON rather than numbers."""
    worth = [8 if entry.name.endswith((b".pkl", b".json")) else 1 for entry in entries]
    return random.choices(range(len(entries)), worth)[0]


def _stem(name: bytes) -> bytes:
    return name.rpartition(b"/")[2]


def _lying(entry: Entry, random: Random) -> Entry:
    name = text(random, entry.name.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return random.choice(
        (
            replace(entry, name=name),
            replace(entry, local_name=name),
            replace(entry, method=random.choice((8, 12, 14, 99))),
            replace(entry, local_method=8),
            replace(entry, flags=1 << random.randrange(16)),
            replace(entry, size=integer(random, len(entry.content), _U32)),
            replace(entry, offset=integer(random, 64, _U32)),
            replace(entry, extra=bytes(random.randrange(70))),
            replace(entry, content=entry.content[: random.randrange(len(entry.content) + 1)]),
        )
    )


def _try(data: bytes) -> list[Entry]:
    try:
        return entries_of(data)
    except ValueError:
        return []
