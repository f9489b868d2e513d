"""Where the tensors of one safetensors file will lie: its header, and the tensors in their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import OutputFile, Shard
from nibblecast.converters.ir import Tensor
from nibblecast.converters.names import is_unicode
from nibblecast.converters.output.streaming import write_tensors
from nibblecast.formats.safetensors.container import DTYPES, MAX_HEADER_BYTES, METADATA_KEY

#: The container's name of each dtype that it stores as it is.
KINDS: Mapping[Any, str] = {dtype: kind for kind, dtype in DTYPES.items() if dtype not in SUB_BYTE}

_PIECE_BYTES = 1 << 23
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, eq=False)
class FileLayout(Shard):
    """A file: its beginning, which is the header with its length, and the tensors with their keys, in the order in
    which they lie in it."""

    beginning: bytes
    keys: Sequence[str]

    @property
    def digest(self) -> str:
        """SHA-256 of the header, which names all that is in the file."""
        return sha256(self.beginning).hexdigest()

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the header and the tensors."""
        stream.write(self.beginning)
        write_tensors(stream, self.tensors, _PIECE_BYTES, wrote)


def laid_out(path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path | None) -> FileLayout:
    """The layout of a file. Raises Unsupported when its header would pass the container's limit, and for keys that are
    not Unicode."""
    for key in stored:
        if not is_unicode(key):
            raise Unsupported(
                "has a name that is not Unicode, which only the layout packed can hold: leave it out with --skip",
                tensor=key,
            )
    # widest elements first, as the official writer does: everything is aligned without holes
    spans, end = {}, 0
    for key in sorted(stored, key=lambda key: -max(8, bits_of(stored[key].dtype))):
        spans[key] = (end, end + stored[key].nbytes)
        end += stored[key].nbytes
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    header |= {key: _entry(stored[key], *span) for key, span in spans.items()}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise Unsupported(
            f"would need a header of {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}: "
            "write it in several files with --only"
        )
    file = OutputFile(path, 8 + len(text) + end, folder=folder)
    return FileLayout(file, [stored[key] for key in spans], len(text).to_bytes(8, "little") + text, list(spans))


def _entry(tensor: Tensor, first: int, last: int) -> dict[str, Any]:
    kind = KINDS.get(tensor.dtype)
    shape = [tensor.nbytes] if kind is None else list(tensor.shape)
    return {"dtype": kind or "U8", "shape": shape, "data_offsets": [first, last]}
