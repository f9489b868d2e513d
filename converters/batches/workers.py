"""Where jobs run: by default in worker processes on this machine.

Why processes, not threads. A hostile model may crash its process, hang in C code, or take all memory. Only a process
can be killed, and held to a limit of memory; then one model fails, and the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

from nibblecast.converters.batches.child import Children
from nibblecast.converters.batches.job import Job
from nibblecast.converters.batches.records import Failure, Record
from nibblecast.converters.batches.run_job import run_job
from nibblecast.converters.errors import ExitCode
from nibblecast.converters.machine import processors

#: So many small jobs are handed out together.
BUNDLED_JOBS = 16
_SMALL_BYTES = 1 << 20


class Workers(Protocol):
    """Where jobs run."""

    @property
    def ahead(self) -> int:
        """How many jobs to hand out at a time: the running ones, and as many again."""
        ...

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        """Runs jobs; each future gives the job's record. Raises UsageError if there are no workers any more."""
        ...

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        """The failure of the model that an exception of its future stands for."""
        ...

    def close(self) -> None:
        """Waits for running jobs, and ends the workers."""
        ...

    def stop(self) -> None:
        """Ends the workers at once."""
        ...


class LocalWorkers:
    """`count` processes, each of which imports only once. A job fails if it takes longer than `timeout` seconds or more
    than `memory` bytes (mapped files not counted), or if its process dies; a new process then replaces it."""

    def __init__(self, count: int, *, timeout: float | None, memory: int | None) -> None:
        self._children = Children(timeout, memory, max(1, processors() // count))
        self._threads = ThreadPoolExecutor(count)  # one waits for each process
        self._waiting: deque[tuple[Job, Future[Record]]] = deque()
        self._count = count
        self.ahead = 2 * BUNDLED_JOBS * count

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        futures: list[Future[Record]] = [Future() for _ in jobs]
        self._waiting.extend(zip(jobs, futures, strict=True))
        for _ in range(min(len(jobs), self._count)):
            self._threads.submit(self._work)
        return futures

    def _work(self) -> None:
        """Gives a process bundles of waiting jobs until no job is left."""
        while bundle := list(self._bundle()):
            self._run(bundle)

    def _run(self, bundle: Sequence[tuple[Job, Future[Record]]]) -> None:
        futures = [future for _, future in bundle]
        try:
            with closing(self._children.run([job for job, _ in bundle])) as records:
                for future in futures:
                    future.set_running_or_notify_cancel()
                    future.set_result(next(records))
        except Exception as error:  # no process can be started, or they were ended
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _bundle(self) -> Iterator[tuple[Job, Future[Record]]]:
        """Small jobs up to and including the first large one."""
        most = max(1, min(BUNDLED_JOBS, len(self._waiting) // self._count))
        for _ in range(most):
            try:
                job, future = self._waiting.popleft()
            except IndexError:
                return
            yield job, future
            if not is_small(job):
                return

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        return unexpected(error, job)

    def close(self) -> None:
        self._threads.shutdown()
        self._children.end()

    def stop(self) -> None:
        self._children.end()
        self._threads.shutdown(cancel_futures=True)


class OwnProcess:
    """This process itself, one job after the other: for files that no other process sees (`memory://`)."""

    ahead = 2

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        return [self._pool.submit(run_job, job) for job in jobs]

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        return unexpected(error, job)

    def close(self) -> None:
        self._pool.shutdown()

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def is_small(job: Job) -> bool:
    """Whether handing out the job takes as long as doing it; such jobs are bundled."""
    nbytes = job.nbytes
    return nbytes is not None and nbytes <= _SMALL_BYTES


def unexpected(error: BaseException, job: Job) -> Failure:
    """The failure for an error that is neither the model's fault nor an end of its process."""
    return Failure(int(ExitCode.BUG), f"{job.shown}: {type(error).__name__}: {error}", transient=True)
