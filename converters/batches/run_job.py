"""Runs a job in a worker, and returns its record."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from nibblecast.converters import conversion
from nibblecast.converters.arithmetic.dtypes import FLOAT_DTYPES
from nibblecast.converters.batches.job import DIGEST, Job
from nibblecast.converters.batches.records import Failure, Output, Record
from nibblecast.converters.batches.sources import bytes_of, digest_of
from nibblecast.converters.errors import ChangedFile, Error, ExitCode, UsageError
from nibblecast.converters.input.urls import without_secrets
from nibblecast.converters.interfaces import OutputFile
from nibblecast.converters.pipeline import readable
from nibblecast.converters.version import __version__

_PEAK = "VmHWM:"


def run_job(job: Job, *, dry_run: bool = False) -> Record:
    """Converts the model; errors become the record's failure. Raises only what ends the process."""
    began = time.perf_counter()
    _forget_peak()
    digest, done, failure, shards, nbytes = "", None, None, 0, 0
    outputs: tuple[Output, ...] = ()
    try:
        if job.part == DIGEST:
            digest = digest_of(job.source)
        elif job.part is not None:
            shards = conversion.write_shard(job.source, *_targets(job), number=job.part, **_options(job))
        else:
            with _at_hand(job) as local:
                with readable(local.source):
                    nbytes = bytes_of(local.source)
                    digest = job.digest or digest_of(local.source)
                done = _converted(local, dry_run=dry_run)
                written = tuple(_outputs(local, done, dry_run=dry_run))
                if job.destination and not dry_run:
                    _deliver(local, job.destination, done.files)
            outputs = written
    except Error as error:
        failure = Failure(int(error.exit_code), str(error), transient=_is_transient(error))
    except MemoryError:
        failure = Failure(int(ExitCode.UNREADABLE), f"{job.shown}: takes more memory than is allowed", transient=True)
    except OSError as error:
        failure = Failure(int(ExitCode.USAGE), f"{job.shown}: {error.strerror or error}", transient=True)
    except Exception as error:  # one model's bug is its own result, as it would be the exit code 1 of its own process
        text = f"{job.shown}: a bug of nibblecast: {type(error).__name__}: {error}"
        failure = Failure(int(ExitCode.BUG), text)
    losses, notes = ((), ()) if done is None else (done.losses, done.notes)
    return Record(
        source=job.name,
        sha256=digest,
        request=job.text,
        source_bytes=nbytes,
        outputs=outputs,
        losses=tuple(
            {"tensor": loss.tensor, "kind": loss.kind, "detail": without_secrets(loss.detail)} for loss in losses
        ),
        notes=tuple(map(without_secrets, notes)),
        verified=None if done is None else _verified(job, done),
        seconds=round(time.perf_counter() - began, 3),
        peak_memory=_peak(),
        failure=failure,
        nibblecast=__version__,
        version="" if job.remote is None else job.remote.version,
        shards=shards,
    )


def _at_hand(job: Job) -> AbstractContextManager[Job]:
    """The job with all of its files on this machine."""
    if job.remote is None and not job.destination:
        return nullcontext(job)
    from nibblecast.converters.batches.transfer import brought_here

    return brought_here(job)


def _deliver(local: Job, destination: str, files: Sequence[OutputFile]) -> None:
    from nibblecast.converters.batches.transfer import deliver

    deliver(local, destination, files)


def _converted(job: Job, *, dry_run: bool) -> conversion.Conversion:
    """All targets in one read, all or none of them."""
    if not dry_run:
        for target in _targets(job):
            target.parent.mkdir(parents=True, exist_ok=True)
    verify = job.request.verify and not dry_run
    return conversion.convert(job.source, *_targets(job), verify=verify, dry_run=dry_run, resume=True, **_options(job))


def _targets(job: Job) -> list[Path]:
    return [target for _, target in job.targets]


def _options(job: Job) -> dict[str, Any]:
    """The arguments that say what is written."""
    request = job.request
    return {
        "to": [format for format, _ in job.targets],
        "dequantize": None if request.dequantize is None else FLOAT_DTYPES[request.dequantize],
        "quantize": request.quantize,
        "only": request.only,
        "skip": request.skip,
        "fail_on_loss": request.fail_on_loss,
        **request.options,
    }


def _outputs(job: Job, done: conversion.Conversion, *, dry_run: bool) -> Iterator[Output]:
    for file in done.files:
        digest = "" if dry_run else digest_of(file.path)
        yield Output(os.path.relpath(file.path, job.folder), file.nbytes or 0, digest)


def _verified(job: Job, done: conversion.Conversion) -> bool | None:
    """True where every target was compared; None where that was not asked for, or not possible."""
    compared = list(done.verified.values())
    return True if compared and all(comparison is not None for comparison in compared) else None


def _is_transient(error: Error) -> bool:
    """Whether the system refused, and not the model (a full disk, e.g.), or something was still writing the model."""
    refused = isinstance(error, UsageError) and isinstance(error.__cause__, OSError)
    return refused or isinstance(error, ChangedFile)


def _forget_peak() -> None:
    """Resets the peak of memory, if the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """The peak of memory in bytes since the last reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(_PEAK)), None)
