"""The files of an ONNX model that is written: the model file, and perhaps one of external data."""

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

#: A protobuf message is no longer than this: https://protobuf.dev/programming-guides/proto-limits/
_LARGEST_MODEL = (1 << 31) - 1
#: Above this, payloads go to a second file unasked: tools need room below protobuf's 2 GiB to add to a model.
LARGEST_IN_ONE_FILE = 1_500_000_000
EXTERNAL_FROM = 1024  # onnx's own default
_PIECE_BYTES = 1 << 20
_COPIED_BYTES = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile(Shard):
    """A file in pieces, some of them copied from the source's file."""

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
                # the codes of a weight and its parameters are made of one tensor, which is released after the last one
                if before is not None and before is not piece.tensor:
                    before.release()
                before = piece.tensor
                write_tensors(stream, [piece.make(piece.tensor)], _PIECE_BYTES, wrote, release=False)
        if before is not None:
            before.release()


@dataclass(frozen=True, slots=True, eq=False)
class OnnxPlan(Plan):
    """`source` is the file that the graph is from, if it is from one."""

    source: Path | None = None

    def validate(self, main: Path) -> Sequence[str]:
        """What onnx.checker says of the file."""
        return validate(main, self.source)


def onnx_plan(
    target: Path, pieces: Pieces, external: ExternalData, source: MappedFile | None = None, **others: Any
) -> OnnxPlan:
    """The plan for a model file of these pieces, and for one of external data, if anything is in it; `others` are the
    plan's other fields. Raises Unsupported when the model file would be larger than protobuf allows."""
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
