"""How many things to do at a time."""

from __future__ import annotations

import os

from nibblecast.converters.errors import UsageError

#: The variable that says so for a process: `batch` sets it for workers, who share the processors.
THREADS = "NIBBLECAST_THREADS"


def processors() -> int:
    """How many processors this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads are to compute at a time. Raises UsageError where the variable is no such number."""
    wanted = os.environ.get(THREADS)
    if wanted is None:
        return processors()
    if not wanted.isdecimal() or int(wanted) == 0:
        raise UsageError(f"{THREADS}={wanted}: a number of threads is needed, 1 or more")
    return int(wanted)
