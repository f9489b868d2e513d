"""How the time that something takes grows with its size. Absolute times are another machine's; proportions are not."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

_TIMES_LARGER = 4
_TRIES = 2


def assert_linear(make: Callable[[int], Callable[[], object]], size: int) -> None:
    """Fails where what `make(size)` gives takes far more than in proportion when it is made four times as large: linear
    time grows to 4 times (to less, with what it costs to start), quadratic time to 16."""
    small, large = (_seconds(make(count)) for count in (size, size * _TIMES_LARGER))
    assert large < 8 * small + 0.02, f"{small:.3f} s became {large:.3f} s"


def _seconds(run: Callable[[], object]) -> float:
    """The least processor time of some tries: what else the machine does only ever adds to it."""
    best = float("inf")
    for _ in range(_TRIES):
        gc.collect()
        begin = time.process_time()
        run()
        best = min(best, time.process_time() - begin)
    return best
