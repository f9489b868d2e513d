"""The files of a written ONNX model: the model file, and perhaps a file of external data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import OutputFile, Plan, Shard
from nibblecast.converters.output.streaming import write_tensors
from nibblecast.converters.storage import FileRange, MappedFile
from nibblecast.formats.onnx.file.pieces import ExternalData, Payload, Pieces
from nibblecast.formats.onnx.file.validation import validate
from nibblecast.formats.onnx.file.wire import Range

#: The longest protobuf message: https://protobuf.dev/programming-guides/proto-limits/
_LARGEST_MODEL = (1 << 31) - 1
#: Above this size, payloads go to a second file by default: tools that add to a model need room below 2 GiB.
LARGEST_IN_ONE_FILE = 1_500_000_000
EXTERNAL_FROM = 1024  # onnx's own default
_PIECE_BYTES = 1 << 20
_COPIED_BYTES = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile(Shard):
    """A file in pieces, some of which are copied from the source file."""

    pieces: Sequence[bytes | FileRange | Payload]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces if isinstance(piece, Payload))

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the pieces."""
        before = None
        for piece in self.pieces:
            if isinstance(piece, bytes):
                stream.write(piece)
            elif isinstance(piece, FileRange):
                for start in range(0, piece.nbytes, _COPIED_BYTES):
                    stop = min(start + _COPIED_BYTES, piece.nbytes)
                    stream.write(piece.read(start, stop).data)
                    piece.release(start, stop)
            else:
                # a weight's codes and its parameters come from one tensor, which is released after the last of them
                if before is not None and before is not piece.tensor:
                    before.release()
                before = piece.tensor
                write_tensors(stream, [piece.make(piece.tensor)], _PIECE_BYTES, wrote, release=False)
        if before is not None:
            before.release()


@dataclass(frozen=True, slots=True, eq=False)
class OnnxPlan(Plan):
    """The plan of an ONNX model; `source` is the file that its graph comes from, if any."""

    source: Path | None = None

    def validate(self, main: Path) -> Sequence[str]:
        """Notes of onnx.checker about the file."""
        return validate(main, self.source)


def onnx_plan(
    target: Path, pieces: Pieces, external: ExternalData, source: MappedFile | None = None, **others: Any
) -> OnnxPlan:
    """The plan for a model file of these pieces, and for a file of external data unless it would be empty. `others` are
    the plan's other fields. Raises Unsupported if the model file would be larger than protobuf allows."""
    if pieces.nbytes > _LARGEST_MODEL:
        raise Unsupported(
            f"an ONNX file of {pieces.nbytes} bytes is more than protobuf's {_LARGEST_MODEL}: "
            "put weights into a second file with --opt external_data=1M"
        )
    files = {target: pieces} | ({target.with_name(external.location): external.pieces} if external.placed else {})
    shards = [_file(path, content, source) for path, content in files.items()]
    path = None if source is None or source.mapping is None else source.path
    return OnnxPlan(shards, source=path, **others)


def _file(path: Path, content: Pieces, source: MappedFile | None) -> OnnxFile:
    pieces: list[bytes | FileRange | Payload] = []
    for piece in content.items:
        if not isinstance(piece, Range):
            pieces.append(piece)
        elif source is not None:
            pieces.append(source.range(piece.start, piece.nbytes))
    tensors = [piece.tensor for piece in pieces if isinstance(piece, Payload)]
    return OnnxFile(OutputFile(path, content.nbytes), tensors, pieces)
