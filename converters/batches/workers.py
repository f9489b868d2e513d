"""Worker processes on this machine: each model in its own attempt, whatever becomes of the process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from concurrent.futures import Future
from typing import Protocol

from converters.batches.jobs import Job, run_job
from converters.batches.records import Failure, Record
from converters.errors import ExitCode, MissingDependency

_PR_SET_PDEATHSIG = 1


class Workers(Protocol):
    """Where jobs run."""

    def submit(self, job: Job) -> Future[Record]:
        """Has a job run; its future gives the record."""
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
        self._timeout, self._memory = timeout, memory
        self._pool = ProcessPool(count, initializer=_begin, initargs=(os.getpid(), memory), context=context)

    def submit(self, job: Job) -> Future[Record]:
        future: Future[Record] = self._pool.schedule(run_job, args=(job,), timeout=self._timeout)
        return future

    def failure_of(self, error: BaseException, job: Job) -> Failure:
        if isinstance(error, TimeoutError):
            return Failure(
                int(ExitCode.UNREADABLE), f"{job.source}: took longer than {self._timeout:g} s", transient=True
            )
        if isinstance(error, self._expired):
            how = _ending(int(getattr(error, "exitcode", 0) or 0))
            return Failure(int(ExitCode.BUG), f"{job.source}: its process {how}", transient=True)
        return Failure(int(ExitCode.BUG), f"{job.source}: {type(error).__name__}: {error}", transient=True)

    def close(self) -> None:
        self._pool.close()  # type: ignore[no-untyped-call]
        self._pool.join()

    def stop(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    why = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{why}"


def _begin(parent: int, memory: int | None) -> None:
    """A worker ends with the process that started it, leaves an interruption to it, and is held to its memory. What a
    library prints is not part of any report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
