"""How the time that something takes grows with its size, and whether it ends at all. Absolute times are another
machine's; proportions are not."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class EndlessError(BaseException):
    """No Exception, so that nothing that is tested catches it."""


@contextmanager
def ends(seconds: float = 20.0) -> Iterator[None]:
    """Fails where what is done inside takes more of the processor's time than anything like it ever does: an endless
    loop would hold up all other tests."""

    def stop(*_: object) -> None:
        raise EndlessError(f"has not ended after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
