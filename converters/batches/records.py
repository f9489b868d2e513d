"""The report: one line of JSON for each model, written as it is done, and what a later run can take from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from converters.output.atomic import atomic_outputs
from converters.output.creation import open_beside_others
from converters.storage import read_regular

REPORT = "nibblecast-report.jsonl"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model was not converted: the exit code that `convert` would have had, and its line of text. `transient`:
    trying again may help (a timeout, a worker that died, a system that refused)."""

    exit_code: int
    message: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """A file that was written: its path below the target folder, bytes, SHA-256 (empty where nothing was written)."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the report.

    `source` is the model's path below the folder that was converted; `sha256` that of its content, empty where it could
    not be read; `request` what was asked for, as text; `verified` whether what was written was compared with it (None:
    not asked for, or not possible); `peak_memory` in bytes, of the process while it worked (None: not known); `version`
    what the store says of the content of a source that is in one (else empty); `source_bytes` how large the source is.
    """

    source: str
    sha256: str
    request: str
    outputs: tuple[Output, ...] = ()
    losses: tuple[Mapping[str, str], ...] = ()
    verified: bool | None = None
    seconds: float = 0.0
    peak_memory: int | None = None
    attempts: int = 1
    failure: Failure | None = None
    nibblecast: str = ""
    version: str = ""
    source_bytes: int = 0
    kept: bool = field(default=False, compare=False)
    #: Of a part of a large model (`converters.batches.parts`), for whoever hands out the next.
    shards: int = field(default=0, compare=False)

    @property
    def done(self) -> bool:
        """Whether it was converted."""
        return self.failure is None

    def line(self) -> str:
        """The record as a line of JSON."""
        document = {"status": "done" if self.done else "failed", **_fields(self)}
        return json.dumps(document, ensure_ascii=True, default=_fields) + "\n"


def _fields(record: Any) -> dict[str, Any]:
    """What a dataclass holds and counts in comparing; `asdict` takes ten times as long, for it copies all of it."""
    return {field.name: getattr(record, field.name) for field in fields(record) if field.compare}


def record_of(line: str) -> Record | None:
    """The record of a line; None for one that is torn or of another making."""
    try:
        document = json.loads(line)
        del document["status"]
        failure = document.pop("failure")
        outputs = tuple(Output(**output) for output in document.pop("outputs"))
        losses = tuple(document.pop("losses"))
        return Record(**document, outputs=outputs, losses=losses, failure=failure and Failure(**failure))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_report(path: Path) -> dict[str, Record]:
    """The records of a report by source, the last one of each; whole lines only. Empty where there is no report."""
    try:
        text = read_regular(path).decode("utf-8", "replace")
    except OSError:
        return {}
    lines = text.split("\n")[:-1]  # what follows the last line break is a line that was cut off
    records = (record_of(line) for line in lines)
    return {record.source: record for record in records if record is not None}


def write_report(path: Path, records: Iterable[Record]) -> None:
    """The report anew, in one step: records in the order of their sources."""
    with atomic_outputs([path]) as staged:
        for record in sorted(records, key=lambda record: record.source):
            staged.streams[0].write(record.line().encode())


@contextmanager
def appended_report(path: Path) -> Iterator[IO[str]]:
    """The report, which is there already, to add records to. Raises OSError where it cannot be written; what could not
    be flushed to a full disk is not tried again."""
    handle = open_beside_others(path, os.O_WRONLY | os.O_APPEND)
    stream = os.fdopen(handle, "a", encoding="utf-8")
    try:
        yield stream
    except BaseException:
        with suppress(OSError):
            stream.close()
        raise
    stream.close()


def append(stream: IO[str], record: Record) -> None:
    """Adds a record to what `flush` writes."""
    stream.write(record.line())


def flush(stream: IO[Any]) -> None:
    """Has what was written on the disk when this returns."""
    stream.flush()
    os.fsync(stream.fileno())
