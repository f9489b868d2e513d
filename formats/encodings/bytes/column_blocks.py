"""Codes whose columns become rows: what GPTQ and AWQ store, words along the inputs first.

Reading a row of the result takes a column of every row of the source, so that a wide block of columns is made at once
and kept until the next one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Data

_BLOCK_BYTES = 1 << 26
_PART_BYTES = 1 << 22


class ColumnBlocks(Data):
    """Data in rows of `row_bytes`, one for each `step` columns of a matrix of codes, shape (R, C).

    `take` makes rows of columns: it gets codes of shape (R, k * step), of dtypes narrower than a byte one in each
    element, and gives any array of which k rows have `row_bytes` each. `step` divides C.
    """

    def __init__(self, codes: Tensor, step: int, row_bytes: int, take: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self._codes, self._step, self._row_bytes, self._take = replace(codes, quantization=None), step, row_bytes, take
        self._rows = max(1, _BLOCK_BYTES // max(1, codes.shape[0] * step * codes.dtype.itemsize))
        self._lock = Lock()
        self._number, self._block = -1, np.zeros(0, np.uint8)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""
        block_bytes = self._rows * self._row_bytes
        if stop <= start or not block_bytes:
            return np.zeros(0, np.uint8)
        pieces = []
        for number in range(start // block_bytes, -(-min(stop, self.nbytes) // block_bytes)):
            first = number * block_bytes
            pieces.append(self._block_of(number)[max(0, start - first) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def release(self, start: int, stop: int) -> None:
        """Lets go of the block, and with the last bytes of what was read for it."""
        if stop < self.nbytes:
            return
        with self._lock:
            self._number, self._block = -1, np.zeros(0, np.uint8)
        self._codes.data.release(0, self._codes.nbytes)

    @property
    def nbytes(self) -> int:
        return self._codes.shape[1] // self._step * self._row_bytes

    def made_of(self) -> tuple[Data, ...]:
        return (self._codes.data,)

    def _block_of(self, number: int) -> NDArray[np.uint8]:
        with self._lock:
            if number != self._number:
                taken = np.ascontiguousarray(self._take(self._columns(number)))
                self._number, self._block = number, taken.reshape(-1).view(np.uint8)
            return self._block

    def _columns(self, number: int) -> NDArray[Any]:
        """The codes of one block's columns, shape (R, k * step)."""
        codes = self._codes
        first = number * self._rows * self._step
        last = min(codes.shape[1], first + self._rows * self._step)
        if codes.shape[0] == 1 or codes.nbytes <= _PART_BYTES:
            return codes.codes()[:, first:last]
        rows = max(1, _PART_BYTES * codes.shape[0] // codes.nbytes // codes.row_step) * codes.row_step
        element = SUB_BYTE[codes.dtype][1] if codes.dtype in SUB_BYTE else codes.dtype
        columns = np.empty((codes.shape[0], last - first), element)
        for start in range(0, codes.shape[0], rows):
            stop = min(codes.shape[0], start + rows)
            part = codes.rows(start, stop)
            columns[start:stop] = part.codes()[:, first:last]  # a copy, so that the rest of the rows can go
            part.release()
        return columns
