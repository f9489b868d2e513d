"""A checkpoint's safetensors files: one, or those that an index names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converters.errors import CorruptFile, Error, Unsupported
from converters.storage import MappedFile
from formats.encodings.configuration import read_json
from formats.encodings.torchao_safetensors import together
from formats.safetensors.container import Container, StoredTensor, open_container
from formats.safetensors.packed_layout import METADATA_NAME, merged

_INDEX = "*.safetensors.index.json"
_SHARD = "*.safetensors"


def open_checkpoint(path: Path) -> Container:
    """The tensors of a file, or of a folder's files in the order of the index (of their names, where there is none).
    Raises CorruptFile for an index that names what is not there, or files outside the folder; Unsupported for several
    files in the layout `packed`, each of which is a model."""
    if not path.is_dir():
        return open_container(MappedFile.open(path))
    indexes = sorted(path.glob(_INDEX))
    if len(indexes) > 1:
        raise CorruptFile(
            f"has {len(indexes)} indexes ({indexes[0].name}, {indexes[1].name}, …): name the files instead"
        )
    if indexes:
        return _indexed(path, indexes[0])
    files = sorted(path.glob(_SHARD))
    if not files:
        raise CorruptFile("is a folder without safetensors files")
    if len(files) == 1:
        return _opened(files[0])[1]
    return _together([_opened(file) for file in files], None)


def _indexed(folder: Path, index: Path) -> Container:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptFile("has no weight_map of names", path=index)
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CorruptFile(f"names the file '{name}', which is not in its folder", path=index)
    return _together([_opened(folder / name) for name in names], {k: folder / f for k, f in weight_map.items()})


def _opened(path: Path) -> tuple[Path, Container]:
    try:
        return path, open_container(MappedFile.open(path))
    except Error as error:
        error.path = error.path or path
        raise


def _together(files: list[tuple[Path, Container]], where: Mapping[str, Path] | None) -> Container:
    entries: dict[str, StoredTensor] = {}
    for path, container in files:
        if METADATA_NAME in container.metadata and where is None:
            raise Unsupported("is one of several files here, each of which describes itself: name it", path=path)
        for key, entry in container.entries.items():
            if key in entries:
                raise CorruptFile("is in two files", path=path, tensor=key)
            if where is None or where.get(key) == path:
                entries[key] = entry
    missing = [] if where is None else [key for key in where if key not in entries]
    if missing:
        raise CorruptFile("is in the index, but not in the file that it names", tensor=missing[0])
    metadata = together([container.metadata for _, container in files])
    descriptions = [c.metadata[METADATA_NAME] for _, c in files if METADATA_NAME in c.metadata]
    return Container(entries, metadata | ({METADATA_NAME: merged(descriptions)} if descriptions else {}))
