"""GGUF -> Model: each tensor under its own name. ggml's blocks are taken apart when their data are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from nibblecast.converters.errors import CorruptFile, Unsupported, located
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.formats.gguf.blocks import BLOCK_TYPES, OPAQUE_TYPES, OTHER_TYPES, PLAIN_TYPES, BlockData
from nibblecast.formats.gguf.container import GGUFHeader, TensorInfo
from nibblecast.formats.gguf.split import SPLIT_KEYS, open_files
from nibblecast.formats.gguf.stored import StoredBlocks

_SHOWN_KEYS = 3


class GGUFReader:
    """Reads .gguf files."""

    def read(self, path: Path) -> Model:
        """The tensors in the header's order, from all files of a split model. Reads headers only. Raises CorruptFile
        for damage, Unsupported for block types that ggml no longer has."""
        containers = open_files(path)
        tensors: dict[str, Tensor] = {}
        for container in containers:
            with located(path=container.file.path):
                tensors |= _tensors(container)
        Allowance(sum(container.file.view.size for container in containers)).hold_all(tensors)
        quantized_by = containers[0].metadata.get("general.quantized_by")
        producer = quantized_by.value if quantized_by and quantized_by.kind == "string" else ""
        return Model(tensors, Metadata("gguf", producer, path), losses=tuple(metadata_losses(containers[0])))


def metadata_losses(container: GGUFHeader) -> Iterator[Loss]:
    """The key-values that the representation has no place for."""
    keys = [key for key in container.metadata if not key.startswith(("general.", SPLIT_KEYS))]
    if keys:
        shown = ", ".join(keys[:_SHOWN_KEYS]) + (", …" if len(keys) > _SHOWN_KEYS else "")
        yield Loss("", "dropped", f"{len(keys)} key-values of the metadata ({shown})")


def _tensors(container: GGUFHeader) -> dict[str, Tensor]:
    extents: list[tuple[int, int, str]] = []
    tensors: dict[str, Tensor] = {}
    for info in container.tensors.values():
        tensors[info.name], nbytes = _tensor(container, info)
        extents.append((info.offset, info.offset + nbytes, info.name))
    _check_apart(extents)
    return tensors


def _tensor(container: GGUFHeader, info: TensorInfo) -> tuple[Tensor, int]:
    """The tensor, and how many bytes of the file it takes."""
    plain = PLAIN_TYPES.get(info.type_id)
    if plain is not None:
        nbytes = prod(info.shape) * plain.itemsize
        return Tensor(info.name, info.shape, plain, container.data_of(info, nbytes)), nbytes
    type_ = BLOCK_TYPES.get(info.type_id)
    if type_ is not None:
        blocks = _blocks(container, info, type_.name, type_.elements, type_.nbytes)
        tensor = type_.tensor(blocks)
        stored = StoredBlocks(tensor.data, blocks.data, info.type_id, info.shape, tensor.quantization)
        return replace(tensor, data=stored), blocks.data.nbytes
    if info.type_id in OPAQUE_TYPES:
        return _opaque(container, info)
    raise _unknown(info)


def _blocks(container: GGUFHeader, info: TensorInfo, type_name: str, elements: int, nbytes: int) -> BlockData:
    if prod(info.shape) == 0 or not info.shape or info.shape[-1] % elements:
        raise CorruptFile(
            f"has shape {info.shape}, whose last size is not whole blocks of {elements} elements ({type_name})",
            tensor=info.name,
        )
    data = container.data_of(info, prod(info.shape) // elements * nbytes)
    return BlockData(info.name, info.shape, elements, nbytes, data)


def _opaque(container: GGUFHeader, info: TensorInfo) -> tuple[Tensor, int]:
    """A tensor whose elements are whole blocks. Its dtype is named as the block type; no other format holds it."""
    name, elements, nbytes = OPAQUE_TYPES[info.type_id]
    data = _blocks(container, info, name, elements, nbytes).data
    shape = (*info.shape[:-1], info.shape[-1] // elements)
    stored = StoredBlocks(data, data, info.type_id, info.shape, None)
    return Tensor(info.name, shape, np.dtype([(name, f"V{nbytes}")]), stored), data.nbytes


def _unknown(info: TensorInfo) -> Exception:
    name = OTHER_TYPES.get(info.type_id)
    if name is None:
        return CorruptFile(f"is of type {info.type_id}, which ggml does not have", tensor=info.name)
    return Unsupported(f"is of type {name}, which no file has now: make it again from the source", tensor=info.name)


def _check_apart(extents: list[tuple[int, int, str]]) -> None:
    """Raises CorruptFile if two tensors share bytes."""
    last_stop, last_name = 0, ""
    for start, stop, name in sorted(extents):
        if start < last_stop and stop > start:
            raise CorruptFile(f"shares bytes with '{last_name}'", tensor=name)
        if stop > last_stop:
            last_stop, last_name = stop, name
