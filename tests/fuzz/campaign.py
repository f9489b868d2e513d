"""A run over some readers for some time: workers side by side, what they find once each, made small, and kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from zlib import crc32

from tests.fuzz import case as cases
from tests.fuzz import engines
from tests.fuzz.findings import Finding
from tests.fuzz.limits import Limits
from tests.fuzz.minimize import minimized
from tests.fuzz.readers import Reader
from tests.fuzz.worker import Work, Worker

#: Told of what is found, at once.
OnFinding = Callable[[Finding], None]
_MOST_RESTARTS = 200


@dataclass
class Tally:
    """What became of a reader's inputs."""

    reader: Reader
    seeds: int = 0
    executions: int = 0
    accepted: int = 0
    seconds: float = 0.0
    restarts: int = 0
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """The numbers as JSON has them."""
        return {
            "reader": self.reader.name,
            "seeds": self.seeds,
            "executions": self.executions,
            "accepted": self.accepted,
            "per_second": round(self.executions / self.seconds, 1) if self.seconds else 0.0,
            "seconds": round(self.seconds, 1),
            "restarts": self.restarts,
            "findings": len(self.findings),
        }


@dataclass
class Campaign:
    """`seconds` are for each reader, and so is `executions`, of the plain engine; `is_guided` says which it is."""

    readers: Sequence[Reader]
    seconds: float
    seed: int
    jobs: int
    is_guided: bool
    on_finding: OnFinding
    limits: Limits = field(default_factory=Limits)
    executions: int | None = None

    def run(self) -> list[Tally]:
        """Fuzzes every reader; `jobs` of them at a time."""
        with tempfile.TemporaryDirectory(prefix="nibblecast-fuzz-") as folder:
            waiting = [_Turn(self, reader, Path(folder)) for reader in self.readers]
            tallies = [turn.tally for turn in waiting]
            running: list[_Turn] = []
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        running.append(waiting.pop(0))
                        running[-1].start()
                    ready = set(wait([turn.worker.pipe for turn in running], timeout=1.0))
                    running = [turn for turn in running if turn.goes_on(is_ready=turn.worker.pipe in ready)]
            finally:
                for turn in running:
                    turn.worker.close()
        return tallies


class _Turn:
    """A reader's share of a campaign: one worker after the other."""

    worker: Worker

    def __init__(self, campaign: Campaign, reader: Reader, folder: Path) -> None:
        self.campaign, self.tally = campaign, Tally(reader)
        self._corpus = folder / reader.name
        self._corpus.mkdir()
        self._until = self._began = 0.0
        self._blobs: list[bytes] = []
        self._first = self._ended = self._accepted = 0

    def start(self) -> None:
        """Begins; the time for making the seeds does not count."""
        self._blobs = [cases.joined(case) for case in self.tally.reader.seeds()]
        self.tally.seeds = len(self._blobs)
        self._began = time.monotonic()
        self._until = self._began + self.campaign.seconds
        self._fork()

    def goes_on(self, *, is_ready: bool) -> bool:
        """Takes what the worker says; where it has ended, counts, and begins another one if there is time."""
        is_over = time.monotonic() > self._until + self.campaign.limits.clock
        try:
            while is_ready and self.worker.pipe.poll():
                self._found(self.worker.pipe.recv())
            if not is_over:
                return True
        except (EOFError, OSError):
            pass
        state = self.worker.shared.state()
        ended = self.worker.end()
        self._ended += state.ended
        self._accepted += state.accepted
        self._first = state.number + 1
        if ended is not None:
            self.tally.restarts += 1
            self._found(ended)
        self.tally.executions, self.tally.accepted = self._ended + self.tally.restarts, self._accepted
        self.tally.seconds = time.monotonic() - self._began
        if ended is None or time.monotonic() > self._until or self.tally.restarts > _MOST_RESTARTS:
            return False
        self._fork()
        return True

    def _found(self, finding: Finding) -> None:
        if finding.key not in self.tally.findings:
            self.tally.findings[finding.key] = finding
            self.campaign.on_finding(finding)

    def _fork(self) -> None:
        self.worker = Worker(self.tally.reader, self._work(), self.campaign.limits, first=self._first)

    def _work(self) -> Work:
        left = self._until - time.monotonic()
        seed = self.campaign.seed
        if self.campaign.is_guided:
            return engines.guided(self._blobs, seed, left, self._corpus)
        return engines.plain(self._blobs, seed, left, self.campaign.executions)


def kept(tallies: Sequence[Tally], folder: Path, limits: Limits, seconds: float) -> Iterator[tuple[Finding, Path]]:
    """Makes every finding small, in so many seconds at most, and keeps it in a folder of hostile fixtures, where the
    tests find it."""
    for tally in tallies:
        for finding in tally.findings.values():
            small = minimized(tally.reader, finding, limits, seconds)
            yield small, keep(tally.reader, small, folder)


def keep(reader: Reader, finding: Finding, folder: Path) -> Path:
    """Writes a finding's input: a file, or a folder where several belong together. Where it is."""
    word = "-".join(finding.kind.lower().split())
    name = f"found-{word}-{crc32(repr(finding.key).encode()):08x}"
    case = cases.divided(finding.blob, reader.file_name)
    place = folder / reader.name
    place.mkdir(parents=True, exist_ok=True)
    if len(case) > 1 or reader.main == cases.FOLDER:
        cases.write(case, place / name)
        return place / name
    path = (place / name).with_suffix(Path(reader.file_name).suffix)
    path.write_bytes(next(iter(case.values())))
    return path
