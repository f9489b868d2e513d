"""Finds models: files and folders of checkpoints below a folder, or the entries of a list."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from hashlib import file_digest, sha256
from operator import attrgetter
from pathlib import Path

from nibblecast.converters import plugins
from nibblecast.converters.batches.remote import RemoteFile, RemoteSource, files_below, head_of, is_remote, joined
from nibblecast.converters.errors import UsageError
from nibblecast.converters.input.urls import without_credentials
from nibblecast.converters.storage import open_regular

_HEAD_BYTES = 64
_ANYTHING = (".bin",)  # what is called so may as well be another model's weights
_TELLING_MAGIC = 4  # bytes; shorter ones are in files of any kind
_MOST_LISTED = 16 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A model: where it is, and its path below what was given, by which its outputs are named. `is_folder`: it is all
    files of a folder together."""

    path: Path
    name: str
    is_folder: bool = False
    #: Where it is, if not on this machine.
    remote: RemoteSource | None = None


def find_sources(
    given: str | os.PathLike[str], include: Sequence[str] = (), exclude: Sequence[str] = (), without: str = ""
) -> list[Source]:
    """The models in a folder and those below it, in the order of their names; or those whose paths are the lines of a
    file, or of standard input ("-"). All of them may be URLs. `include` and `exclude` are shell patterns of paths below
    the folder; without `include` a file is a model where its content or its extension says so. What lies in `without`
    is none. Raises UsageError where there is nothing to read, for paths of a list that are not there, and where there
    is no model."""
    text = os.fspath(given)
    path = Path(text)
    if is_remote(text):
        below = _below_url(text, files_below(text), without, bool(include))
        found = sorted(below, key=lambda source: source.name)
    elif text == "-" or (path.exists() and not path.is_dir()):
        found = _listed(sys.stdin.read(_MOST_LISTED) if text == "-" else _text_of(path), text)
    elif path.is_dir():
        skipped = Path(without).absolute() if without and not is_remote(without) else None
        found = list(_below(path.absolute(), path.absolute(), skipped, bool(include)))
    else:
        raise UsageError("is neither a folder nor a list of paths", path=path)
    chosen = [
        source
        for source in found
        if (not include or _matches(source.name, include)) and not _matches(source.name, exclude)
    ]
    if not chosen:
        raise UsageError(f"{text}: contains no model" + (f" that --include {list(include)} matches" if include else ""))
    return chosen


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(Path(name).name, pattern) for pattern in patterns)


def _text_of(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            return stream.read(_MOST_LISTED).decode()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", path=path) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            "is not a list of paths: give a folder, a text file with one path per line, or -", path=path
        ) from error


def _listed(text: str, given: str) -> list[Source]:
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise UsageError("is an empty list", path=Path(given))
    are_remote = {is_remote(line) for line in lines}
    if are_remote == {True, False}:
        raise UsageError("mixes paths and URLs: give a list of each", path=Path(given))
    if are_remote == {True}:
        return _listed_urls(lines, given)
    paths = [Path(line) for line in lines]
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise UsageError(f"is in the list {given}, but does not exist", path=missing)
    absolute = list(dict.fromkeys(_without_steps_up(path) for path in paths))
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    return [Source(path, str(path.relative_to(common)), path.is_dir()) for path in sorted(absolute)]


def _without_steps_up(path: Path) -> Path:
    """The absolute path without `..`, which would lead an output of the same name out of the target. Links before a
    `..` are followed, as the system does; the model's own name stays as it is given."""
    if ".." not in path.parts:
        return path.absolute()
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def _listed_urls(urls: Sequence[str], given: str) -> list[Source]:
    paths = {url: "/".join(part for part in without_credentials(url).split("/") if part) for url in sorted(urls)}
    common = os.path.commonpath([os.path.dirname(path) for path in paths.values()])  # noqa: PTH120 - of a URL
    found = []
    for url, path in paths.items():
        files = files_below(url)
        if not files:
            raise UsageError(f"{url}: is in the list {given}, but does not exist")
        found.append(_remote_source(url, path.removeprefix(common).lstrip("/"), files))
    return found


def _remote_source(url: str, name: str, files: Mapping[str, RemoteFile]) -> Source:
    """A file ("" of `files`), or all files of a folder."""
    is_folder = "" not in files
    version = "" if is_folder else files[""].version
    if is_folder and all(file.version for file in files.values()):
        version = sha256("".join(f"{name} {file.version}\n" for name, file in files.items()).encode()).hexdigest()
    nbytes = sum(file.nbytes for file in files.values())
    return Source(Path(name), name, is_folder, RemoteSource(url, is_folder, nbytes, version))


def _below_url(url: str, files: Mapping[str, RemoteFile], without: str, every: bool) -> Iterator[Source]:
    """As `_below`, of the files that a store lists."""
    if not files:
        raise UsageError(f"{url}: is neither a folder nor a list of paths")
    if "" in files:
        raise UsageError(f"{url}: is a file: give its folder, with --include, or a list with this line")
    skipped = without.removeprefix(url.rstrip("/")).strip("/") if without.startswith(url.rstrip("/") + "/") else None
    names = [name for name in files if not _is_hidden(Path(name)) and (skipped is None or not _is_in(name, skipped))]
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    checkpoints = [folder for folder, inside in folders.items() if plugins.is_checkpoint(inside)]
    outer = [one for one in checkpoints if not any(one != other and _is_in(one, other) for other in checkpoints)]
    for folder in outer:
        own = {name.removeprefix(folder).removeprefix("/"): files[name] for name in names if _is_in(name, folder)}
        yield _remote_source(
            joined(url, folder).rstrip("/"), folder or without_credentials(url).rstrip("/").rpartition("/")[2], own
        )
    for name in names:
        if any(_is_in(name, folder) for folder in outer):
            continue
        if every or _looks_like_a_model(Path(name), partial(head_of, joined(url, name), _HEAD_BYTES)):
            yield _remote_source(joined(url, name), name, {"": files[name]})


def _is_in(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder}/")


def _below(folder: Path, top: Path, without: Path | None, every: bool) -> Iterator[Source]:
    try:
        entries = sorted(folder.iterdir(), key=attrgetter("name"))
    except OSError:
        return
    if plugins.is_checkpoint([entry.name for entry in entries]):
        yield Source(folder, str(folder.relative_to(top)) if folder != top else top.name, is_folder=True)
        return
    for entry in entries:
        if entry.name.startswith(".") or entry == without:
            continue
        if entry.is_dir():
            if not entry.is_symlink():  # a link may lead back up
                yield from _below(entry, top, without, every)
        elif every or _looks_like_a_model(entry, partial(_head_of, entry)):
            yield Source(entry, str(entry.relative_to(top)))


def _head_of(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            return stream.read(_HEAD_BYTES)
    except OSError:
        return b""


def _looks_like_a_model(path: Path, read_head: Callable[[], bytes]) -> bool:
    readable = [format for format in plugins.all_formats().values() if format.reader and format.magic]
    suffix = path.suffix.lower()
    if suffix not in _ANYTHING and any(suffix in format.extensions for format in readable):
        return True
    head = read_head()
    having = [
        format
        for format in readable
        if any(len(magic.content) >= _TELLING_MAGIC and magic.matches(head) for magic in format.magic)
    ]
    # ZIP files are of many kinds
    return len(having) == 1 or any(suffix in format.extensions for format in having)


def bytes_of(path: Path) -> int:
    """The size of a file, or of a folder's files together."""
    return sum(file.stat().st_size for file in _files_of(path)) if path.is_dir() else path.stat().st_size


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's files with their names."""
    if not path.is_dir():
        with open_regular(path) as stream:
            return file_digest(stream, "sha256").hexdigest()
    combined = sha256()
    for file in _files_of(path):
        combined.update(f"{digest_of(file)} {file.relative_to(path)}\n".encode("utf-8", "surrogateescape"))
    return combined.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    return sorted(files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
