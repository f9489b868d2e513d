"""safetensors -> Model: our own `packed` layout as what it describes, torchao's weights by its metadata, anything else
tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from converters.ir import Metadata, Model, Tensor
from converters.storage import MappedFile
from formats.encodings import torchao_safetensors
from formats.safetensors.container import open_container
from formats.safetensors.packed_layout import METADATA_NAME, build


class SafetensorsReader:
    """Reads one .safetensors file."""

    def read(self, path: Path) -> Model:
        """The tensors in the header's order, or as the metadata of nibblecast or torchao describe them; headers
        only."""
        container = open_container(MappedFile.open(path))
        description = container.metadata.get(METADATA_NAME)
        if description is not None:
            tensors = build(description, container.entries)
            return Model(tensors, Metadata("safetensors", "nibblecast", path))
        plain = {name: Tensor(name, e.shape, e.dtype, e.data) for name, e in container.entries.items()}
        if torchao_safetensors.describes(container.metadata):
            weights, losses = torchao_safetensors.grouped(plain, container.metadata)
            return Model(weights, Metadata("safetensors", "torchao", path), losses=losses)
        return Model(plain, Metadata("safetensors", container.metadata.get("format", ""), path))
