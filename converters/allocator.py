"""How this process gets memory from the system."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8


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
