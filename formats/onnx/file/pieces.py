"""A file as pieces that are written in turn: bytes, ranges copied from the source, and payloads fetched when written.

Payloads may lie in the model file or in one file of external data beside it. Protobuf puts the length of a message
before its content, so all sizes must be known before the first byte is written. That is why a file is first planned as
pieces of known size: a model larger than memory can then be written in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import bits_of
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.ir import Tensor
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.serialize import aligned, external_entries, tensor_head
from nibblecast.formats.onnx.file.wire import Range, bytes_head

_NEW_FROM = 1024
_RAW_DATA = schema.TENSOR.fields["raw_data"].number


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """The bytes of `make(tensor)`, fetched when they are written."""

    nbytes: int
    tensor: Tensor
    make: Callable[[Tensor], Tensor] = as_it_is


Piece = bytes | Range | Payload


@dataclass(slots=True)
class Pieces:
    """A message, or some fields of one, in order."""

    items: list[Piece] = field(default_factory=list)
    nbytes: int = 0

    def add(self, piece: Piece) -> None:
        """Appends a piece; adjacent ranges become one."""
        size = len(piece) if isinstance(piece, bytes) else piece.nbytes
        last = self.items[-1] if self.items else None
        if isinstance(piece, Range) and isinstance(last, Range) and last.stop == piece.start:
            self.items[-1] = Range(last.start, piece.stop)
        elif size or isinstance(piece, Payload):
            self.items.append(piece)
        self.nbytes += size

    def message(self, number: int, content: Pieces) -> None:
        """Appends a field that is a message."""
        self.add(bytes_head(number, content.nbytes))
        for piece in content.items:
            self.add(piece)


@dataclass(frozen=True, slots=True, eq=False)
class NewInitializer:
    """A new initializer, and the tensor that its payload is made of, as in `Payload`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tensor: Tensor
    make: Callable[[Tensor], Tensor] = as_it_is
    properties: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> NewInitializer:
        """The tensor as it is."""
        return cls(name, tensor.shape, tensor.dtype, tensor)

    @property
    def payload(self) -> Payload:
        """The payload to write."""
        return Payload(packed_size(prod(self.shape), bits_of(self.dtype)), self.tensor, self.make)


@dataclass(slots=True)
class ExternalData:
    """Where payloads go. Payloads of at least `threshold` bytes go into the file called `location`, smaller ones into
    the model file. Without a threshold each payload stays where it was, and new payloads of a kilobyte or more go into
    `location` if `has_any`."""

    location: str
    threshold: int | None
    has_any: bool
    placed: list[tuple[int, Payload]] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, nbytes: int, was_external: bool | None) -> bool:
        """Whether a payload goes into that file; `was_external` is None for a new payload."""
        if not nbytes:
            return False
        if self.threshold is not None:
            return nbytes >= self.threshold
        return self.has_any and nbytes >= _NEW_FROM if was_external is None else was_external

    @property
    def pieces(self) -> Pieces:
        """The whole file, zeros between payloads included."""
        out = Pieces()
        for offset, payload in self.placed:
            out.add(bytes(offset - out.nbytes))
            out.add(payload)
        return out

    def tensor(self, new: NewInitializer) -> Pieces:
        """A TensorProto, with its payload or with the payload's place in the external file."""
        out = Pieces()
        out.add(tensor_head(new.name, new.dtype, new.shape, new.properties))
        self.add(out, new.payload, self.takes(new.payload.nbytes, None))
        return out

    def add(self, out: Pieces, payload: Payload, is_external: bool) -> None:
        """Appends the TensorProto fields that hold the payload or say where it is."""
        if is_external:
            out.add(self._place(payload))
        else:
            out.add(bytes_head(_RAW_DATA, payload.nbytes))
            out.add(payload)

    def _place(self, payload: Payload) -> bytes:
        """Gives the payload a place; returns the TensorProto fields that say where it is."""
        offset = aligned(self.nbytes, payload.nbytes)
        self.nbytes = offset + payload.nbytes
        self.placed.append((offset, payload))
        return external_entries(self.location, offset, payload.nbytes)
