"""A tensor's canonical bytes one piece after the other, as sinks write them: computed ahead by a few threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from converters.ir import Tensor
from converters.processors import threads
from converters.storage import FileRange, InMemory, read_into

if TYPE_CHECKING:  # imported when there is something to compute
    from concurrent.futures import Future

_MOST_THREADS = 4


def pieces(tensor: Tensor, nbytes: int) -> Iterator[NDArray[np.uint8]]:
    """The canonical bytes of `tensor.cut(nbytes)`, in order; do not write to them. The memory behind each is let go, or
    used again, when the next one is asked for. Data that are computed are so in threads (NumPy works without holding
    the interpreter), at most one piece ahead for each; no thread is left when the iterator is exhausted or closed."""
    parts = tensor.cut(nbytes)
    plain = tensor.nbytes <= nbytes or isinstance(tensor.data, FileRange | InMemory)
    count = 1 if plain else min(_MOST_THREADS, threads())
    if count < 2:
        for part in parts:
            yield part.packed()
            part.release()
        return
    from concurrent.futures import ThreadPoolExecutor

    ahead: deque[tuple[Tensor, Future[NDArray[np.uint8]]]] = deque()
    memory = [np.empty(0, np.uint8)] * (count + 2)  # for those ahead, and the one that was asked for last
    with ThreadPoolExecutor(count) as pool:
        try:
            for number, part in enumerate(parts):
                at = number % len(memory)
                if memory[at].size < part.nbytes:
                    memory[at] = np.empty(part.nbytes, np.uint8)
                ahead.append((part, pool.submit(read_into, part.data, 0, part.nbytes, memory[at])))
                if len(ahead) > count:
                    yield from _first(ahead)
            while ahead:
                yield from _first(ahead)
        finally:
            pool.shutdown(cancel_futures=True)


def _first(ahead: deque[tuple[Tensor, Future[NDArray[np.uint8]]]]) -> Iterator[NDArray[np.uint8]]:
    part, packed = ahead.popleft()
    yield packed.result()
    part.release()
