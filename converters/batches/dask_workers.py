"""Workers of a Dask cluster, also on other machines, if they see the same files under the same paths.

Each job runs in a child process of a Dask worker, where the limits of time and memory hold and a model that kills its
process kills no worker. A job whose worker is lost is handed by Dask to another one.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from nibblecast.converters.batches.child import Children
from nibblecast.converters.batches.job import Job
from nibblecast.converters.batches.records import Failure, Record
from nibblecast.converters.batches.workers import BUNDLED_JOBS, is_small, unexpected
from nibblecast.converters.errors import ExitCode, MissingDependency, UsageError
from nibblecast.converters.machine import processors

_CONNECT_SECONDS = 5
_WORKERS_SECONDS = 10
_SCHEME = "dask://"


class DaskWorkers:
    """The workers of the scheduler at `executor` (dask://HOST:PORT); or of a cluster on this machine ("dask"), `jobs`
    processes, for as long as this lives. Raises UsageError where nothing answers at the address, or no worker is
    there."""

    def __init__(self, executor: str, jobs: int | None, *, timeout: float | None, memory: int | None) -> None:
        try:
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise MissingDependency(
                f"--executor {executor} needs a package that is not installed ({error}): "
                "pip install 'nibblecast[distributed]'"
            ) from error
        self._executor_name = executor
        self._cluster: Any = None
        address = "tcp://" + executor.removeprefix(_SCHEME)
        if executor == "dask":
            self._cluster = LocalCluster(n_workers=jobs or processors(), threads_per_worker=1, dashboard_address=None)
            address = self._cluster.scheduler_address
        try:
            self._client: Any = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"--executor {executor}: no Dask scheduler answers there ({error})") from error
        self._batch = uuid.uuid4().hex
        self._limits = timeout, memory
        self.ahead = 2 * BUNDLED_JOBS * self._threads()
        self._tasks = self._client.get_executor(pure=False)

    def _threads(self) -> int:
        try:
            self._client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            self._client.close()
            where = self._executor_name.removeprefix(_SCHEME)
            raise UsageError(
                f"--executor {self._executor_name}: the scheduler has no workers: start some with `dask worker {where}`"
            ) from error
        return sum(self._client.nthreads().values())

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        if self._client.status != "running":
            raise UsageError(
                f"--executor {self._executor_name}: the scheduler is gone; continue with --resume (done ones are kept)"
            )
        size = max(1, min(BUNDLED_JOBS, len(jobs) * BUNDLED_JOBS // self.ahead))
        return [future for bundle in _bundles(jobs, size) for future in self._submit(bundle)]

    def _submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        futures: list[Future[Record]] = [Future() for _ in jobs]
        task = self._tasks.submit(run_in_children, jobs, self._batch, *self._limits)
        task.add_done_callback(partial(_share, futures=futures))
        return futures

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        if isinstance(error, CancelledError):
            return Failure(int(ExitCode.BUG), f"{job.shown}: was given up by the scheduler", transient=True)
        if type(error).__name__ == "KilledWorker":
            return Failure(int(ExitCode.BUG), f"{job.shown}: every worker that had it was lost", transient=True)
        return unexpected(error, job)

    def close(self) -> None:
        self._tasks.shutdown(wait=True)
        self._end()

    def stop(self) -> None:
        self._tasks.shutdown(wait=False)
        self._end()

    def _end(self) -> None:
        if self._client.status == "running":
            self._client.run(end_children, self._batch, on_error="ignore")
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _bundles(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """The jobs, in their order, a large one by itself and small ones up to `most` to a task: Dask takes longer for a
    task than such a conversion."""
    for small, group in groupby(jobs, is_small):
        run = list(group)
        size = most if small else 1
        yield from (run[first : first + size] for first in range(0, len(run), size))


def _share(task: Future[list[Record]], futures: Sequence[Future[Record]]) -> None:
    """Gives each job's future its part of what became of the task."""
    try:
        records = task.result()
    except Exception as error:  # of whatever kind Dask's are
        for future in futures:
            future.set_exception(error)
        return
    for future, record in zip(futures, records, strict=True):
        future.set_result(record)


@dataclass(slots=True)
class _Batches:
    """The children of this process (a Dask worker), by batch."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    children: dict[str, Children] = field(default_factory=dict)

    def of(self, batch: str, timeout: float | None, memory: int | None) -> Children:
        """The children of a batch. Idle children of other batches are ended: their batch may have been killed."""
        with self.lock:
            for other, children in self.children.items():
                if other != batch:
                    children.end_idle()
            return self.children.setdefault(batch, Children(timeout, memory, 1))


_BATCHES = _Batches()


def run_in_children(jobs: Sequence[Job], batch: str, timeout: float | None, memory: int | None) -> list[Record]:
    """In a Dask worker: runs jobs, one after the other, in its children for that batch."""
    return list(_BATCHES.of(batch, timeout, memory).run(jobs))


def end_children(batch: str) -> None:
    """In a Dask worker: kills its children for that batch."""
    _BATCHES.of(batch, None, None).end()
