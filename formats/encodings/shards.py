"""The files of a checkpoint's folder, and which tensor is taken from which: the same for all containers.

An index is what transformers writes beside shards, `<name>.index.json`: {"weight_map": {KEY: FILE}}. Its files must lie
in its own folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.input.containment import contained_file, refuse_outside
from nibblecast.converters.ir import Loss
from nibblecast.formats.encodings.configuration import read_json


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of one model in their order; `index` tells the file of each key (None: there is no index)."""

    files: tuple[Path, ...]
    index: Mapping[str, Path] | None = None


def shards_of(folder: Path, index: str, alternatives: Sequence[str]) -> Shards:
    """The files that the one index in `folder` names, which the pattern `index` matches; without an index those that
    match the first of the patterns `alternatives` that any file does. Raises CorruptFile for an index that is none,
    or that names files outside the folder, for several indexes, and where nothing matches."""
    indexes = _inside(folder, index)
    if len(indexes) > 1:
        raise CorruptFile(
            f"has {len(indexes)} indexes ({indexes[0].name}, {indexes[1].name}, …): name the files instead"
        )
    if indexes:
        return _indexed(folder, indexes[0])
    for pattern in alternatives:
        if files := _inside(folder, pattern):
            return Shards(tuple(files))
    raise CorruptFile(f"is a folder without {' or '.join(alternatives)}")


def _inside(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder` of that pattern. Raises CorruptFile for links that lead out of it."""
    found = sorted(folder.glob(pattern))
    for path in found:
        refuse_outside(path, folder)
    return found


def owners(shards: Shards, keys: Iterable[tuple[Path, Iterable[str]]]) -> tuple[dict[str, Path], list[Loss]]:
    """The file from which each key is taken, in the order of `keys`, which are those of each file; and what an index
    leaves out. Raises CorruptFile for keys in two files, and for those that are not where the index says."""
    found: dict[str, Path] = {}
    for path, of_file in keys:
        for key in of_file:
            if key in found:
                raise CorruptFile(
                    f"is in two files, '{found[key].name}' as well: each tensor must be whole in one of them",
                    path=path,
                    tensor=key,
                )
            found[key] = path
    if shards.index is None:
        return found, []
    for key, path in shards.index.items():
        if found.get(key) != path:
            raise CorruptFile("is in the index, but not in the file that it names", path=path, tensor=key)
    unlisted = [key for key in found if key not in shards.index]
    losses = [
        Loss(key, "dropped", f"the index does not list it, though '{found[key].name}' has it") for key in unlisted
    ]
    return {key: path for key, path in found.items() if key in shards.index}, losses


def _indexed(folder: Path, index: Path) -> Shards:
    weight_map = read_json(index, folder).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptFile("has no weight_map of names", path=index)
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if "/" in name:
            raise CorruptFile(f"names the file '{name}', which is not in its folder", path=index)
        contained_file(folder, name)
    return Shards(tuple(folder / name for name in names), {key: folder / name for key, name in weight_map.items()})
