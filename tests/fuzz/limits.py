"""Limits of one input, in the process that works on it: time of the processor, time of the clock, and memory.

A process that takes too long is ended by a signal that nothing catches, so that loops of C code end as well; Python
writes before where it was. Too much memory is an error of the system: a MemoryError, or the end of the process. The
input lies in memory that is shared with whoever started the process: it is known when the process is gone.
"""

from __future__ import annotations

import faulthandler
import mmap
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Inputs are not longer.
MOST_BYTES = 1 << 17
_HEAD = struct.Struct("<5Q")
_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Limits:
    """What one input may take: seconds of the processor, and some more for each 100 KB; seconds of the clock; and bytes
    of memory beyond what the process had before."""

    processor: float = 10.0
    clock: float = 240.0
    memory: int = 1 << 30

    def seconds_for(self, nbytes: int) -> float:
        """Of the processor."""
        return self.processor * (1 + nbytes / 100_000)


@dataclass(frozen=True)
class State:
    """How far a process is: inputs that were begun, that were ended, and that were read; whether it works on one."""

    number: int
    ended: int
    accepted: int
    is_busy: bool
    blob: bytes


class Shared:
    """Memory of both processes that holds a state."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + MOST_BYTES)
        self._ended = self._accepted = 0

    def begin(self, number: int, blob: bytes) -> None:
        """Takes an input."""
        self._memory[_HEAD.size : _HEAD.size + len(blob)] = blob
        self._head(number, is_busy=True, nbytes=len(blob))

    def end(self, number: int, *, accepted: bool) -> None:
        """Counts it."""
        self._ended += 1
        self._accepted += accepted
        self._head(number, is_busy=False, nbytes=0)

    def state(self) -> State:
        """What was put in last."""
        number, ended, accepted, is_busy, nbytes = _HEAD.unpack_from(self._memory)
        blob = self._memory[_HEAD.size : _HEAD.size + nbytes]
        return State(number, ended, accepted, bool(is_busy), blob)

    def _head(self, number: int, *, is_busy: bool, nbytes: int) -> None:
        _HEAD.pack_into(self._memory, 0, number, self._ended, self._accepted, is_busy, nbytes)


def end_with_traces(log: IO[str]) -> None:
    """Has whatever signal ends this process write first where Python was."""
    faulthandler.enable(log)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, log, all_threads=False, chain=True)


@contextmanager
def limited(limits: Limits, nbytes: int) -> Iterator[None]:
    """Holds an input of that size to the limits."""
    in_use = int(_STATM.read_text().split()[5]) * _PAGE
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + limits.memory, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, limits.seconds_for(nbytes))
    signal.setitimer(signal.ITIMER_REAL, limits.clock)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            with suppress(OSError):
                signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
