"""Fetches models that are not on this machine, and delivers their outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from nibblecast.converters import pipeline
from nibblecast.converters.batches.job import Job
from nibblecast.converters.batches.remote import RemoteSource, fetch, files_below, is_file, joined, put, remove
from nibblecast.converters.batches.scratch import scratch_folder
from nibblecast.converters.errors import Error, MissingFile
from nibblecast.converters.input.urls import without_credentials, without_secrets
from nibblecast.converters.interfaces import OutputFile


@contextmanager
def brought_here(job: Job) -> Iterator[Job]:
    """The job with its source and its target's folder in a temporary folder of this machine during the block. Errors
    name the remote files."""
    with scratch_folder() as scratch:
        local = replace(job, remote=None, destination="")
        if job.destination:
            folder = scratch / "out"
            targets = tuple((format, folder / target.relative_to(job.folder)) for format, target in job.targets)
            local = replace(local, folder=folder, targets=targets)
        if job.remote is not None:
            local = replace(local, source=scratch / "in" / PurePosixPath(without_credentials(job.remote.url)).name)
        try:
            if job.remote is not None:
                _fetch(job.remote, local.source)
            yield local
        except Error as error:
            text = str(error).replace(str(scratch / "out"), without_secrets(job.destination.rstrip("/")))
            if job.remote is not None:
                text = text.replace(str(scratch / "in"), without_credentials(job.remote.url).rpartition("/")[0])
            error.message, error.path, error.tensor = text, None, None
            raise


def _fetch(remote: RemoteSource, path: Path) -> None:
    """Fetches a model: all of a folder, or a file with the files beside it that it refers to."""
    if remote.is_folder:
        for name in files_below(remote.url):
            if not any(part.startswith(".") for part in PurePosixPath(name).parts):
                fetch(joined(remote.url, name), path / name)
        return
    fetch(remote.url, path)
    above = re.split(r"[?#]", remote.url, maxsplit=1)[0].rpartition("/")[0]  # a signature is valid for one file only
    while (missing := _missing_beside(path)) is not None:
        url = joined(above, PurePosixPath(missing.relative_to(path.parent)))
        if not is_file(url):
            return  # the conversion says so
        fetch(url, missing)


def _missing_beside(path: Path) -> Path | None:
    """A missing file that the model at `path` refers to, as far as its headers tell."""
    with suppress(Error):
        try:
            pipeline.read(path)
        except MissingFile as error:
            return error.file if error.file.is_relative_to(path.parent) and not error.file.exists() else None
    return None


def deliver(local: Job, destination: str, files: Sequence[OutputFile]) -> None:
    """Uploads a model's outputs, the main file last. If one upload fails, all are removed, except for files that are
    the same for every model. Raises UsageError."""
    urls = {file: joined(destination, PurePosixPath(file.path.relative_to(local.folder))) for file in files}
    own = [url for file, url in urls.items() if not file.shared]
    try:
        if len(own) > 1:  # files of two conversions must never be mixed
            remove(own)
        for _, target in local.targets:
            if target.is_dir():
                _remove_former(joined(destination, PurePosixPath(target.relative_to(local.folder))), target)
        for file, url in reversed(urls.items()):
            put(file.path, url)
    except BaseException:
        with suppress(Error):
            remove(own)
        raise


def _remove_former(url: str, folder: Path) -> None:
    """Removes from a folder what an earlier conversion has written there and this one does not: shards and indices."""
    written = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    suffixes = {path.suffix for path in folder.glob("*.safetensors")}
    for name in files_below(url):
        is_shard = "/" not in name and (PurePosixPath(name).suffix in suffixes or name.endswith(".index.json"))
        if name not in written and is_shard:
            remove([joined(url, name)])
