"""Large checkpoints in parts: each shard is written by a job of its own, so that all workers share one model.

The first part (BEGIN) begins the folder and gives the number of shards. Each part from 1 on writes one shard, while
another part (DIGEST) hashes the source. The model's own job comes last: it writes what is missing and puts the folder
in place. So a failed part costs only time: the last job tries it again, and reports what is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from nibblecast.converters.batches.job import BEGIN, DIGEST, Job
from nibblecast.converters.batches.records import Record

_LARGE_BYTES = 1 << 30


@dataclass(slots=True)
class Shares:
    """The parts in progress, by the names of their models."""

    left: Counter[str] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)
    spent: dict[str, Record] = field(default_factory=dict)

    def first(self, job: Job) -> Job:
        """The first job of a model: a large folder on this machine is only begun, other models are done at once."""
        return replace(job, part=BEGIN) if is_large(job) else job

    def after(self, part: Job, record: Record) -> list[Job]:
        """The jobs that follow when a part is done."""
        self.spent[part.name] = self.whole(record)
        if part.part == BEGIN and record.done and record.shards > 1:
            numbers = [DIGEST, *range(1, record.shards + 1)]
            self.left[part.name] = len(numbers)
            return [replace(part, part=number) for number in numbers]
        if part.part == DIGEST:
            self.digests[part.name] = record.sha256
        self.left[part.name] -= 1
        if self.left[part.name] > 0:
            return []
        return [replace(part, part=None, digest=self.digests.get(part.name, ""))]

    def whole(self, record: Record) -> Record:
        """The model's record, including the time and memory of its parts."""
        spent = self.spent.get(record.source)
        if spent is None:
            return record
        peaks = [peak for peak in (spent.peak_memory, record.peak_memory) if peak is not None]
        return replace(record, seconds=round(record.seconds + spent.seconds, 3), peak_memory=max(peaks, default=None))


def is_large(job: Job) -> bool:
    """Whether a model is a folder of this machine that is worth several workers."""
    if job.remote is not None or job.destination or not job.source.is_dir():
        return False
    try:
        return sum(entry.stat().st_size for entry in job.source.iterdir()) >= _LARGE_BYTES
    except OSError:
        return False
