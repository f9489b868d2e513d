"""Where jobs run. Worker processes on this machine: each model in its own attempt, whatever becomes of the process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from converters.batches.jobs import Job, run_job
from converters.batches.records import Failure, Record
from converters.errors import ExitCode, MissingDependency

_PR_SET_PDEATHSIG = 1


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
    """`count` processes, started once, that pay for their imports once. A job that takes longer than `timeout` seconds
    or more than `memory` bytes (beside mapped files), or whose process dies, is a failure of its own; another process
    takes its place."""

    def __init__(self, count: int, *, timeout: float | None, memory: int | None) -> None:
        try:
            from pebble import ProcessExpired, ProcessPool
        except ImportError as error:
            raise MissingDependency(f"batch needs a package that is missing ({error}): pip install pebble") from error
        context = multiprocessing.get_context("spawn")
        self._expired: type[Exception] = ProcessExpired
        self._timeout = timeout
        self._pool = ProcessPool(count, initializer=begin_worker, initargs=(os.getpid(), memory), context=context)
        self.ahead = 2 * count

    def submit(self, jobs: Sequence[Job]) -> list[Future[Record]]:
        return [self._pool.schedule(run_job, args=(job,), timeout=self._timeout) for job in jobs]

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        if isinstance(error, TimeoutError):
            return took_too_long(job, self._timeout or 0)
        if isinstance(error, self._expired):
            return process_ended(job, int(getattr(error, "exitcode", 0) or 0))
        return unexpected(error, job)

    def close(self) -> None:
        self._pool.close()  # type: ignore[no-untyped-call]
        self._pool.join()

    def stop(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


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


def took_too_long(job: Job, seconds: float) -> Failure:
    """A job that was ended for its time."""
    return Failure(int(ExitCode.UNREADABLE), f"{job.shown}: took longer than {seconds:g} s", transient=True)


def process_ended(job: Job, code: int) -> Failure:
    """A job whose process is no more; `code` as of `subprocess`: a signal is negative."""
    if code >= 0:
        how = f"ended with exit code {code}"
    else:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        why = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
        how = f"was ended by {name}{why}"
    return Failure(int(ExitCode.BUG), f"{job.shown}: its process {how}", transient=True)


def unexpected(error: BaseException, job: Job) -> Failure:
    """What is neither the model's fault nor an end of its process."""
    return Failure(int(ExitCode.BUG), f"{job.shown}: {type(error).__name__}: {error}", transient=True)


def begin_worker(parent: int, memory: int | None) -> None:
    """A worker ends with the process that started it, leaves an interruption to it, and is held to its memory. What a
    library prints is not part of any report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
