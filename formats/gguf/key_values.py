"""The header of a GGUF file that is written: the key-values, from a GGUF source if there is one, and the tensors.

A key-value is a key and a value of any type. The keys of the format itself begin with "general." (ggml, docs/gguf.md).
llama.cpp finds a model's hyperparameters under keys that begin with the value of general.architecture, and its
tokenizer under keys that begin with "tokenizer.".

The source's key-values are copied as bytes and not decoded. A tokenizer alone has arrays of 100,000 strings, and
decoding them into objects would cost time and memory for the same bytes.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Model
from nibblecast.converters.storage import Data, InMemory
from nibblecast.formats.gguf.blocks import PLAIN_TYPES
from nibblecast.formats.gguf.container import DEFAULT_ALIGNMENT, MAGIC, STRING, UINT32, GGUFHeader, TensorInfo
from nibblecast.formats.gguf.reader import metadata_losses
from nibblecast.formats.gguf.split import SPLIT_KEYS, open_files

_VERSION = 3
#: ggml.h, GGML_QNT_VERSION.
_QUANTIZATION_VERSION = 2
#: gguf.cpp, GGUF_MAX_ALIGNMENT.
_LARGEST_ALIGNMENT = 1 << 20
#: The general.file_type of a file whose tensors mostly have a type (llama.h, enum llama_ftype). The mixtures of the
#: K-quants are as llama-model-loader.cpp guesses them.
_FILE_TYPES = (
    {0: 0, 1: 1, 30: 32}
    | {2: 2, 3: 3, 6: 8, 7: 9, 8: 7}
    | {10: 10, 11: 12, 12: 15, 13: 17, 14: 18}
    | {16: 19, 17: 20, 18: 23, 19: 24, 20: 25, 21: 26, 22: 28, 23: 30, 29: 31, 41: 40}
    | {34: 36, 35: 37, 39: 38, 40: 39}
)
_ARCHITECTURE, _FILE_TYPE = "general.architecture", "general.file_type"
_NAME, _QUANTIZED = "general.name", "general.quantization_version"
_CONTAINER = (
    "the file has the weights only, under the names that they have here: llama.cpp needs its own names, and the "
    "model's hyperparameters and tokenizer, which its convert_hf_to_gguf.py writes"
)


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """What the header will say of the model as a whole. `source` are the GGUF files that the model was read from. The
    key-values of the first are kept byte for byte. Without a source, `title` is the model's name."""

    source: tuple[GGUFHeader, ...]
    title: str

    @classmethod
    def of(cls, model: Model) -> KeyValues:
        """The key-values of a model. Raises what opening its source raises."""
        path = model.metadata.source
        title = "" if path is None else path.stem.encode(errors="replace").decode()
        if model.metadata.format != "gguf" or path is None:
            return cls((), title)
        source = open_files(path)
        if source[0].alignment > _LARGEST_ALIGNMENT:
            raise Unsupported(
                f"has the general.alignment {source[0].alignment}, and ggml takes {_LARGEST_ALIGNMENT} at most",
                path=path,
            )
        return cls(source, title)

    @property
    def alignment(self) -> int:
        """The data of every tensor begin at a multiple of this."""
        return self.source[0].alignment if self.source else DEFAULT_ALIGNMENT

    @property
    def losses(self) -> Sequence[Loss]:
        """The losses of reading that do not happen, because the key-values are kept."""
        return tuple(metadata_losses(self.source[0])) if self.source else ()

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the file."""
        return () if self.source else (_CONTAINER,)

    def header(self, entries: Sequence[TensorInfo], architecture: str) -> Sequence[Data]:
        """The bytes before the data, in parts, without padding."""
        values = self._made(entries, architecture)
        kept = self.source[0].entries if self.source else {}
        parts: dict[str, Data] = {key: entry for key, entry in kept.items() if not key.startswith(SPLIT_KEYS)}
        parts |= {key: _in_memory(value) for key, value in values.items()}
        start = MAGIC + struct.pack("<IQQ", _VERSION, len(entries), len(parts))
        return [_in_memory(start), *parts.values(), *(_in_memory(_tensor(entry)) for entry in entries)]

    def _made(self, entries: Sequence[TensorInfo], architecture: str) -> dict[str, bytes]:
        """The key-values that the source does not have, or that would be wrong for the written file."""
        values: dict[str, bytes] = {}
        if architecture:
            values[_ARCHITECTURE] = _string_value(_ARCHITECTURE, architecture)
        if self.title and not self.source:
            values[_NAME] = _string_value(_NAME, self.title)
        if self._has_types_of(entries):
            return values
        file_type = _file_type(entries)
        if file_type is not None:
            values[_FILE_TYPE] = _number_value(_FILE_TYPE, file_type)
        if any(entry.type_id not in PLAIN_TYPES for entry in entries):
            values[_QUANTIZED] = _number_value(_QUANTIZED, _QUANTIZATION_VERSION)
        return values

    def _has_types_of(self, entries: Sequence[TensorInfo]) -> bool:
        """Whether all tensors have the types that they have in the source."""
        types = {name: info.type_id for container in self.source for name, info in container.tensors.items()}
        return bool(self.source) and all(types.get(entry.name) == entry.type_id for entry in entries)


def _file_type(entries: Sequence[TensorInfo]) -> int | None:
    """The file type for the type that most elements have; None if llama.cpp has none for it."""
    elements: Counter[int] = Counter()
    for entry in entries:
        elements[entry.type_id] += prod(entry.shape)
    return _FILE_TYPES.get(elements.most_common(1)[0][0]) if elements else None


def _string(text: str) -> bytes:
    encoded = text.encode(errors="replace")
    return struct.pack("<Q", len(encoded)) + encoded


def _string_value(key: str, text: str) -> bytes:
    return _string(key) + struct.pack("<I", STRING) + _string(text)


def _number_value(key: str, number: int) -> bytes:
    return _string(key) + struct.pack("<II", UINT32, number)


def _tensor(entry: TensorInfo) -> bytes:
    axes = len(entry.shape)
    sizes = struct.pack(f"<I{axes}Q", axes, *reversed(entry.shape))
    return _string(entry.name) + sizes + struct.pack("<IQ", entry.type_id, entry.offset)


def _in_memory(content: bytes) -> Data:
    return InMemory(np.frombuffer(content, np.uint8))
