"""How a process uses its machine: the number of processors, and how it allocates memory."""

from __future__ import annotations

import ctypes
import os
import sys

from nibblecast.converters.errors import UsageError

# options of mallopt, malloc.h of glibc
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

#: The variable that says how many things a process does at a time: `batch` sets it for workers, which share them.
THREADS = "NIBBLECAST_THREADS"


def processors() -> int:
    """The number of processors that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """The number of threads that compute at a time. Raises UsageError if the variable is not a positive number."""
    wanted = os.environ.get(THREADS)
    if wanted is None:
        return processors()
    if not wanted.isdecimal() or int(wanted) == 0:
        raise UsageError(f"{THREADS}={wanted}: must be a number of threads, at least 1")
    return int(wanted)


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, some MiB, and use it again. Arrays of MiB that come and go in threads are
    else pages that the system takes back and clears again each time, which costs as much as the work on them. For
    processes that do nothing else than nibblecast's work; nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, 64 << 20)
    mallopt(_TOP_PAD, 16 << 20)
