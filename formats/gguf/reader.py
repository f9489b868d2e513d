"""GGUF -> Model: each tensor under its own name, ggml's blocks taken apart when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from converters.errors import CorruptFile, Unsupported
from converters.ir import Loss, Metadata, Model, Tensor
from converters.storage import MappedFile
from formats.gguf.blocks import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES, Blocks, BlockType
from formats.gguf.container import Container, TensorInfo, open_container

_SHOWN_KEYS = 3


class GGUFReader:
    """Reads .gguf files."""

    def read(self, path: Path) -> Model:
        """The tensors in the header's order; the header only. Raises CorruptFile for damage, Unsupported for types of
        blocks that are not read."""
        container = open_container(MappedFile.open(path))
        extents: list[tuple[int, int, str]] = []
        tensors: dict[str, Tensor] = {}
        for info in container.tensors.values():
            tensors[info.name], nbytes = _tensor(container, info)
            extents.append((info.offset, info.offset + nbytes, info.name))
        _check_apart(extents)
        quantized_by = container.metadata.get("general.quantized_by")
        producer = quantized_by.value if quantized_by and quantized_by.kind == "string" else ""
        return Model(tensors, Metadata("gguf", producer, path), losses=tuple(_losses(container)))


def _tensor(container: Container, info: TensorInfo) -> tuple[Tensor, int]:
    """The tensor, and how many bytes of the file it takes."""
    plain = PLAIN_TYPES.get(info.type_id)
    if plain is not None:
        nbytes = prod(info.shape) * plain.itemsize
        return Tensor(info.name, info.shape, plain, container.data_of(info, nbytes)), nbytes
    type_ = BLOCK_TYPES.get(info.type_id)
    if type_ is None:
        raise _unknown(info)
    return _of_blocks(container, info, type_)


def _of_blocks(container: Container, info: TensorInfo, type_: BlockType) -> tuple[Tensor, int]:
    if prod(info.shape) == 0 or not info.shape or info.shape[-1] % type_.elements:
        raise CorruptFile(
            f"has shape {info.shape}, whose last size is not whole blocks of {type_.elements} elements ({type_.name})",
            tensor=info.name,
        )
    nbytes = prod(info.shape) // type_.elements * type_.nbytes
    data = container.data_of(info, nbytes)
    return type_.tensor(Blocks(info.name, info.shape, type_.elements, type_.nbytes, data)), nbytes


def _unknown(info: TensorInfo) -> Exception:
    name = OTHER_TYPES.get(info.type_id)
    if name is None:
        return CorruptFile(f"is of type {info.type_id}, which ggml does not have", tensor=info.name)
    advice = "llama-quantize --allow-requantize makes one that is (Q4_K, say)"
    return Unsupported(f"is of type {name}, which is not read: {advice}", tensor=info.name)


def _check_apart(extents: list[tuple[int, int, str]]) -> None:
    """Raises CorruptFile where two tensors share bytes."""
    last_stop, last_name = 0, ""
    for start, stop, name in sorted(extents):
        if start < last_stop and stop > start:
            raise CorruptFile(f"shares bytes with '{last_name}'", tensor=name)
        if stop > last_stop:
            last_stop, last_name = stop, name


def _losses(container: Container) -> Iterator[Loss]:
    keys = [key for key in container.metadata if not key.startswith("general.")]
    if keys:
        shown = ", ".join(keys[:_SHOWN_KEYS]) + (", …" if len(keys) > _SHOWN_KEYS else "")
        yield Loss("", "dropped", f"{len(keys)} key-values of its metadata ({shown})")
    count = container.metadata.get("split.count")
    if count is not None and isinstance(count.value, int) and count.value > 1:
        yield Loss("", "dropped", f"the tensors in the other files of the {count.value} that it was split into")
