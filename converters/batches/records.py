"""The report: one line of JSON for each model, written as it is done, and what a later run can take from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nibblecast.converters.errors import line
from nibblecast.converters.output.atomic import atomic_outputs
from nibblecast.converters.output.creation import open_beside_others
from nibblecast.converters.storage import read_regular

REPORT = "nibblecast-report.jsonl"

_MOST_OF_FAILURE = 3_000
_MOST = 1 << 63  # of numbers; in reports of ours none comes near it


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model was not converted: the exit code that `convert` would have had, and its line of text. `transient`:
    trying again may help (a timeout, a worker that died, a system that refused)."""

    exit_code: int
    message: str
    transient: bool = False

    def __post_init__(self) -> None:
        """Whoever says what went wrong (a library, a process that ended), the report has it on one line of limited
        length, without what is secret in URLs."""
        object.__setattr__(self, "message", line(self.message, _MOST_OF_FAILURE))


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
    not be read; `request` what was asked for, as text; `losses` what was not kept or has changed, `notes` hints and
    exact changes of form; `verified` whether what was written was compared with it (None:
    not asked for, or not possible); `peak_memory` in bytes, of the process while it worked (None: not known); `version`
    what the store says of the content of a source that is in one (else empty); `source_bytes` how large the source is.
    """

    source: str
    sha256: str
    request: str
    outputs: tuple[Output, ...] = ()
    losses: tuple[Mapping[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    verified: bool | None = None
    seconds: float = 0.0
    peak_memory: int | None = None
    attempts: int = 1
    failure: Failure | None = None
    nibblecast: str = ""
    version: str = ""
    source_bytes: int = 0
    kept: bool = field(default=False, compare=False)
    #: Of a part of a large model (`converters.batches.shares`), for whoever hands out the next.
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
    """The record of a line; None for one that is torn or of another making: values of other types, or out of range."""
    try:
        document = json.loads(line)
        status = document.pop("status")
        failure = document.pop("failure")
        outputs = tuple(_made(Output, output) for output in _list(document.pop("outputs")))
        losses = tuple(map(_texts, _list(document.pop("losses"))))
        made = None if failure is None else _made(Failure, failure)
        notes = tuple(_list(document.pop("notes", [])))
        if not all(map(_is_text, notes)):
            return None
        record: Record = _made(
            Record, document, {"outputs": outputs, "losses": losses, "failure": made, "notes": notes}
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if status == ("done" if record.done else "failed") else None


def _made(kind: Callable[..., Any], document: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Any:
    """A dataclass of what JSON has. Raises ValueError for a value that `line` does not write there, KeyError for a name
    that it does not."""
    for name, value in document.items():
        if not _SOUND[name](value):
            raise ValueError(name)
    return kind(**document, **(more or {}))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _texts(document: Any) -> Mapping[str, str]:
    if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
        raise ValueError("losses")
    return document


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_below_a_folder(value: Any) -> bool:
    """Whether it is a path that a file can have, and leads nowhere else."""
    if not isinstance(value, str) or "\0" in value:
        return False
    os.fsencode(value)
    path = PurePosixPath(value)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


#: What the values of fields must be, in all of the dataclasses.
_SOUND: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("source", "sha256", "request", "nibblecast", "version", "message"), _is_text),
    **dict.fromkeys(("source_bytes", "attempts", "bytes", "exit_code"), _is_count),
    "path": _is_below_a_folder,
    "peak_memory": lambda value: value is None or _is_count(value),
    "seconds": lambda value: type(value) in (int, float) and 0 <= value < _MOST,
    "transient": lambda value: isinstance(value, bool),
    "verified": lambda value: value is None or isinstance(value, bool),
}


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
    """Adds a record; `flush` writes it to disk."""
    stream.write(record.line())


def flush(stream: IO[Any]) -> None:
    """Flushes to disk (fsync)."""
    stream.flush()
    os.fsync(stream.fileno())
