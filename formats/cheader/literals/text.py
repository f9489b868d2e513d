"""Arrays of elements -> lines of C initialisers, in constant memory and at the speed of a table look-up.

Every literal of a notation takes the same number of characters, so that a chunk of lines is one 2-D array of characters
in which indents and line ends stay, and the size of the text is known before any element is.
"""

from __future__ import annotations

from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nibblecast.formats.cheader.literals.notation import Notation

_CHUNK_BYTES = 1 << 20
_KEPT_BYTES = 1 << 24


def text_size(notation: Notation, count: int) -> int:
    """Characters that `count` elements take, indents and line ends included."""
    lines = -(-count // notation.per_line)
    return count * notation.width + lines * (len(notation.before) + len(notation.after))


class InitialiserText:
    """Writes `count` elements to `stream` as they come, `notation.per_line` to a line. `finish` ends the last line."""

    def __init__(self, stream: BinaryIO, notation: Notation, count: int) -> None:
        _keep_freed_memory()
        self._stream = stream
        self._notation = notation
        self._lines_per_chunk = min(count, notation.at_once, _CHUNK_BYTES // notation.width) // notation.per_line + 1
        self._lines = _blank_lines(notation, self._lines_per_chunk)
        self._begun = np.empty(0, notation.dtype)  # the elements of a line that is not full yet

    def write(self, elements: NDArray[Any]) -> None:
        """Writes elements of shape (n,) and the notation's dtype."""
        if self._begun.size:
            elements = np.concatenate([self._begun, elements])
        whole = elements.size // self._notation.per_line * self._notation.per_line
        step = self._lines_per_chunk * self._notation.per_line
        for start in range(0, whole, step):
            self._write_lines(elements[start : min(start + step, whole)])
        self._begun = elements[whole:].copy()

    def finish(self) -> None:
        """Writes the elements of the last line."""
        if self._begun.size:
            literals = self._notation.encode(self._begun).tobytes()
            self._stream.write(self._notation.before + literals + self._notation.after)
            self._begun = self._begun[:0]

    def _write_lines(self, elements: NDArray[Any]) -> None:
        lines = self._lines[: elements.size // self._notation.per_line]
        start, width = len(self._notation.before), self._notation.per_line * self._notation.width
        lines[:, start : start + width] = self._notation.encode(elements).reshape(len(lines), width)
        self._stream.write(lines.data)


@cache
def _keep_freed_memory() -> None:
    """Has glibc keep what is freed from now on for the next arrays, as it does with pieces of up to the size of the
    largest that was freed: every page that it gives back is cleared by the system when the next chunk asks for it,
    which takes longer than the arithmetic. Nothing is touched here."""
    np.empty(_KEPT_BYTES, np.uint8)


def _blank_lines(notation: Notation, count: int) -> NDArray[np.uint8]:
    """Lines whose literals are still to come."""
    blank = notation.before + b" " * (notation.per_line * notation.width) + notation.after
    return np.tile(np.frombuffer(blank, np.uint8), (count, 1))
