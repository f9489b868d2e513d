"""Runs a batch: finds the models, skips what is done, hands jobs to workers, and writes the report."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from nibblecast.converters.batches.job import Job, Request, failed
from nibblecast.converters.batches.outputs import planned_jobs
from nibblecast.converters.batches.records import Record, append, appended_report, flush, read_report, write_report
from nibblecast.converters.batches.remote import is_of_this_process, is_remote
from nibblecast.converters.batches.run_job import run_job
from nibblecast.converters.batches.shares import Shares, is_large
from nibblecast.converters.batches.sources import digest_of, find_sources
from nibblecast.converters.batches.stores import LocalFolder, RemoteFolder, Store
from nibblecast.converters.batches.workers import LocalWorkers, OwnProcess, Workers
from nibblecast.converters.conversion import as_scheme
from nibblecast.converters.errors import UsageError
from nibblecast.converters.input.paths import AnyPath, input_path, output_path
from nibblecast.converters.machine import processors
from nibblecast.converters.pipeline import readable
from nibblecast.converters.stages.scheme import Scheme
from nibblecast.converters.storage import open_regular
from nibblecast.converters.version import __version__

_WAIT_SECONDS = 0.2
_GATHER_SECONDS = 0.02
_USUAL_MEMORY = 512 << 20


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A record for each model, in the order of their names, and the seconds of the whole batch. Records that are `kept`
    come from an earlier run."""

    records: tuple[Record, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of models that were not converted."""
        return tuple(record for record in self.records if not record.done)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How a batch is run: `jobs` workers (None: as many as processors), seconds and bytes of memory for each model
    (None: no limit), how often one is tried again after what may pass, whether what an earlier run has done is kept,
    and whether the first failure ends the batch. `executor`: "dask://HOST:PORT", the workers of a Dask cluster, however
    many these are; "dask", those of one on this machine; None: processes."""

    jobs: int | None = None
    timeout: float | None = None
    memory: int | None = None
    retries: int = 0
    resume: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    executor: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an executor that there is not."""
        if self.executor not in (None, "dask") and not re.fullmatch(r"dask://[^/]+:\d+", self.executor or ""):
            raise UsageError(f"--executor {self.executor}: must be dask or dask://HOST:PORT")
        if self.executor not in (None, "dask") and self.jobs is not None:
            raise UsageError("--jobs doesn't apply to a cluster (it uses all of its workers)")


#: Called with each record, the number of records so far, and the total.
OnResult = Callable[[Record, int, int], None]
#: Called several times a second with the names of the running models.
OnRunning = Callable[[Sequence[str]], None]


def batch(
    source: AnyPath,
    target: AnyPath,
    to: str | Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dequantize: DTypeLike | None = None,
    quantize: str | Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    verify: bool = False,
    fail_on_loss: bool = False,
    settings: BatchSettings | None = None,
    on_result: OnResult | None = None,
    on_running: OnRunning | None = None,
    **options: Any,
) -> BatchResult:
    """Converts every model in a folder and below it, or those that a file lists ("-": standard input), to folder
    `target`, each on its own in a process of its own: what fails is a record, and the others go on. Both may be URLs.

    `to` are names of formats; `include` and `exclude` shell patterns of the sources' paths; `settings` says how many at
    a time, with which limits, whether to resume, and so on; `on_result` is told of each record with how many there are
    of how many, `on_running` of the names of those that are worked on; the other arguments are `convert`'s. The report
    is `nibblecast-report.jsonl` in the target. Raises nibblecast.Error for what concerns the batch as a whole, before
    anything is written.
    """
    request = Request(
        dequantize=None if dequantize is None else np.dtype(dequantize).name,
        quantize=None if quantize is None else str(as_scheme(quantize)),
        only=tuple(only),
        skip=tuple(skip),
        verify=verify,
        fail_on_loss=fail_on_loss,
        options=options,
    )
    formats = [to] if isinstance(to, str) else list(to)
    if not is_remote(os.fspath(source)) and source != "-":
        _check_readable(input_path(source))
    if not is_remote(os.fspath(target)):
        output_path(target)
    try:
        return _run_batch(
            source,
            target,
            formats,
            request,
            settings or BatchSettings(),
            include=include,
            exclude=exclude,
            on_result=on_result,
            on_running=on_running,
        )
    except OSError as error:  # e.g. the report cannot be written
        raise UsageError(f"{error.filename or os.fspath(target)}: {error.strerror or error}") from error


def _check_readable(path: Path) -> None:
    """Raises CorruptFile for a folder or a list that is there and cannot be read."""
    with readable(path), suppress(FileNotFoundError):
        if path.stat() and path.is_dir():
            next(path.iterdir(), None)
        elif path.is_file():
            open_regular(path).close()


def _run_batch(
    source: AnyPath,
    target: AnyPath,
    formats: Sequence[str],
    request: Request,
    settings: BatchSettings,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    on_result: OnResult | None,
    on_running: OnRunning | None,
) -> BatchResult:
    """Converts every model of a folder or a list. A model that fails is a record; the others go on. Raises UsageError,
    before anything is written, for names that clash, a target that another run is writing, formats that there are
    not."""
    began = time.perf_counter()
    named = os.fspath(target)
    place: Store = RemoteFolder(named) if is_remote(named) else LocalFolder(Path(named))
    sources = find_sources(source, include, exclude, named)
    jobs = planned_jobs(sources, place.folder, formats, request, place.url)
    if settings.dry_run:
        records = [run_job(job, dry_run=True) for job in jobs]
        return BatchResult(tuple(records), time.perf_counter() - began)
    with place.held() as report:
        try:
            batch = _run(jobs, place, report, settings, _Batch(place, len(jobs), on_result, on_running))
        except OSError as error:  # of the report: what becomes of a model is in its record
            raise UsageError(
                f"cannot be written: {error.strerror or error}; continue with --resume", path=report
            ) from error
    ordered = tuple(batch.records[job.name] for job in jobs if job.name in batch.records)
    return BatchResult(ordered, time.perf_counter() - began)


def _run(jobs: Sequence[Job], place: Store, report: Path, settings: BatchSettings, batch: _Batch) -> _Batch:
    """Converts the models that are not done. Raises OSError if the report cannot be written, e.g. on a full disk."""
    before = read_report(report) if settings.resume else {}
    todo = list(batch.kept(jobs, before))
    workers = _workers(settings, todo) if todo else None  # before the report changes: there may be no workers
    write_report(report, batch.records.values())
    with appended_report(report) as stream:
        batch.stream = stream
        if workers is not None:
            _work(batch, todo, settings, workers)
    write_report(report, batch.records.values())
    return batch


@dataclass(slots=True)
class _Batch:
    """The records so far; each is reported when it comes."""

    place: Store
    total: int
    on_result: OnResult | None
    on_running: OnRunning | None
    records: dict[str, Record] = field(default_factory=dict)
    stream: IO[str] | None = None
    _reported: int = 0

    def kept(self, jobs: Iterable[Job], before: Mapping[str, Record]) -> Iterator[Job]:
        """The jobs that are not done; records of an earlier run are kept."""
        for job in jobs:
            record = before.get(job.name)
            if record is None or not _is_current(record, job, self.place):
                yield job
            else:
                self.add(replace(record, kept=True))

    def add(self, record: Record) -> None:
        """Adds a record to the batch and to the report."""
        self.records[record.source] = record
        if self.stream is not None:
            append(self.stream, record)
        if self.on_result is not None:
            self.on_result(record, len(self.records), self.total)

    def report(self) -> None:
        """Flushes the records that were added since the last call to disk."""
        if self.stream is not None and len(self.records) > self._reported:
            self._reported = len(self.records)
            flush(self.stream)
            self.place.reported()


def _is_current(record: Record, job: Job, place: Store) -> bool:
    """Whether a record stands for what would be done now: same request, same version, same source, outputs there."""
    if not record.done or record.request != job.text or record.nibblecast != __version__:
        return False
    if any(place.nbytes(output.path) != output.bytes for output in record.outputs):
        return False
    if job.remote is not None:
        return bool(record.version) and record.version == job.remote.version
    try:
        return digest_of(job.source) == record.sha256
    except OSError:
        return False


def _work(batch: _Batch, todo: Sequence[Job], settings: BatchSettings, workers: Workers) -> None:
    try:
        with _kept_signals() as check:
            _supervise(batch, todo, settings, workers, check)
    except BaseException:
        workers.stop()
        raise
    workers.close()


def _workers(settings: BatchSettings, todo: Sequence[Job]) -> Workers:
    """The workers for the settings. Raises UsageError for settings that exclude each other."""
    own = [url for job in todo for url in (job.shown, job.destination) if is_of_this_process(url)]
    if own and (settings.executor, settings.timeout, settings.memory) != (None, None, None):
        raise UsageError(f"{own[0]} can be read by this process only: drop --executor, --timeout and --memory")
    if own:
        return OwnProcess()
    if settings.executor is not None:
        from nibblecast.converters.batches.dask_workers import DaskWorkers

        return DaskWorkers(settings.executor, settings.jobs, timeout=settings.timeout, memory=settings.memory)
    count = settings.jobs or _as_many_as_fit(settings.memory)
    if not any(is_large(job) for job in todo):
        count = min(count, len(todo))
    return LocalWorkers(count, timeout=settings.timeout, memory=settings.memory)


def _as_many_as_fit(memory: int | None) -> int:
    """One worker per processor, but no more than memory allows. A model counts with its limit, or with the usual peak
    of large models, which is small because payloads are streamed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return processors()
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 40)
    return max(1, min(processors(), available // (memory or _USUAL_MEMORY)))


@contextmanager
def _kept_signals() -> Iterator[Callable[[], None]]:
    """Defers an interruption until the yielded function is called: an exception within the pool's own code would leave
    its locks taken. A second signal has its former effect."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield lambda: None
        return
    former = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGINT, signal.SIGTERM)}
    kept: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        kept.append(number)
        for each, handler in former.items():
            signal.signal(each, handler)

    def check() -> None:
        if signal.SIGINT in kept:
            raise KeyboardInterrupt
        if kept:
            raise SystemExit(128 + kept[0])

    for number in former:
        signal.signal(number, keep)
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _supervise(
    batch: _Batch, todo: Sequence[Job], settings: BatchSettings, workers: Workers, check: Callable[[], None]
) -> None:
    """Hands out the jobs, and collects their records. Few are handed out at a time, so that an interruption loses
    little, and a failure with `fail_fast` ends the batch soon."""
    parts = Shares()
    waiting = iter(todo)
    running: dict[Future[Record], tuple[Job, int]] = {}
    done: SimpleQueue[Future[Record]] = SimpleQueue()

    def hand_out(jobs: Sequence[Job], attempt: int = 1) -> None:
        for future, job in zip(workers.submit(jobs), jobs, strict=True):
            running[future] = (job, attempt)
            future.add_done_callback(done.put)

    while True:
        check()
        hand_out([parts.first(job) for job in islice(waiting, max(0, workers.ahead - len(running)))])
        if not running:
            return
        if batch.on_running is not None:
            batch.on_running([job.name for future, (job, _) in running.items() if future.running()])
        for future in _ready(done):
            job, attempt = running.pop(future)
            record = replace(_record(future, job, workers), attempts=attempt)
            if job.part is not None:
                hand_out(parts.after(job, record))
                continue
            if record.failure is not None:
                batch.place.tidy(job)
                if record.failure.transient and attempt <= settings.retries:
                    hand_out([job], attempt + 1)
                    continue
            batch.add(parts.whole(record))
            if settings.fail_fast and not record.done:
                workers.stop()
                return
        batch.report()


def _ready(queue: SimpleQueue[Future[Record]]) -> Iterator[Future[Record]]:
    """What comes within a moment, as many at once as do: workers have more to do, and are not to be disturbed."""
    with suppress(Empty):
        yield queue.get(timeout=_WAIT_SECONDS)
        time.sleep(_GATHER_SECONDS)
        while True:
            yield queue.get_nowait()


def _record(future: Future[Record], job: Job, workers: Workers) -> Record:
    try:
        return future.result()
    except Exception as error:  # of whatever kind the executor's are
        return failed(job, workers.failure_of(error, job))
