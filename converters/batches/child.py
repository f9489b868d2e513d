"""Processes that run jobs one after the other, and the failures of jobs whose process hangs or dies.

A child is a Python process that receives jobs and returns records through a pipe. It is not a process of
`multiprocessing`, because Dask's workers are daemons there, and may not start any.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

from nibblecast.converters.batches.job import Job, failed
from nibblecast.converters.batches.records import Failure, Record
from nibblecast.converters.batches.run_job import run_job
from nibblecast.converters.errors import ExitCode
from nibblecast.converters.input.truncation import end_at_truncated_inputs
from nibblecast.converters.machine import THREADS, keep_freed_memory

_PR_SET_PDEATHSIG = 1
_END_SECONDS = 5


class Child:
    """A process for jobs. One that takes longer than `timeout` seconds or more than `memory` bytes (beside mapped
    files), or at which the process dies, is a failure of its own, and then `is_over`: other jobs need another child.
    `threads` is how many compute in it."""

    def __init__(self, timeout: float | None, memory: int | None, threads: int) -> None:
        self._timeout = timeout
        self._pipe, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(memory or 0)]
        command = [sys.executable, "-m", "nibblecast.converters.batches.child", *arguments]
        with theirs:  # in a process group of its own, for an interruption from the terminal is for the parent
            self._process = subprocess.Popen(  # noqa: S603
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env={"OPENBLAS_NUM_THREADS": "1", THREADS: str(threads), **os.environ},  # NumPy's are never used
            )
        self.is_over, self._has_begun = False, False

    def run(self, jobs: Sequence[Job]) -> Generator[Record, None, None]:
        """The records of jobs, in their order, each as it is done; the last is the one at which the process ended."""
        job = jobs[0]
        try:
            if not self._has_begun:  # imports do not count as the first job's time
                self._has_begun = self._pipe.recv()
            self._pipe.send(jobs)  # all at once: it has the next one when it has done one
            for job in jobs:
                if not self._pipe.poll(self._timeout):
                    self.end()
                    yield failed(job, _took_too_long(job, self._timeout or 0))
                    return
                yield self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            self.end()
            yield failed(job, _process_ended(job, code))

    def end(self) -> None:
        """Kills the process."""
        self.is_over = True
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a device ends when it can
            self._process.wait(_END_SECONDS)


class Children:
    """Children for several threads: each has one to itself while it runs jobs, and another takes the place of one that
    is over."""

    def __init__(self, timeout: float | None, memory: int | None, threads: int) -> None:
        self._limits = timeout, memory, threads
        self._lock = threading.Lock()
        self._idle: list[Child] = []
        self._busy: list[Child] = []
        self._is_ended = False

    def run(self, jobs: Sequence[Job]) -> Generator[Record, None, None]:
        """The records of jobs, in their order, each as it is done. Raises CancelledError after `end`."""
        done = 0
        while done < len(jobs):
            child = self._take()
            try:
                for record in child.run(jobs[done:]):
                    done += 1
                    yield record
            finally:
                if done < len(jobs) and not child.is_over:  # records come that nobody takes
                    child.end()
                self._give_back(child)

    def _take(self) -> Child:
        with self._lock:
            if self._is_ended:
                raise CancelledError
            child = self._idle.pop() if self._idle else Child(*self._limits)
            self._busy.append(child)
            return child

    def _give_back(self, child: Child) -> None:
        with self._lock:
            self._busy.remove(child)
            if not child.is_over:
                self._idle.append(child)

    def end_idle(self) -> None:
        """Ends the idle children."""
        with self._lock:
            while self._idle:
                self._idle.pop().end()

    def end(self) -> None:
        """Kills all children, and starts no more."""
        self.end_idle()
        with self._lock:
            self._is_ended = True
            for child in self._busy:
                child.end()


def _took_too_long(job: Job, seconds: float) -> Failure:
    """A job that was ended for its time."""
    return Failure(int(ExitCode.UNREADABLE), f"{job.shown}: took longer than {seconds:g} s", transient=True)


def _process_ended(job: Job, code: int) -> Failure:
    """A job whose process is no more; `code` as of `subprocess`: a signal is negative."""
    if code == ExitCode.CHANGED:
        message = f"{job.shown}: it or a file beside it was cut off while it was read: convert it again"
        return Failure(code, message, transient=True)
    if code >= 0:
        how = f"ended with exit code {code}"
    else:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        why = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
        how = f"was ended by {name}{why}"
    return Failure(int(ExitCode.BUG), f"{job.shown}: its process {how}", transient=True)


def _begin(parent: int, memory: int | None) -> None:
    """The process ends with the one that started it, is held to its memory, and prints nothing: what goes wrong is in
    records. Warnings are the parent's to give, once."""
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    keep_freed_memory()
    end_at_truncated_inputs(quiet=True)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _serve(handle: int, parent: int, memory: int) -> None:
    _begin(parent, memory or None)
    try:
        with Connection(handle) as pipe:
            pipe.send(True)
            while True:
                for job in pipe.recv():
                    pipe.send(run_job(job))
    except (EOFError, BrokenPipeError):  # the parent is gone, or needs no more
        pass
    except MemoryError:  # beside a job; a traceback would be among the parent's lines
        os._exit(ExitCode.UNREADABLE)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
