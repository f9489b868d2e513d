"""Finds the TFLite models in a file, which is a model itself or a container of models.

.litertlm: magic LITERTLM, three u32 of version, u64 end of header at byte 24, a flatbuffer at byte 32 that lists the
sections (schema: litert_lm_builder/litertlm_header_schema of litert-lm-builder 0.18). .task: a ZIP whose members are
stored, not compressed (MediaPipe Tasks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.storage import FileRange, MappedFile
from nibblecast.formats.tflite.flatbuffer import Table, scalar, string, table, tables
from nibblecast.formats.tflite.schema import IDENTIFIER

if TYPE_CHECKING:
    import zipfile

_LITERTLM_MAGIC = b"LITERTLM"
_LITERTLM_HEADER = 32
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_LOCAL_HEADER = 30
_ZIP_STORED = 0
_MOST_NAME = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A TFLite model inside a file: its bytes, its name in the container, and, by name, the container's sections of
    weights that its external buffers may refer to. Offsets in the model count from the start of `data`."""

    name: str
    data: FileRange
    weights: Mapping[str, FileRange] = field(default_factory=dict)


def sections(file: MappedFile) -> list[Section]:
    """The models in `file`: the file itself, or those of the container. Raises CorruptFile if it is neither."""
    head = file.view[:8].tobytes()
    if head == _LITERTLM_MAGIC:
        found = _litertlm_sections(file)
    elif head[:4] == _ZIP_MAGIC:
        found = _zip_sections(file)
    else:
        return [Section("", file.range(0, file.view.size))]
    if not found:
        raise Unsupported("is a container without a TFLite model")
    if sum(section.data.nbytes for section in found) > file.view.size:
        raise CorruptFile("is a container whose models overlap: it is damaged")
    if any(len(section.name) > _MOST_NAME for section in found):
        raise CorruptFile(f"has a section with a name of more than {_MOST_NAME} characters: it is damaged")
    return found


class _StringValue(Table):
    value = string(0)


class _KeyValuePair(Table):
    STRING = 9
    key = string(0)
    value_type = scalar(1, "B")
    string_value = table(2, _StringValue)


class _SectionObject(Table):
    TFLITE_MODEL = 3
    TFLITE_WEIGHTS = 7
    items = tables(0, _KeyValuePair)
    begin_offset = scalar(1, "Q")
    end_offset = scalar(2, "Q")
    data_type = scalar(3, "b")

    def text(self, key: str) -> str:
        """The string under `key` in the section's items."""
        for item in self.items:
            if item.key == key and item.value_type == _KeyValuePair.STRING and item.string_value is not None:
                return item.string_value.value or ""
        return ""


class _SectionMetadata(Table):
    objects = tables(0, _SectionObject)


class _Header(Table):
    section_metadata = table(1, _SectionMetadata)


def _litertlm_sections(file: MappedFile) -> list[Section]:
    if file.view.size < _LITERTLM_HEADER:
        raise CorruptFile("ends inside the .litertlm header: it is truncated")
    end = int(file.view[24:32].view("<u8")[0])
    if not _LITERTLM_HEADER < end <= file.view.size:
        raise CorruptFile(f"has a .litertlm header that ends at byte {end} of {file.view.size}: it is truncated")
    metadata = _Header.root(file.view[_LITERTLM_HEADER:end]).section_metadata
    objects = metadata.objects if metadata is not None else []

    def data(section: _SectionObject) -> FileRange:
        return file.range(section.begin_offset, section.end_offset - section.begin_offset)

    # a section of weights belongs to the model of the same model_type
    weights = {
        section.text("model_type"): data(section)
        for section in objects
        if section.data_type == _SectionObject.TFLITE_WEIGHTS
    }
    found: list[Section] = []
    for section in objects:
        if section.data_type == _SectionObject.TFLITE_MODEL:
            model_type = section.text("model_type")
            own = {"": weights[model_type]} if model_type in weights else {}
            found.append(Section(model_type or f"section{len(found)}", data(section), own))
    return found


def _zip_sections(file: MappedFile) -> list[Section]:
    import zipfile  # importing it takes 8 ms, and few files need it

    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise CorruptFile(f"is a damaged ZIP archive: {error}") from error
    found = []
    for member in members:
        data = _stored_member(file, member)
        if data is not None and data.read(4, 8).tobytes() == IDENTIFIER:
            found.append(Section(member.filename, data))
        elif data is None and member.filename.endswith(".tflite"):
            raise Unsupported(f"holds '{member.filename}' compressed: unzip it, and convert the .tflite itself")
    return found


def _stored_member(file: MappedFile, member: zipfile.ZipInfo) -> FileRange | None:
    """The bytes of an uncompressed member; None for a compressed one."""
    if member.compress_type != _ZIP_STORED or member.flag_bits & 1:
        return None
    header: Any = file.range(member.header_offset, _ZIP_LOCAL_HEADER).read(0, _ZIP_LOCAL_HEADER)
    if header[:4].tobytes() != _ZIP_MAGIC:
        raise CorruptFile(f"has no local header for its member '{member.filename}': it is damaged")
    name_length, extra_length = header[26:30].view("<u2").tolist()
    return file.range(member.header_offset + _ZIP_LOCAL_HEADER + name_length + extra_length, member.file_size)
