"""The numbers of a batch, from its report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibblecast.converters.batches.records import REPORT, Record, read_report
from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.storage import open_regular


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """A batch's records, those of failures first, by their exit codes, then the others by their names."""

    source: str
    records: tuple[Record, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of models that were not converted."""
        return tuple(record for record in self.records if not record.done)

    @property
    def exit_codes(self) -> Mapping[int, int]:
        """How many failed with each exit code, ascending."""
        return dict(sorted(Counter(r.failure.exit_code for r in self.records if r.failure is not None).items()))

    @property
    def bytes(self) -> int:
        """Of all outputs."""
        return sum(map(output_bytes, self.records))

    @property
    def seconds(self) -> float:
        """Of all models, one after the other."""
        return sum(record.seconds for record in self.records)

    @property
    def losses(self) -> int:
        """The number of losses: what was not kept or has changed."""
        return sum(len(record.losses) for record in self.records)

    @property
    def peak_memory(self) -> int | None:
        """The largest peak of memory of a model; None if none is known."""
        return max((r.peak_memory for r in self.records if r.peak_memory is not None), default=None)

    def document(self) -> dict[str, Any]:
        """The numbers as JSON can hold them."""
        return {
            "source": self.source,
            "models": len(self.records),
            "failed": len(self.failed),
            "exit_codes": {str(code): count for code, count in self.exit_codes.items()},
            "bytes": self.bytes,
            "seconds": self.seconds,
            "losses": self.losses,
            "peak_memory": self.peak_memory,
            "records": [json.loads(record.line()) for record in self.records],
        }


def output_bytes(record: Record) -> int:
    """The bytes of all files that were written for a model."""
    return sum(output.bytes for output in record.outputs)


def report_of(source: Path) -> Path | None:
    """The report that `source` is or contains; None if it is a model."""
    if source.is_dir():
        return source / REPORT if (source / REPORT).is_file() else None
    return source if source.suffix == Path(REPORT).suffix else None


def batch_statistics(report: Path) -> BatchStatistics:
    """The numbers of a report. Raises CorruptFile where it has no whole record, OSError where it cannot be read. Lines
    that `batch` cannot have written are passed over, as torn ones are."""
    open_regular(report).close()  # else one that cannot be read would be one without records
    records = read_report(report)
    if not records:
        raise CorruptFile("contains no records of a batch: give a report that `nibblecast batch` wrote", path=report)
    ordered = sorted(records.values(), key=lambda r: (r.done, r.failure.exit_code if r.failure else 0, r.source))
    is_usual = report.name == REPORT
    return BatchStatistics(report.absolute().parent.name if is_usual else report.name, tuple(ordered))
