"""The files of one model: a single file, or the files that llama-gguf-split or gguf's GGUFWriter split it into.

Each of these is a complete GGUF file, PREFIX-00001-of-00003.gguf, with the key-values split.no (from 0), split.count
and split.tensors.count. The first file has the model's other key-values. Any of the files may be without tensors.
Sources: gguf 0.19, gguf_writer.py; llama.cpp, llama-model-loader.cpp, which checks the same.
"""

from __future__ import annotations

import re
from pathlib import Path

from nibblecast.converters.errors import CorruptFile, UsageError, brief, located
from nibblecast.converters.input.containment import refuse_outside
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.gguf.container import GGUFHeader, open_container

SPLIT_KEYS = "split."
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PATTERN = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_files(path: Path) -> tuple[GGUFHeader, ...]:
    """The files, in order, of the model that the file `path` belongs to or that the folder `path` holds. Raises
    CorruptFile if a file is missing or they do not fit together, UsageError for a folder with several models."""
    if path.is_dir():
        path = _first_of_folder(path)
    container = _opened(path)
    count = _whole_number(container, path, _COUNT)
    if count is None or count <= 1:
        return (container,)
    found = _PATTERN.fullmatch(path.name)
    number = _whole_number(container, path, _NUMBER)
    if found is None or int(found["count"]) != count or number != int(found["number"]) - 1:
        raise CorruptFile(
            f"has {_NUMBER} {number} and {_COUNT} {count}, but not the name that goes with them "
            f"(NAME-{(number or 0) + 1:05d}-of-{count:05d}.gguf): give it that name, beside the other files",
            path=path,
        )
    containers = []
    for other in range(count):
        beside = path.with_name(_name(found["prefix"], other, count))
        containers.append(container if other == number else _other(beside, other, count))
    _check_tensors(containers)
    return tuple(containers)


def _name(prefix: str, number: int, count: int) -> str:
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def _first_of_folder(folder: Path) -> Path:
    """The first file of the only model in a folder."""
    files = sorted(folder.glob("*.gguf"))
    for file in files:
        refuse_outside(file, folder)
    if not files:
        raise CorruptFile("is a folder without GGUF files", path=folder)
    models: dict[str, Path] = {}
    for file in files:
        found = _PATTERN.fullmatch(file.name)
        models.setdefault(f"{found['prefix']}-of-{found['count']}" if found else file.name, file)
    if len(models) > 1:
        first, second, *_ = (file.name for file in models.values())
        raise UsageError(f"is a folder with {len(models)} models ({first}, {second}, …): give the file", path=folder)
    return files[0]


def _opened(path: Path) -> GGUFHeader:
    with located(path=path):
        return open_container(MappedFile.open(path))


def _other(path: Path, number: int, count: int) -> GGUFHeader:
    """File `number` of the same model, from 0."""
    refuse_outside(path, path.parent)
    if not path.exists():
        raise CorruptFile(
            f"is missing: it is file {number + 1} of the {count} that the model was split into", path=path
        )
    container = _opened(path)
    has = _whole_number(container, path, _NUMBER), _whole_number(container, path, _COUNT)
    if has != (number, count):
        raise CorruptFile(
            f"has {_NUMBER} {has[0]} and {_COUNT} {has[1]}, where {number} and {count} are needed", path=path
        )
    return container


def _whole_number(container: GGUFHeader, path: Path, key: str) -> int | None:
    """The value of a key; None if the key is absent."""
    found = container.metadata.get(key)
    if found is None:
        return None
    if not isinstance(found.value, int) or found.kind in ("bool", "array") or found.value < 0:
        raise CorruptFile(f"{key} must be a whole number, got {brief(found.value)} ({found.kind})", path=path)
    return int(found.value)


def _check_tensors(containers: list[GGUFHeader]) -> None:
    """Raises CorruptFile if a tensor is in two files, or if the number of tensors differs from what a file says."""
    where: dict[str, Path] = {}
    for container in containers:
        for name in container.tensors:
            if name in where:
                raise CorruptFile(f"is in {where[name].name} as well", path=container.file.path, tensor=name)
            where[name] = container.file.path
    for container in containers:
        wanted = _whole_number(container, container.file.path, _TENSORS)
        if wanted is not None and wanted != len(where):
            raise CorruptFile(
                f"has {_TENSORS} {wanted}, and its {len(containers)} files have {len(where)} tensors: "
                "they do not belong together",
                path=container.file.path,
            )
