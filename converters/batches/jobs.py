"""One model's conversion as a job: what a worker gets, does, and answers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters import api
from converters.batches.records import Failure, Output, Record
from converters.batches.sources import digest_of
from converters.dequantize import FLOAT_DTYPES
from converters.errors import Error, ExitCode, UsageError, printable
from converters.version import __version__

_PEAK = "VmHWM:"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for of every model: `convert`'s options, the readers' and writers' own in `options`."""

    dequantize: str | None = None
    quantize: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    verify: bool = False
    fail_on_loss: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def text(self, formats: Sequence[str]) -> str:
        """All of it on one line; equal for equal requests."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return (
            f"to={','.join(formats)} dequantize={self.dequantize} quantize={self.quantize} only={list(self.only)} "
            f"skip={list(self.skip)} verify={self.verify} fail_on_loss={self.fail_on_loss} options=[{options}]"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A model to convert: its path, its name in the report, and each target's format and path below `folder`."""

    source: Path
    name: str
    folder: Path
    targets: tuple[tuple[str, Path], ...]
    request: Request
    #: The content's SHA-256, where it is known already.
    digest: str = ""

    @property
    def text(self) -> str:
        """The request as the report has it."""
        return self.request.text([format for format, _ in self.targets])


def run_job(job: Job, *, dry_run: bool = False) -> Record:
    """Converts the model; what goes wrong is the record's failure. Nothing is raised but what ends the process."""
    began = time.perf_counter()
    _forget_peak()
    digest, converted, failure = job.digest, [], None
    try:
        digest = digest or digest_of(job.source)
        for format, target in job.targets:
            if not dry_run:
                target.parent.mkdir(parents=True, exist_ok=True)
            converted.append((format, _converted(job, format, target, dry_run)))
        outputs = tuple(output for format, done in converted for output in _outputs(job, format, done, dry_run))
    except Error as error:
        failure = Failure(int(error.exit_code), str(error), transient=_is_transient(error))
    except MemoryError:
        failure = Failure(int(ExitCode.UNREADABLE), f"{job.source}: takes more memory than is allowed", transient=True)
    except OSError as error:
        failure = Failure(int(ExitCode.USAGE), printable(f"{job.source}: {error.strerror or error}"), transient=True)
    except Exception as error:  # one model's bug is its own result, as it would be the exit code 1 of its own process
        text = f"{job.source}: a bug of nibblecast: {type(error).__name__}: {error}"
        failure = Failure(int(ExitCode.BUG), printable(text))
    losses = tuple(dict.fromkeys(loss for _, done in converted for loss in done.losses))
    return Record(
        source=job.name,
        sha256=digest,
        request=job.text,
        outputs=() if failure else outputs,
        losses=tuple({"tensor": loss.tensor, "kind": loss.kind, "detail": loss.detail} for loss in losses),
        verified=_verified(job, [done for _, done in converted]) if failure is None else None,
        seconds=round(time.perf_counter() - began, 3),
        peak_memory=_peak(),
        failure=failure,
        nibblecast=__version__,
    )


def _converted(job: Job, format: str, target: Path, dry_run: bool) -> api.Conversion:
    request = job.request
    return api.convert(
        job.source,
        target,
        to=format,
        dequantize=None if request.dequantize is None else FLOAT_DTYPES[request.dequantize],
        quantize=request.quantize,
        only=request.only,
        skip=request.skip,
        verify=request.verify and not dry_run,
        fail_on_loss=request.fail_on_loss,
        dry_run=dry_run,
        resume=True,
        **request.options,
    )


def _outputs(job: Job, format: str, done: api.Conversion, dry_run: bool) -> list[Output]:
    return [
        Output(
            os.path.relpath(file.path, job.folder), file.nbytes or 0, "" if dry_run else digest_of(file.path), format
        )
        for file in done.files
    ]


def _verified(job: Job, done: Sequence[api.Conversion]) -> bool | None:
    if not job.request.verify:
        return None
    compared = [comparison for each in done for comparison in each.verified.values()]
    return True if compared and all(comparison is not None for comparison in compared) else None


def _is_transient(error: Error) -> bool:
    """Whether the system refused, and not the model: a full disk, say."""
    return isinstance(error, UsageError) and isinstance(error.__cause__, OSError)


def _forget_peak() -> None:
    """Begins counting memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """The most bytes that the process has held since."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(_PEAK)), None)
