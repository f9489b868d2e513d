"""A checkpoint's safetensors files: one, or those that an index names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nibblecast.converters.errors import Unsupported, located
from nibblecast.converters.ir import Loss
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.encodings.shards import owners, shards_of
from nibblecast.formats.encodings.torchao.safetensors_keys import together
from nibblecast.formats.safetensors.container import SafetensorsHeader, open_container
from nibblecast.formats.safetensors.packed_layout import METADATA_NAME, merged

_INDEX = "*.safetensors.index.json"
_SHARD = "*.safetensors"


def open_checkpoint(path: Path) -> tuple[SafetensorsHeader, Sequence[Loss]]:
    """The tensors of a file, or of a folder's files in the order of the index (of their names, where there is none),
    and what an index leaves out. Raises CorruptFile for an index that names what is not there, or files outside the
    folder; Unsupported for several files in the layout `packed` without an index, each of which is a model."""
    if not path.is_dir():
        return open_container(MappedFile.open(path)), ()
    shards = shards_of(path, _INDEX, (_SHARD,))
    containers = {file: _opened(file) for file in shards.files}
    if shards.index is None and len(containers) == 1:
        return next(iter(containers.values())), ()
    for file, container in containers.items():
        if METADATA_NAME in container.metadata and shards.index is None:
            raise Unsupported("is one of several files here, each of which describes itself: name it", path=file)
    taken, losses = owners(shards, ((file, container.entries) for file, container in containers.items()))
    entries = {key: containers[file].entries[key] for key, file in taken.items()}
    metadata = [container.metadata for container in containers.values()]
    descriptions = [each[METADATA_NAME] for each in metadata if METADATA_NAME in each]
    described = {METADATA_NAME: merged(descriptions)} if descriptions else {}
    nbytes = sum(container.nbytes for container in containers.values())
    return SafetensorsHeader(entries, together(metadata) | described, nbytes), losses


def _opened(path: Path) -> SafetensorsHeader:
    with located(path=path):
        return open_container(MappedFile.open(path))
