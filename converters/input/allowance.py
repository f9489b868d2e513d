"""How far a model may grow beyond its files.

Most tensors are as large in memory and in outputs as in their file. Some are larger: a view that repeats one element, a
sparse matrix, an operator whose constant is described by its sizes. So a file of a few hundred bytes could demand any
amount of memory or disk.

Why one allowance per model, in proportion to its files. Many small tensors together would pass a limit per tensor. A
limit per kind of expansion would have to be chosen, and tested, for each kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING

from nibblecast.converters.errors import Unsupported, UsageError, brief

if TYPE_CHECKING:
    from nibblecast.converters.ir import Tensor

#: The environment variable that raises the allowance: bytes, e.g. 16G.
VARIABLE = "NIBBLECAST_MAX_EXPANSION"

_LEAST = 256 << 20
_TIMES_THE_FILE = 64
_SIZE = re.compile(r"(\d{1,18})([KMGT]?)", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Allowance:
    """The bytes that a model may expand to beyond its files: 64 times their size and at least 256 MiB, or the value of
    the environment variable NIBBLECAST_MAX_EXPANSION."""

    def __init__(self, file_bytes: int) -> None:
        self._configured = _configured()
        self._file_bytes = self._held = 0
        self._total = self._left = 0
        self.include(file_bytes)

    def include(self, file_bytes: int) -> None:
        """Adds a further file of the model, which raises the allowance."""
        self._file_bytes += file_bytes
        usual = max(_LEAST, _TIMES_THE_FILE * self._file_bytes)
        total = usual if self._configured is None else self._configured
        self._left += total - self._total
        self._total = total

    def rest(self) -> Allowance:
        """A copy of the remaining allowance, for one use of the model; each of several uses may spend all of it."""
        return copy(self)

    def spend(self, nbytes: int, what: str, *, tensor: str | None = None) -> None:
        """Counts bytes that are about to be created; `what` begins the message, e.g. "repeats its elements". Raises
        Unsupported, and counts nothing, if the allowance does not cover them."""
        nbytes = max(nbytes, 0)  # a damaged shape's product may be negative
        if nbytes > self._left:
            raise Unsupported(
                f"{what}: {brief(nbytes)} bytes from a file of {self._file_bytes}, and {self._total} are allowed "
                f"for all such data of a model; if you trust the file, set {VARIABLE} (e.g. 16G)",
                tensor=tensor,
            )
        self._left -= nbytes

    def hold(self, nbytes: int, *, tensor: str | None = None) -> None:
        """Counts the bytes of a tensor. All tensors together are free up to the files' size; only bytes beyond it are
        spent, e.g. by a view that repeats elements, a sparse matrix, or one payload under many names. Raises
        Unsupported as in `spend`."""
        beyond = max(0, self._held + nbytes - self._file_bytes) - max(0, self._held - self._file_bytes)
        if beyond:
            self.spend(beyond, "repeats or expands what the file holds", tensor=tensor)
        self._held += nbytes

    def hold_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Counts the bytes of all tensors of a model with their parameters, once for each name."""
        for name, tensor in tensors.items():
            self.hold(sum(data.nbytes for data in tensor.stored()), tensor=name)


def _configured() -> int | None:
    """The bytes that the environment allows; None if it is not set. Raises UsageError if it is not a size."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise UsageError(f"{VARIABLE}='{text}' is not a size in bytes (e.g. 800M or 16G)")
    return int(matched[1]) << _UNITS[matched[2].upper()]
