"""A process that runs jobs, one after the other, for a process that may have no children of `multiprocessing`.

Dask's workers are such (daemons). The child is a Python of its own, and gets jobs and gives records through a pipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe

from converters.batches.jobs import Job, failed, run_job
from converters.batches.records import Record
from converters.batches.workers import begin_worker, process_ended, took_too_long

_END_SECONDS = 5


class Child:
    """A job that takes longer than `timeout` seconds or more than `memory` bytes, or at which the process dies, is a
    failure of its own, and then `is_over`: the next job needs another child."""

    def __init__(self, timeout: float | None, memory: int | None) -> None:
        self._timeout = timeout
        self._pipe, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(memory or 0)]
        command = [sys.executable, "-m", "converters.batches.child", *arguments]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603
        self.is_over = False

    def run(self, job: Job) -> Record:
        """The job's record."""
        try:
            self._pipe.send(job)
            if not self._pipe.poll(self._timeout):
                self.end()
                return failed(job, took_too_long(job, self._timeout or 0))
            record: Record = self._pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            self.end()
            return failed(job, process_ended(job, code))
        return record

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.is_over = True
        self._process.kill()
        self._process.wait(_END_SECONDS)


def _serve(handle: int, parent: int, memory: int) -> None:
    begin_worker(parent, memory or None)
    with Connection(handle) as pipe:
        while True:
            try:
                job: Job = pipe.recv()
            except EOFError:
                return
            pipe.send(run_job(job))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
