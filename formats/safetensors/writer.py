"""Model -> one safetensors file in the layout `packed` (`formats.safetensors.packed_layout`), or a folder.

Tensors of dtypes that the container knows are stored under their own names in their own shapes, so that a file of
plain floats is what `safetensors.torch.load_file` expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Capabilities, Plan
from nibblecast.converters.ir import Model
from nibblecast.formats.safetensors.file_layout import laid_out
from nibblecast.formats.safetensors.options import SafetensorsOptions
from nibblecast.formats.safetensors.packed_layout import DTYPES_BY_NAME, METADATA_NAME, PackedKeys, description_of

_EXTENSION = ".safetensors"


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

    def plan(self, model: Model, target: Path, options: SafetensorsOptions) -> Plan:
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
        metadata = {"format": "pt", METADATA_NAME: description_of(keys.descriptions)}
        return Plan([laid_out(target, keys.all_stored, metadata, None)])
