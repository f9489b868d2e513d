"""The header of a GGUF file that is written: the key-values of the source, where that is one, and the tensors' entries.

A key-value is a key and a value of any type; those of the format itself begin with "general." (ggml, docs/gguf.md).
llama.cpp finds a model's hyperparameters and its tokenizer there, under names that begin with general.architecture.
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
#: What general.file_type says of a file that has mostly tensors of a type (llama.h, enum llama_ftype), the K-quants'
#: mixtures as llama-model-loader.cpp guesses them.
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
    """What the header will say of the model as a whole. `source` are the GGUF files that it was read from, the first of
    which has the key-values to be kept, byte for byte; `title` is a name for it where there are none."""

    source: tuple[GGUFHeader, ...]
    title: str

    @classmethod
    def of(cls, model: Model) -> KeyValues:
        """Those of a model. Raises what opening its source raises."""
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
        """What every tensor's data begin at a multiple of."""
        return self.source[0].alignment if self.source else DEFAULT_ALIGNMENT

    @property
    def losses(self) -> Sequence[Loss]:
        """The losses of reading that are none, because the key-values are kept."""
        return tuple(metadata_losses(self.source[0])) if self.source else ()

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know of the file."""
        return () if self.source else (_CONTAINER,)

    def header(self, entries: Sequence[TensorInfo], architecture: str) -> Sequence[Data]:
        """The bytes before the data, in parts, without what fills them up."""
        values = self._made(entries, architecture)
        kept = self.source[0].entries if self.source else {}
        parts: dict[str, Data] = {key: entry for key, entry in kept.items() if not key.startswith(SPLIT_KEYS)}
        parts |= {key: _in_memory(value) for key, value in values.items()}
        start = MAGIC + struct.pack("<IQQ", _VERSION, len(entries), len(parts))
        return [_in_memory(start), *parts.values(), *(_in_memory(_tensor(entry)) for entry in entries)]

    def _made(self, entries: Sequence[TensorInfo], architecture: str) -> dict[str, bytes]:
        """The key-values that the source does not have, or that are not true of what is written."""
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
    """That of the type which most elements have; None where there is none for it."""
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
