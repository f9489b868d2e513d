"""Model -> one safetensors file in the layout `packed` (`formats.safetensors.packed_layout`).

Tensors of dtypes that the container knows are stored under their own names in their own shapes, so that a file of
plain floats is what `safetensors.torch.load_file` expects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from converters.errors import Unsupported
from converters.interfaces import Capabilities, OutputFile, option
from converters.ir import Loss, Model, Tensor
from converters.packing import SUB_BYTE, bits_of
from converters.streaming import pieces
from formats.safetensors.container import DTYPES, MAX_HEADER_BYTES, METADATA_KEY
from formats.safetensors.packed_layout import METADATA_NAME, describe

_KINDS = {dtype: kind for kind, dtype in DTYPES.items() if dtype not in SUB_BYTE}
_PIECE_BYTES = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class SafetensorsOptions:
    """Options of the safetensors writer."""

    layout: Literal["packed"] = option("packed", "packed: codes as stored, described in the file's own metadata")


class SafetensorsWriter:
    """Writes one .safetensors file; lossless for everything that the IR holds."""

    options: ClassVar[type] = SafetensorsOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({*_KINDS, *SUB_BYTE, np.dtype(np.complex128)}), factor=True
    )

    def plan(self, model: Model, target: Path, options: SafetensorsOptions) -> _SafetensorsPlan:
        """Lays out the file. Raises Unsupported when its header would pass the container's limit."""
        keys = _Keys(model)
        description = describe(model, keys.key_of)
        # widest elements first, as the official writer does: everything is aligned without holes
        placed, end = {}, 0
        for key in sorted(keys.stored, key=lambda key: -max(8, bits_of(keys.stored[key].dtype))):
            placed[key] = (end, end + keys.stored[key].nbytes)
            end += keys.stored[key].nbytes
        header: dict[str, Any] = {METADATA_KEY: {"format": "pt", METADATA_NAME: description}}
        header |= {key: _entry(keys.stored[key], *span) for key, span in placed.items()}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        if len(text) > MAX_HEADER_BYTES:
            raise Unsupported(
                f"would need a header of {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}: "
                "write it in several files with --only"
            )
        start = 8 + len(text)
        writes: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in model}
        for key, (first, _) in placed.items():
            writes[keys.written_with[key]].append((keys.stored[key], start + first))
        return _SafetensorsPlan((OutputFile(target, start + end),), (), len(text).to_bytes(8, "little") + text, writes)


class _Keys:
    """Gives every stored tensor its key: the model's tensors their names, parameters `NAME.scale` and so on, and one
    that is a tensor of the model as well (TFLite's blockwise scales) no second copy."""

    def __init__(self, model: Model) -> None:
        self.stored: dict[str, Tensor] = {}
        self.written_with: dict[str, str] = {}
        self._model = model
        self._names = {id(tensor): name for name, tensor in model.items()}
        self._owner = ""

    def key_of(self, tensor: Tensor, wish: str) -> str:
        name = self._names.get(id(tensor))
        if name == wish:
            self._owner = name
        if name is not None and name != METADATA_KEY:
            self._put(name, tensor, name)
            return name
        key, number = wish, 0
        while key in self._model or key in self.stored or key == METADATA_KEY:
            number += 1
            key = f"{wish}:{number}"
        self._put(key, tensor, self._owner)
        return key

    def _put(self, key: str, tensor: Tensor, written_with: str) -> None:
        self.stored[key] = tensor
        self.written_with[key] = written_with


@dataclass(frozen=True, slots=True, eq=False)
class _SafetensorsPlan:
    notes: ClassVar[Sequence[str]] = ()
    report: ClassVar[Sequence[str]] = ()
    files: Sequence[OutputFile]
    losses: Sequence[Loss]
    header: bytes
    writes: dict[str, list[tuple[Tensor, int]]]

    def open(self, streams: Sequence[BinaryIO]) -> _SafetensorsSink:
        """Writes the header."""
        (stream,) = streams
        stream.write(self.header)
        return _SafetensorsSink(stream, self.writes)


@dataclass(frozen=True, slots=True, eq=False)
class _SafetensorsSink:
    stream: BinaryIO
    writes: dict[str, list[tuple[Tensor, int]]]

    def write(self, tensor: Tensor) -> None:
        """Writes the tensor's bytes and its parameters' at their places."""
        for planned, offset in self.writes[tensor.name]:
            self.stream.seek(offset)
            for piece in pieces(tensor if planned.name == tensor.name else planned, _PIECE_BYTES):
                self.stream.write(piece.data)

    def close(self) -> None:
        """Everything is written already."""


def _entry(tensor: Tensor, first: int, last: int) -> dict[str, Any]:
    kind = _KINDS.get(tensor.dtype)
    shape = [tensor.nbytes] if kind is None else list(tensor.shape)
    return {"dtype": kind or "U8", "shape": shape, "data_offsets": [first, last]}
