"""Waiting for a state, not for a time: how long that takes depends on what else the machine does."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Far more than anything takes on a busy machine; only something that never comes reaches it.
_MOST_SECONDS = 300.0


def until(condition: Callable[[], object]) -> None:
    """Returns when the condition holds; fails where it never does."""
    end = time.monotonic() + _MOST_SECONDS
    while not condition():
        assert time.monotonic() < end, "what is waited for has not come"
        time.sleep(0.02)
