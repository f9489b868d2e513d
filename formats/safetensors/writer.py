"""Model -> one safetensors file in the layout `packed` (`formats.safetensors.packed_layout`), or a folder.

Tensors of dtypes that the container knows are stored under their own names in their own shapes, so that a file of
plain floats is what `safetensors.torch.load_file` expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Capabilities, FolderPlan, OutputFile, Plan, Size, option
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.formats.safetensors.file_layout import FileLayout, laid_out, write_at
from nibblecast.formats.safetensors.packed_keys import PackedKeys
from nibblecast.formats.safetensors.packed_layout import DTYPES_BY_NAME, METADATA_NAME, description_of

_EXTENSION = ".safetensors"


@dataclass(frozen=True, slots=True)
class SafetensorsOptions:
    """Options of the safetensors writer."""

    layout: Literal["packed", "awq", "compressed-tensors", "gptq", "mlx", "torchao"] = option(
        "packed", "packed: codes as stored, described in the file's own metadata; or as that library has them"
    )
    shard_size: Size = option(Size(5 << 30), "of a folder: the most bytes of one of its files")
    others: Literal["refuse", "dequantize"] = option(
        "refuse", "weights that another layout than packed cannot hold: an error, or plain floats and a loss"
    )
    scale_dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        None, "of another layout than packed: the dtype of scales, in which its library computes"
    )


class SafetensorsWriter:
    """Writes one .safetensors file, lossless for everything that the IR holds; or a folder of them, by size, with what
    a library needs beside: any target that neither ends in .safetensors nor is a file."""

    options: ClassVar[type] = SafetensorsOptions
    capabilities: ClassVar[Capabilities] = Capabilities(frozenset(DTYPES_BY_NAME.values()), factor=True)

    def target(self, path: Path, options: Mapping[str, Any], *, is_folder: bool) -> Path:
        """A folder for folders, and in layouts that need one."""
        if is_folder:
            return path
        return path.with_suffix("" if options.get("layout", "packed") != "packed" else _EXTENSION)

    def plan(self, model: Model, target: Path, options: SafetensorsOptions) -> Plan | FolderPlan:
        """Lays out the files. Raises Unsupported when a header would pass the container's limit, or for what the layout
        cannot hold; UsageError for a file in a layout that needs a configuration."""
        if target.suffix.lower() != _EXTENSION and not target.is_file():
            from nibblecast.formats.safetensors.folder import planned_folder  # a single file needs none of it

            return planned_folder(model, target, options)
        if options.layout != "packed":
            raise UsageError(
                f"the layout {options.layout} needs a configuration beside the tensors: name a folder, "
                f"not a file ({target.with_suffix('')}, say)"
            )
        keys = PackedKeys(model)
        stored = {key: tensor for of_one in keys.stored.values() for key, tensor in of_one.items()}
        metadata = {"format": "pt", METADATA_NAME: description_of(keys.descriptions)}
        layout = laid_out(target, stored, metadata, None)
        names = {name: list(of_one) for name, of_one in keys.stored.items()}
        return _SafetensorsPlan((layout.file,), (), layout, names)


@dataclass(frozen=True, slots=True, eq=False)
class _SafetensorsPlan:
    """`keys` are those of what is stored for each of the model's tensors."""

    notes: ClassVar[Sequence[str]] = ()
    report: ClassVar[Sequence[str]] = ()
    files: Sequence[OutputFile]
    losses: Sequence[Loss]
    layout: FileLayout
    keys: Mapping[str, Sequence[str]]

    def open(self, streams: Sequence[BinaryIO]) -> _SafetensorsSink:
        """Writes the header."""
        (stream,) = streams
        stream.write(self.layout.beginning)
        return _SafetensorsSink(stream, self)


@dataclass(frozen=True, slots=True, eq=False)
class _SafetensorsSink:
    stream: BinaryIO
    plan: _SafetensorsPlan

    def write(self, tensor: Tensor) -> None:
        """Writes the tensor's bytes and its parameters' at their places."""
        for key in self.plan.keys[tensor.name]:
            planned, offset = self.plan.layout.placed[key]
            written = tensor if planned.name == tensor.name else planned
            write_at(self.stream, [(written, offset)], lambda _: None)

    def close(self) -> None:
        """Everything is written already."""
