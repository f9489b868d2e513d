"""Model -> one GGUF file, laid out as by gguf's GGUFWriter: version 3, tensors in their order, padded with zeros.

Plain values are written as they are. A quantized tensor that was read from blocks, and that no stage has changed, is
written as these blocks, whatever their type. Any other becomes the type that has exactly its values
(`formats.gguf.fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import Capabilities, OutputFile, Plan, Shard, option
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.storage import Data
from nibblecast.formats.gguf.block_writer import encode
from nibblecast.formats.gguf.blocks import BLOCK_TYPES, OPAQUE_TYPES, PLAIN_TYPES
from nibblecast.formats.gguf.container import TensorInfo
from nibblecast.formats.gguf.fit import Kind, arrange, arranged
from nibblecast.formats.gguf.key_values import KeyValues
from nibblecast.formats.gguf.stored import stored_blocks

_MOST_AXES = 4
_MOST_NAME_BYTES = 63
_PIECE_BYTES = 1 << 20
_TYPE_IDS = {dtype: type_id for type_id, dtype in PLAIN_TYPES.items()}
_CODES = (ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4, np.uint8, ml_dtypes.float4_e2m1fn)
_OPAQUE = [np.dtype([(name, f"V{nbytes}")]) for name, _, nbytes in OPAQUE_TYPES.values()]


@dataclass(frozen=True, slots=True)
class GGUFOptions:
    """Options of the GGUF writer."""

    architecture: str = option(
        "", "general.architecture, for programs that take tensors by the names that they have here"
    )


class GGUFWriter:
    """Writes .gguf files."""

    options: ClassVar[type] = GGUFOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        frozenset({*_TYPE_IDS, *map(np.dtype, _CODES), *_OPAQUE}), group_index=False, compute_dtype=False
    )

    def plan(self, model: Model, target: Path, options: GGUFOptions) -> Plan:
        """Lays out the file. Reads the header of a GGUF source again for its key-values. Reads parameters that ggml's
        types may not hold. Raises Unsupported for tensors that no type of ggml holds."""
        key_values = KeyValues.of(model)
        places: dict[str, _TensorEntry] = {}
        losses: list[Loss] = []
        end = 0
        for name, tensor in model.items():
            if tensor.parameter_of not in model.tensors:
                places[name], lost = _place(tensor, end)
                losses += lost
                end += -(-places[name].nbytes // key_values.alignment) * key_values.alignment
        header = key_values.header([place.info for place in places.values()], options.architecture)
        data_offset = -(-sum(part.nbytes for part in header) // key_values.alignment) * key_values.alignment
        kept = key_values.losses
        expected = replace(
            model,
            tensors={name: place.expected for name, place in places.items()},
            losses=tuple(loss for loss in model.losses if loss not in kept),
            graph=None,
        )
        file = OutputFile(target, data_offset + end)
        entries = tuple(places.values())
        shard = GGUFFile(file, [entry.tensor for entry in entries], header, key_values.alignment, entries)
        return Plan([shard], losses, key_values.notes, expected=expected)


@dataclass(frozen=True, slots=True, eq=False)
class _TensorEntry:
    """A tensor, its entry in the header and how many bytes it takes; `expected` is what reading it will give. `blocks`
    are blocks to copy; `kind` is the type of blocks to make."""

    tensor: Tensor
    info: TensorInfo
    nbytes: int
    expected: Tensor
    blocks: Data | None = None
    kind: Kind | None = None


def _place(tensor: Tensor, offset: int) -> tuple[_TensorEntry, tuple[Loss, ...]]:
    _check_limits(tensor)
    name, stored, quantization = tensor.name, stored_blocks(tensor), tensor.quantization
    if stored is not None:
        info = TensorInfo(name, stored.shape, stored.type_id, offset)
        return _TensorEntry(tensor, info, stored.blocks.nbytes, tensor, blocks=stored.blocks), ()
    if quantization is not None:
        kind, made, losses = arrange(tensor, quantization)
        nbytes = tensor.size // kind.elements * BLOCK_TYPES[kind.type_id].nbytes
        return _TensorEntry(
            tensor, TensorInfo(name, tensor.shape, kind.type_id, offset), nbytes, made, kind=kind
        ), losses
    type_id = _TYPE_IDS.get(tensor.dtype)
    if type_id is None:
        message = f"has plain {tensor.dtype} values, for which ggml has no type: leave it out with --skip"
        raise Unsupported(message, tensor=name)
    return _TensorEntry(tensor, TensorInfo(name, tensor.shape, type_id, offset), tensor.nbytes, tensor), ()


def _check_limits(tensor: Tensor) -> None:
    """Checks the limits of llama.cpp's loader (ggml, gguf.cpp, gguf_init_from_reader), which e.g. divides by sizes."""
    name = tensor.name.encode(errors="backslashreplace")
    reason = ""
    if len(tensor.shape) > _MOST_AXES:
        reason = f"has {len(tensor.shape)} axes, and ggml takes {_MOST_AXES} at most"
    elif prod(tensor.shape) == 0:
        reason = "has no elements, which ggml does not take"
    elif len(name) > _MOST_NAME_BYTES:
        reason = f"has a name of {len(name)} bytes, and ggml takes {_MOST_NAME_BYTES} at most"
    elif b"\0" in name or name.decode() != tensor.name:
        reason = "has a name with a zero byte, or one that is not Unicode, which ggml does not take"
    if reason:
        raise Unsupported(f"{reason}: leave it out with --skip", tensor=tensor.name)


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile(Shard):
    """The header in parts, and the tensors' entries. The data of each tensor begin at a multiple of the alignment."""

    header: Sequence[Data]
    alignment: int
    entries: Sequence[_TensorEntry]

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the header and each tensor's blocks or values."""
        for part in self.header:
            _copy(part, stream)
        self._pad(stream)
        for entry in self.entries:
            if entry.blocks is not None:
                _copy(entry.blocks, stream)
            else:
                for made in _encoded(entry.tensor, entry.kind):
                    stream.write(made)
            self._pad(stream)
            wrote(entry.tensor.nbytes)
            entry.tensor.release()

    def _pad(self, stream: BinaryIO) -> None:
        """Writes zeros up to the next multiple of the alignment."""
        stream.write(bytes(-stream.tell() % self.alignment))


def _copy(data: Data, stream: BinaryIO) -> None:
    """Writes data unchanged."""
    for start in range(0, data.nbytes, _PIECE_BYTES):
        stop = min(data.nbytes, start + _PIECE_BYTES)
        stream.write(data.read(start, stop).data)
        data.release(start, stop)


def _encoded(tensor: Tensor, kind: Kind | None) -> Iterator[Any]:
    quantization = tensor.quantization
    if kind is None or quantization is None:
        yield from (part.packed().data for part in tensor.parts(_PIECE_BYTES))
        return
    for part in arranged(tensor, quantization, kind).parts(_PIECE_BYTES):
        yield encode(part, kind).data
