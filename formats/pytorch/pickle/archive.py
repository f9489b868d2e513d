"""The ZIP archives that PyTorch writes since 1.6: records that are stored, not compressed, below one top folder.

Python's zipfile reads the central directory; where a record's bytes begin is in its local header, which must say the
same (APPNOTE 4.3.7). torch 2.13 (caffe2/serialize/inline_container.cc) stores everything and aligns it to 64 bytes.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.storage import FileRange, MappedFile
from nibblecast.formats.pytorch.pickle.records import reason_of

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 1
#: What TorchScript archives have beside the pickle of their modules.
CONSTANTS = "constants.pkl"
#: What torch.export wrote its programs to before torch 2.8.
OLD_PROGRAM = "serialized_exported_program.json"


@dataclass(frozen=True, slots=True, eq=False)
class Archive:
    """The records by their names below the top folder, which is left out. `data` is where the archive lies: a whole
    file, or a record of another archive."""

    data: FileRange
    entries: Mapping[str, zipfile.ZipInfo]

    @classmethod
    def open(cls, source: MappedFile | FileRange) -> Archive:
        """Reads the directory. Raises CorruptFile where it is cut off or has records that overlap or lie outside, or
        two of one name."""
        data = source.range(0, source.view.size) if isinstance(source, MappedFile) else source
        try:
            with zipfile.ZipFile(_Stream(data.read(0, data.nbytes))) as archive:
                entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
        except Exception as error:  # zipfile raises whatever comes of reading on: struct.error, IndexError, ValueError
            raise CorruptFile(
                f"its ZIP directory cannot be read ({reason_of(error)}): it is truncated or damaged"
            ) from None
        _refuse_overlaps(entries)
        # a file zipped by hand may have no top folder at all
        tops = {entry.filename.partition("/")[0] for entry in entries}
        named = {entry.filename.partition("/")[2] if len(tops) == 1 else entry.filename: entry for entry in entries}
        if len(named) < len(entries):
            raise CorruptFile("has two records of one name: it is damaged")
        return cls(data, named)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def is_exported(self) -> bool:
        """Whether torch.export (or AOTInductor) made the archive: it holds a program, and no pickle at its top."""
        return "archive_format" in self or OLD_PROGRAM in self

    def record(self, name: str) -> FileRange:
        """Where a record's bytes lie. Raises CorruptFile when there is none, or when its own header tells otherwise
        than the directory; Unsupported where it is compressed or encrypted."""
        entry = self.entries.get(name)
        if entry is None:
            raise CorruptFile(f"has no record {brief(name)}: it is truncated, or not written by PyTorch")
        if entry.flag_bits & _ENCRYPTED:
            raise Unsupported(f"its record {brief(name)} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Unsupported(
                f"its record {brief(name)} is compressed, which PyTorch never does: zip it again with `zip -0`"
            )
        head = self._range(entry.header_offset, _LOCAL_HEADER.size)
        magic, _, _, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(head.read(0, head.nbytes).tobytes())
        if magic != _LOCAL_MAGIC or method != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CorruptFile(f"its record {brief(name)} is not what its ZIP directory says: it is damaged")
        return self._range(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length, entry.file_size)

    def bytes_of(self, name: str) -> bytes:
        """All bytes of a record."""
        data = self.record(name)
        return data.read(0, data.nbytes).tobytes()

    def _range(self, offset: int, nbytes: int) -> FileRange:
        if offset < 0 or offset + nbytes > self.data.nbytes:
            raise CorruptFile(
                f"has a record at bytes {offset} to {offset + nbytes} of an archive of {self.data.nbytes}: "
                "it is truncated or damaged"
            )
        return self.data.file.range(self.data.offset + offset, nbytes)


class _Stream(io.RawIOBase):
    """Bytes as a file that can be read, without copying them all."""

    def __init__(self, view: NDArray[np.uint8]) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._view.size}[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: part.size] = part.tobytes()
        self._position += part.size
        return part.size


def _refuse_overlaps(entries: Sequence[zipfile.ZipInfo]) -> None:
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise CorruptFile(f"its records {brief(before)} and {brief(entry.filename)} overlap: it is damaged")
        end = entry.header_offset + _LOCAL_HEADER.size + entry.compress_size
        before = entry.filename
