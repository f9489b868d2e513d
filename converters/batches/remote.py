"""Files in object stores, and wherever else fsspec reaches (s3://, gs://, hf://, memory://): listed, fetched, put.

An object is put in one request, or in several that count once the last is made (`put_file`); what breaks off is
aborted. A file opened for writing would not do: fsspec completes it when its block ends by an exception.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nibblecast.converters.errors import Error, MissingDependency, UsageError
from nibblecast.converters.input.urls import without_secrets

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: What stores say of an object by which it can be told from another of the same name, the best first.
_VERSIONED_BY = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """An object: its size, and what its store says of its content (text that is another for another content)."""

    nbytes: int
    version: str


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """A model that is not on this machine: a file, or all files below a folder; `nbytes` and `version` of all of it."""

    url: str
    is_folder: bool
    nbytes: int
    version: str


def is_remote(place: str) -> bool:
    """Whether this is a URL, not a path."""
    return _URL.match(place) is not None


def is_of_this_process(url: str) -> bool:
    """Whether only this process can read the URL."""
    return url.startswith("memory://")


def joined(url: str, relative: str | PurePosixPath) -> str:
    """The URL of a path below another URL."""
    return f"{url.rstrip('/')}/{relative}"


def files_below(url: str) -> dict[str, RemoteFile]:
    """The files of a folder and below it by their paths from there; that of a file is empty. Names that would lead out
    of a folder are left out. Raises UsageError when the store cannot be reached, or refuses."""
    with _reached(url) as (system, path):
        system.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = system.find(path, detail=True)
    files = {}
    for name, entry in sorted(found.items()):
        relative = "" if name == path else name.removeprefix(path.rstrip("/")).removeprefix("/")
        if not relative or _is_safe(relative):
            files[relative] = RemoteFile(int(entry.get("size") or 0), _version(entry))
    return files


def _is_safe(relative: str) -> bool:
    return "\0" not in relative and not {"", ".", ".."}.intersection(relative.split("/"))


def _version(entry: Mapping[str, Any]) -> str:
    known = next((str(entry[key]) for key in _VERSIONED_BY if entry.get(key)), "")
    return f"{entry.get('size')} {known}" if known else ""


def head_of(url: str, nbytes: int) -> bytes:
    """A file's first bytes."""
    with _reached(url) as (system, path):
        return bytes(system.cat_file(path, start=0, end=nbytes))


def is_file(url: str) -> bool:
    """Whether the file exists."""
    with _reached(url) as (system, path):
        return bool(system.isfile(path))


def fetch(url: str, path: Path) -> None:
    """Copies a file to this machine. Raises UsageError as `files_below`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reached(url) as (system, remote):
        system.get_file(remote, str(path))


def put(path: Path, url: str) -> None:
    """Copies a file of this machine to the store. Raises UsageError as `files_below`."""
    with _reached(url) as (system, remote):
        system.put_file(str(path), remote)


def remove(urls: Iterable[str]) -> None:
    """Removes files; a missing file is not an error."""
    for url in urls:
        with _reached(url) as (system, path), suppress(FileNotFoundError):
            system.rm_file(path)


@contextmanager
def _reached(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it. Any error becomes one line."""
    try:
        from fsspec.core import url_to_fs

        yield url_to_fs(url)
    except Error:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"{url} needs a package that is not installed ({error}): pip install 'nibblecast[remote]'"
        ) from error
    except Exception as error:  # each store has its own kinds
        refused = OSError(without_secrets(str(error)))  # a traceback shows it
        raise UsageError(f"{without_secrets(url)} cannot be reached: {str(error) or type(error).__name__}") from refused
