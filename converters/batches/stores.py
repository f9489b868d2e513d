"""Where a batch writes: a folder of this machine, or one in an object store. Each has the report, and knows which
outputs are there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nibblecast.converters.batches.job import Job
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.batches.remote import RemoteFile, fetch, files_below, joined, put
from nibblecast.converters.batches.scratch import scratch_folder
from nibblecast.converters.errors import Error, UsageError
from nibblecast.converters.input.urls import without_credentials
from nibblecast.converters.output.creation import lock
from nibblecast.converters.output.private_folder import remove_left_behind, temporary_folders

_LOCK = ".nibblecast-lock"
_PUT_SECONDS = 30


class Store(Protocol):
    """The target of a batch."""

    @property
    def url(self) -> str:
        """What the jobs have as their destination; empty where they write to the folder itself."""
        ...

    @property
    def folder(self) -> Path:
        """What paths of outputs begin with, where they are planned."""
        ...

    def held(self) -> AbstractContextManager[Path]:
        """For the time of a batch: gives the path of the report, on this machine. Raises UsageError where nothing can
        be written, or another batch writes."""
        ...

    def nbytes(self, path: str) -> int | None:
        """The size of an output; None if it does not exist."""
        ...

    def reported(self) -> None:
        """Must be called after a line was added to the report."""
        ...

    def tidy(self, job: Job) -> None:
        """Removes the temporary files of a job whose process was killed."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this machine, in which one batch at a time writes."""

    folder: Path
    url: str = ""

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Keeps other runs out of the folder, and clears away what one that was killed, here or before, has left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(self.folder / _LOCK)
        except BlockingIOError as error:
            raise UsageError("is being written by another batch: wait for it, or stop it", path=self.folder) from error
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror or error}", path=self.folder) from error
        with held:
            self._clear()
            try:
                yield self.folder / REPORT
            finally:
                self._clear()

    def _clear(self) -> None:
        remove_left_behind(temporary_folders(self.folder, below=True))

    def nbytes(self, path: str) -> int | None:
        try:
            return (self.folder / path).stat().st_size
        except OSError:
            return None

    def reported(self) -> None:
        """Does nothing: the report is in the folder already."""

    def tidy(self, job: Job) -> None:
        """Removes the temporary files of this model; a folder's complete shards stay for the next attempt."""
        for _, target in job.targets:
            remove_left_behind(temporary_folders(target.parent, target.name))


@dataclass(slots=True)
class RemoteFolder:
    """A folder in a store. The report is kept on this machine, and uploaded every half minute and at the end. Stores
    have no locks, so users must not let two batches write to one folder."""

    url: str
    _report: Path = field(default_factory=Path)
    _put_at: float = 0.0
    _found: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(without_credentials(self.url).partition("://")[2].strip("/"))

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Begins with the report that is there, and puts it there in the end, whatever ends the batch."""
        with scratch_folder() as scratch:
            self._report = scratch / REPORT
            self._found = files_below(self.url)
            if REPORT in self._found:
                fetch(joined(self.url, REPORT), self._report)
            try:
                yield self._report
            except BaseException:
                with suppress(Error):
                    self._put()
                raise
            self._put()

    def _put(self) -> None:
        if self._report.exists():
            put(self._report, joined(self.url, REPORT))
        self._put_at = time.monotonic()

    def nbytes(self, path: str) -> int | None:
        found = self._found.get(path)
        return None if found is None else found.nbytes

    def reported(self) -> None:
        """Puts the report from time to time; where that fails, the next time or the last one tells."""
        if time.monotonic() - self._put_at > _PUT_SECONDS:
            with suppress(Error):
                self._put()

    def tidy(self, job: Job) -> None:
        """Does nothing: temporary files are on the workers."""
