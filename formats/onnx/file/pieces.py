"""A file in pieces that are written in turn: bytes, ranges that are copied from the source, payloads that are fetched.

Payloads may lie in the model file or in one file of external data beside it. All sizes are known beforehand.
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
    """Bytes that are fetched when they are written: those of `make(tensor)`."""

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
        """Appends a piece; ranges that touch become one."""
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
    """An initializer that the file has not, and what its payload is made of, as in `Payload`."""

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
        """What is to be written."""
        return Payload(packed_size(prod(self.shape), bits_of(self.dtype)), self.tensor, self.make)


@dataclass(slots=True)
class ExternalData:
    """Where payloads go: into the file called `location`, if they were external before or have at least `threshold`
    bytes, but not if they have less. With no threshold everything stays where it is, and new ones of a kilobyte and
    more go there if `has_any`."""

    location: str
    threshold: int | None
    has_any: bool
    placed: list[tuple[int, Payload]] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, nbytes: int, was_external: bool | None) -> bool:
        """Whether a payload goes there; `was_external` is None for a new one."""
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
        """A TensorProto, with its payload or with the place that it has in the file."""
        out = Pieces()
        out.add(tensor_head(new.name, new.dtype, new.shape, new.properties))
        self.add(out, new.payload, self.takes(new.payload.nbytes, None))
        return out

    def add(self, out: Pieces, payload: Payload, is_external: bool) -> None:
        """Appends the fields of TensorProto that are the payload, or say where it is."""
        if is_external:
            out.add(self._place(payload))
        else:
            out.add(bytes_head(_RAW_DATA, payload.nbytes))
            out.add(payload)

    def _place(self, payload: Payload) -> bytes:
        """Gives the payload a place; returns the fields of TensorProto that say where it is."""
        offset = aligned(self.nbytes, payload.nbytes)
        self.nbytes = offset + payload.nbytes
        self.placed.append((offset, payload))
        return external_entries(self.location, offset, payload.nbytes)
