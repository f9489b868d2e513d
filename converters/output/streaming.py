"""The canonical bytes of tensors, piece by piece as shards write them, computed ahead by a few threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Tensor
from nibblecast.converters.machine import threads
from nibblecast.converters.storage import FileRange, InMemory

if TYPE_CHECKING:  # imported when there is something to compute
    from concurrent.futures import Future

_MOST_THREADS = 4


def write_tensors(
    stream: BinaryIO, tensors: Sequence[Tensor], nbytes: int, wrote: Callable[[int], None], *, release: bool = True
) -> None:
    """Writes the canonical bytes of tensors, one after the other, in pieces of about `nbytes`. Calls `wrote` for each
    piece, and releases each tensor when it is written, unless `release` is false."""
    current = 0
    for number, piece in pieces_of(tensors, nbytes):
        if number != current and release:
            tensors[current].release()
        current = number
        stream.write(piece.data)
        wrote(piece.size)
    if tensors and release:
        tensors[-1].release()


def pieces_of(tensors: Iterable[Tensor], nbytes: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The pieces `cut(nbytes)` of one tensor after the other, each with the tensor's number from 0 on. Do not write to
    them. Each tensor has at least one piece, which may be empty. A piece's memory is released or reused when the next
    one is requested. Threads compute data at most one piece ahead each, including pieces of the next tensor (NumPy
    releases the interpreter's lock). No thread is left when the iterator is exhausted or closed."""
    remaining = enumerate(tensors)
    for number, tensor in remaining:
        if tensor.nbytes <= nbytes or _is_here(tensor) or threads() < 2:
            for part in tensor.cut(nbytes):
                yield number, part.packed()
                part.release()
        else:
            yield from _computed_ahead(chain([(number, tensor)], remaining), nbytes)


def _is_here(tensor: Tensor) -> bool:
    return isinstance(tensor.data, FileRange | InMemory)


def _computed_ahead(tensors: Iterable[tuple[int, Tensor]], nbytes: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    from concurrent.futures import ThreadPoolExecutor

    count = min(_MOST_THREADS, threads())
    ahead: deque[tuple[int, Tensor, Future[NDArray[np.uint8]]]] = deque()
    memory = [np.empty(0, np.uint8)] * (count + 2)  # for the pieces ahead, and the one that the caller uses
    parts = ((number, part) for number, tensor in tensors for part in tensor.cut(nbytes))
    with ThreadPoolExecutor(count, initializer=partial(np.seterr, all="ignore")) as pool:  # numbers may be anything
        try:
            for turn, (number, part) in enumerate(parts):
                at = turn % len(memory)
                if memory[at].size < part.nbytes and not _is_here(part):
                    memory[at] = np.empty(part.nbytes, np.uint8)
                ahead.append((number, part, pool.submit(part.data.read_into, 0, part.nbytes, memory[at])))
                if len(ahead) > count:
                    yield from _first(ahead)
            while ahead:
                yield from _first(ahead)
        finally:
            pool.shutdown(cancel_futures=True)


def _first(ahead: deque[tuple[int, Tensor, Future[NDArray[np.uint8]]]]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    number, part, packed = ahead.popleft()
    yield number, packed.result()
    part.release()
