"""safetensors -> Model: our own layout `packed` as what it describes, quantized weights by their encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.formats.encodings.bytes.float6 import BY_NAME
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from nibblecast.formats.encodings.configuration import model_config, quantization_config
from nibblecast.formats.encodings.torchao import safetensors_keys
from nibblecast.formats.safetensors.container import SafetensorsHeader
from nibblecast.formats.safetensors.packed_layout import METADATA_NAME, build
from nibblecast.formats.safetensors.shards import open_checkpoint

_FLOAT6 = "its float6 tensors are read lowest bits first, because safetensors does not define their order of bits"


class SafetensorsReader:
    """Reads one .safetensors file, or a checkpoint's folder of them with the configuration beside them."""

    def read(self, path: Path) -> Model:
        """The tensors in the header's order, as the metadata of nibblecast or torchao describe them, or as the float
        model's weights that their encoding stands for; headers and small parameters only."""
        container, left_out = open_checkpoint(path)
        model = self._model(path, container, left_out)
        Allowance(container.nbytes).hold_all(model.tensors)
        return model

    def _model(self, path: Path, container: SafetensorsHeader, left_out: Sequence[Loss]) -> Model:
        losses = list(left_out)
        if any(entry.dtype in BY_NAME.values() for entry in container.entries.values()):
            losses.append(Loss("", "reinterpreted", _FLOAT6))
        description = container.metadata.get(METADATA_NAME)
        if description is not None:
            tensors = build(description, container.entries)
            return Model(tensors, Metadata("safetensors", "nibblecast", path), losses=tuple(losses))
        plain = {name: Tensor(name, e.shape, e.dtype, e.data) for name, e in container.entries.items()}
        if safetensors_keys.describes(container.metadata):
            weights, found = safetensors_keys.grouped(plain, container.metadata)
            return Model(weights, Metadata("safetensors", "torchao", path), losses=(*losses, *found))
        folder = path if path.is_dir() else path.parent
        config = quantization_config(folder)
        checkpoint = Checkpoint(plain, config, model_config(folder))
        decoded, more = decode_checkpoint(checkpoint)
        producer = checkpoint.method or container.metadata.get("format", "")
        return Model(decoded, Metadata("safetensors", producer, path), losses=(*losses, *more))
