"""The safetensors container: its header, checked, and where each tensor's bytes lie.

Format: a u64 length, a JSON object of that length, the data (https://github.com/huggingface/safetensors, 0.8, whose
refusals are ours too: holes, overlaps, trailing bytes, sizes that do not match).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np

from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    BOOL,
    COMPLEX64,
    FLOAT4,
    FLOAT8_E4M3,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2FNUZ,
    FLOAT8_E8M0,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    bits_of,
)
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.storage import Data, MappedFile
from nibblecast.formats.encodings.bytes import float6

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"

#: The container's dtypes whose bytes are those of a NumPy (or ml_dtypes) equivalent: all 22 but float6.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": BOOL,
        "U8": UINT8,
        "I8": INT8,
        "U16": UINT16,
        "I16": INT16,
        "U32": UINT32,
        "I32": INT32,
        "U64": UINT64,
        "I64": INT64,
        "F16": FLOAT16,
        "BF16": BFLOAT16,
        "F32": FLOAT32,
        "F64": FLOAT64,
        "C64": COMPLEX64,
        "F8_E4M3": FLOAT8_E4M3,
        "F8_E5M2": FLOAT8_E5M2,
        "F8_E4M3FNUZ": FLOAT8_E4M3FNUZ,
        "F8_E5M2FNUZ": FLOAT8_E5M2FNUZ,
        "F8_E8M0": FLOAT8_E8M0,
        "F4": FLOAT4,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """An entry of the header: logical shape, dtype, and its canonical bytes: a range of the file, or what is computed
    from one (float6, which the file has in six bits and NumPy in eight)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: Data


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsHeader:
    """A whole file, or several: the entries in the header's order, the `__metadata__` strings, and the files' size."""

    entries: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    nbytes: int


def open_container(file: MappedFile) -> SafetensorsHeader:
    """Parses and checks the header. Raises CorruptFile with what is wrong, Unsupported for dtypes unknown here."""
    header, start = _header(file)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"its {METADATA_KEY} is not an object of strings")
    spans = sorted((_entry(name, entry, file, start) for name, entry in header.items()), key=lambda span: span[1:3])
    end = 0
    for name, first, last, _ in spans:
        if first != end:
            raise CorruptFile(
                f"its data begins at byte {first} where byte {end} is due: holes and overlaps are refused", tensor=name
            )
        end = last
    if start + end != file.view.size:
        raise CorruptFile(
            f"has {file.view.size} bytes where its header describes {start + end}: it is truncated or has a tail"
        )
    entries = {name: entry for name, _, _, entry in spans}
    return SafetensorsHeader({name: entries[name] for name in header}, metadata, file.view.size)


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    if file.view.size < 8:
        raise CorruptFile(f"has {file.view.size} bytes; a safetensors file begins with a length of 8")
    length = int(file.view[:8].view("<u8")[0])
    if length > min(MAX_HEADER_BYTES, file.view.size - 8):
        raise CorruptFile(
            f"claims a header of {length} bytes; the file has {file.view.size - 8} after the length, "
            f"and {MAX_HEADER_BYTES} are the most"
        )
    return json_object(file.view[8 : 8 + length].tobytes(), "its header", unique=True), 8 + length


def _entry(name: str, entry: Any, file: MappedFile, start: int) -> tuple[str, int, int, StoredTensor]:
    if not isinstance(entry, dict):
        raise CorruptFile("its header entry is not an object", tensor=name)
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CorruptFile(f"has shape {brief(shape)} and data_offsets {brief(offsets)}; counts are needed", tensor=name)
    dtype = DTYPES.get(kind, float6.BY_NAME.get(kind)) if isinstance(kind, str) else None
    if dtype is None:
        raise Unsupported(
            f"is of dtype {brief(kind)}, which is unknown to safetensors 0.8: leave it out with its producer's tools",
            tensor=name,
        )
    sizes, (first, last) = checked_shape(shape, tensor=name), offsets
    is_float6 = kind in float6.BY_NAME
    bits = prod(sizes) * (float6.BITS if is_float6 else bits_of(dtype))
    if bits % 8 or last - first != bits // 8:
        raise CorruptFile(
            f"has {brief(last - first)} bytes for shape {brief(shape)} of {kind}, which takes {bits / 8:g}", tensor=name
        )
    if last > file.view.size:
        raise CorruptFile(
            f"has its data at bytes {brief(first)} to {brief(last)} of {file.view.size - start}: it is truncated",
            tensor=name,
        )
    stored = file.range(start + first, last - first)
    data = float6.one_in_a_byte(stored, prod(sizes)) if is_float6 else stored
    return name, first, last, StoredTensor(sizes, dtype, data)


def _counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
