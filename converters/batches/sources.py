"""Which models there are: files and checkpoints' folders below a folder, or those that a list names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import file_digest, sha256
from pathlib import Path

from converters import plugins
from converters.errors import UsageError

_HEAD_BYTES = 64
_TELLING_MAGIC = 4  # bytes; shorter ones are in files of any kind
_MOST_LISTED = 16 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A model: where it is, and its path below what was given, by which its outputs are named. `is_folder`: it is all
    files of a folder together."""

    path: Path
    name: str
    is_folder: bool = False


def find_sources(
    given: str | os.PathLike[str], include: Sequence[str] = (), exclude: Sequence[str] = (), without: Path | None = None
) -> list[Source]:
    """The models in a folder and those below it, in the order of their names; or those whose paths are the lines of a
    file, or of standard input ("-"). `include` and `exclude` are shell patterns of paths below the folder; without
    `include` a file is a model where its content or its extension says so. What lies in `without` is none. Raises
    UsageError where there is nothing to read, for paths of a list that are not there, and where there is no model."""
    text = os.fspath(given)
    path = Path(text)
    if text == "-" or path.is_file():
        found = _listed(sys.stdin.read(_MOST_LISTED) if text == "-" else _text_of(path), text)
    elif path.is_dir():
        skipped = None if without is None else without.absolute()
        found = list(_below(path.absolute(), path.absolute(), skipped, bool(include)))
    else:
        raise UsageError("is neither a folder nor a list of paths", path=path)
    chosen = [
        source
        for source in found
        if (not include or _matches(source.name, include)) and not _matches(source.name, exclude)
    ]
    if not chosen:
        raise UsageError(
            "has no model in it" + (f" that --include {list(include)} takes" if include else ""), path=path
        )
    return chosen


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(Path(name).name, pattern) for pattern in patterns)


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(_MOST_LISTED).decode()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            "is no list of paths: give a folder, a text file with a path in each line, or -", path=path
        ) from error


def _listed(text: str, given: str) -> list[Source]:
    paths = [Path(line.strip()) for line in text.splitlines() if line.strip()]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise UsageError(f"is in the list {given}, but does not exist", path=missing)
    if not paths:
        raise UsageError("is an empty list", path=Path(given))
    absolute = list(dict.fromkeys(path.absolute() for path in paths))
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    return [Source(path, str(path.relative_to(common)), path.is_dir()) for path in sorted(absolute)]


def _below(folder: Path, top: Path, without: Path | None, every: bool) -> Iterator[Source]:
    if plugins.is_checkpoint(folder):
        yield Source(folder, str(folder.relative_to(top)) if folder != top else top.name, is_folder=True)
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry == without:
            continue
        if entry.is_dir():
            if not entry.is_symlink():  # a link may lead back up
                yield from _below(entry, top, without, every)
        elif every or _looks_like_a_model(entry):
            yield Source(entry, str(entry.relative_to(top)))


def _looks_like_a_model(path: Path) -> bool:
    readable = [format for format in plugins.all_formats().values() if format.reader and format.magic]
    if any(path.suffix.lower() in format.extensions for format in readable):
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return False
    having = [
        format
        for format in readable
        if any(len(magic.content) >= _TELLING_MAGIC and magic.matches(head) for magic in format.magic)
    ]
    return len(having) == 1  # ZIP files are of many kinds


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's files with their names."""
    if not path.is_dir():
        with path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest()
    combined = sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))):
        combined.update(f"{digest_of(file)} {file.relative_to(path)}\n".encode("utf-8", "surrogateescape"))
    return combined.hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
