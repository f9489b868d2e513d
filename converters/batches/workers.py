"""Where jobs run. Worker processes on this machine: each model in its own attempt, whatever becomes of the process."""

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

#: Small jobs are handed out so many at a time.
BUNDLED_JOBS = 16
_SMALL_BYTES = 1 << 20


class Workers(Protocol):
    """Where jobs run."""

    @property
    def ahead(self) -> int:
        """How many jobs are to be handed out at a time: those that are worked on, and as many again."""
        ...

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        """Has jobs run; each one's future gives the record. Raises UsageError where there are no workers any more."""
        ...

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        """What an exception of such a future means for the model."""
        ...

    def close(self) -> None:
        """Waits for what is running, and ends the workers."""
        ...

    def stop(self) -> None:
        """Ends the workers at once."""
        ...


class LocalWorkers:
    """`count` processes that pay for their imports once. A job that takes longer than `timeout` seconds or more than
    `memory` bytes (beside mapped files), or whose process dies, is a failure of its own; another process takes its
    place."""

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
        """Has a process do what waits, a share of it at a time, until there is no more."""
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
        """A large job, or small ones."""
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
    """This process itself, one job after the other: for files that no other one sees (`memory://`)."""

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
    """Whether handing it out takes as long as doing it, so that it is handed out together with others."""
    nbytes = job.nbytes
    return nbytes is not None and nbytes <= _SMALL_BYTES


def unexpected(error: BaseException, job: Job) -> Failure:
    """What is neither the model's fault nor an end of its process."""
    return Failure(int(ExitCode.BUG), f"{job.shown}: {type(error).__name__}: {error}", transient=True)
