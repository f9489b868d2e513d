"""A process that works on inputs under limits, and what is made of its end.

It is forked from one that has imported everything, works on thousands of inputs one after the other, and tells what it
finds through a pipe. Where an input ends it, the input is known from the memory that both share.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from tests.fuzz import case as cases
from tests.fuzz import exercise
from tests.fuzz.findings import Finding, described, place_in_dump
from tests.fuzz.limits import MOST_BYTES, Limits, Shared, end_with_traces, limited
from tests.fuzz.readers import Reader

#: What a process does: it is told who tells it of inputs, and has a pipe to its maker.
Work = Callable[["Runner", Connection], None]
_RUNNING_OUT = {signal.SIGPROF: "hang", signal.SIGALRM: "hang", signal.SIGKILL: "memory"}
_NEVER_TWICE = 10_000
_LOG = "log"


class Runner:
    """Runs inputs in this process, one at a time."""

    def __init__(self, reader: Reader, limits: Limits, shared: Shared, folder: Path, first: int) -> None:
        self.reader, self._limits, self._shared, self._folder = reader, limits, shared, folder
        self._number = first
        self._told: set[tuple[str, str]] = set()

    def run(self, blob: bytes, *, pick: int | None = None) -> Finding | None:
        """Works on an input. What is wrong with it, or None."""
        blob = blob[:MOST_BYTES]
        case = cases.divided(blob, self.reader.file_name)
        self._shared.begin(self._number, blob)
        found = None
        accepted = False
        try:
            with limited(self._limits, len(blob)):
                accepted = exercise.checked(self.reader.exercise, case, self.reader.main, self._folder, pick=pick)
        except BaseException as error:
            found = Finding(self.reader.name, *described(error), blob)
        self._shared.end(self._number, accepted=accepted)
        self._number += 1
        return found

    def tell(self, blob: bytes, pipe: Connection) -> None:
        """Works on an input, and sends what is wrong with it, each kind in each place once."""
        found = self.run(blob)
        if found is not None and found.key not in self._told and len(self._told) < _NEVER_TWICE:
            self._told.add(found.key)
            pipe.send(found)

    @property
    def number(self) -> int:
        """Of the next input."""
        return self._number


class Worker:
    """The process, seen from the one that has made it."""

    def __init__(self, reader: Reader, work: Work, limits: Limits, *, first: int = 0) -> None:
        self.reader, self.shared = reader, Shared()
        self._folder = tempfile.TemporaryDirectory(prefix="nibblecast-fuzz-", dir=_memory_folder())
        context = multiprocessing.get_context("fork")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=self._main, args=(work, limits, end, first), daemon=True)
        self.process.start()
        end.close()

    def end(self) -> Finding | None:
        """Waits for the process to end (ends it, if it would go on). What was wrong with the input that ended it."""
        self.process.join(0.1)
        if self.process.is_alive() and not self.shared.state().is_busy:
            self.process.kill()
        self.process.join()
        code, state, log = self.process.exitcode or 0, self.shared.state(), self.log
        self.close()
        if not state.is_busy:
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the fuzzer itself failed: {log}")
            return None
        number = -code if code < 0 else 0
        kind = _RUNNING_OUT.get(signal.Signals(number) if number else signal.SIGTERM)
        if kind is None:
            kind = f"crash {signal.Signals(number).name}" if number else "exit"
        detail = f"the process ended with {code}: {' '.join(log[-300:].split())}"
        return Finding(self.reader.name, kind, place_in_dump(log), detail, state.blob)

    def close(self) -> None:
        """Ends the process, and removes what it left."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        with suppress(OSError):
            self._folder.cleanup()

    @property
    def log(self) -> str:
        """What the process and its libraries printed."""
        with suppress(OSError):
            return (Path(self._folder.name) / _LOG).read_text("utf-8", "replace")
        return ""

    def _main(self, work: Work, limits: Limits, pipe: Connection, first: int) -> None:
        folder = Path(self._folder.name)
        with (folder / _LOG).open("w") as log:
            _set_up(log)
            work(Runner(self.reader, limits, self.shared, folder, first), pipe)


def _set_up(log: IO[str]) -> None:
    """Whatever is printed goes to the log; there are no dumps of memory."""
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout = sys.stderr = log
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever has made this process ends it
    end_with_traces(log)
    exercise.watch_python()


def _memory_folder() -> str | None:
    """Where files are only memory, if there is such a place."""
    shm = Path("/dev/shm")
    return str(shm) if os.access(shm, os.W_OK) else None
