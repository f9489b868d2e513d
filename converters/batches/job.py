"""A job: the conversion of one model as data, which a worker receives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

from nibblecast.converters.batches.records import Failure, Record
from nibblecast.converters.batches.remote import RemoteSource
from nibblecast.converters.input.urls import without_secrets
from nibblecast.converters.version import __version__

#: Parts of a job that are not shards.
BEGIN, DIGEST = 0, -1


@dataclass(frozen=True, slots=True)
class Request:
    """The options of `convert` for all models of a batch; those of readers and writers are in `options`."""

    dequantize: str | None = None
    quantize: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    verify: bool = False
    fail_on_loss: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def text(self, formats: Sequence[str]) -> str:
        """The request on one line; equal for equal requests, whatever the secrets in URLs are."""
        options = ",".join(f"{key}={without_secrets(str(value))}" for key, value in sorted(self.options.items()))
        return (
            f"to={','.join(formats)} dequantize={self.dequantize} quantize={self.quantize} only={list(self.only)} "
            f"skip={list(self.skip)} verify={self.verify} fail_on_loss={self.fail_on_loss} options=[{options}]"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A model to convert: its path, its name in the report, and each target's format and path below `folder`. `remote`
    locates a source that is not on this machine; a `destination` URL replaces `folder`."""

    source: Path
    name: str
    folder: Path
    targets: tuple[tuple[str, Path], ...]
    request: Request
    remote: RemoteSource | None = None
    destination: str = ""
    #: The only part to do, for a large model (`converters.batches.shares`).
    part: int | None = None
    #: The content's SHA-256, if it is known already.
    digest: str = ""

    @property
    def text(self) -> str:
        """The request as the report has it."""
        return self.request.text([format for format, _ in self.targets])

    @property
    def shown(self) -> str:
        """The model as messages name it."""
        return str(self.source) if self.remote is None else without_secrets(self.remote.url)

    @property
    def nbytes(self) -> int | None:
        """The size of a file; None for a folder, and where it is not known."""
        if self.remote is not None:
            return None if self.remote.is_folder else self.remote.nbytes
        try:
            status = self.source.stat()
        except OSError:
            return None
        return status.st_size if S_ISREG(status.st_mode) else None


def failed(job: Job, failure: Failure) -> Record:
    """The record of a job about which only its failure is known."""
    return Record(job.name, "", job.text, failure=failure, nibblecast=__version__)
