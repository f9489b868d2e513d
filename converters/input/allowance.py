"""How far a model may grow beyond its files.

Most of a model is as large in memory, and in what is written, as in its file. Some is not: a view that repeats one
element, a sparse matrix, an operator whose constant its sizes describe. A file of a few hundred bytes could so ask for
any amount of memory or disk. One allowance for each model, in proportion to its files, covers all of these together:
a limit for each tensor would be passed by many of them, and a limit for each kind would have to be found for each.
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
    """Bytes that may be made of a model beyond what its files hold: 64 times the files' size and at least 256 MiB, or
    what the environment variable NIBBLECAST_MAX_EXPANSION says."""

    def __init__(self, file_bytes: int) -> None:
        self._configured = _configured()
        self._file_bytes = self._held = 0
        self._total = self._left = 0
        self.include(file_bytes)

    def include(self, file_bytes: int) -> None:
        """Takes in a further file of the model: what it holds may grow as well."""
        self._file_bytes += file_bytes
        usual = max(_LEAST, _TIMES_THE_FILE * self._file_bytes)
        total = usual if self._configured is None else self._configured
        self._left += total - self._total
        self._total = total

    def rest(self) -> Allowance:
        """What is left of it, for one use of the model: each of several may spend all of that, one after the other."""
        return copy(self)

    def spend(self, nbytes: int, what: str, *, tensor: str | None = None) -> None:
        """Counts bytes that are about to be made; `what` begins the message: "repeats its elements", e.g. Raises
        Unsupported where the allowance does not cover them; nothing is counted then."""
        nbytes = max(nbytes, 0)  # a damaged shape's product may be negative
        if nbytes > self._left:
            raise Unsupported(
                f"{what}: {brief(nbytes)} bytes from a file of {self._file_bytes}, and {self._total} are allowed "
                f"for all such data of a model; if you trust the file, set {VARIABLE} (e.g. 16G)",
                tensor=tensor,
            )
        self._left -= nbytes

    def hold(self, nbytes: int, *, tensor: str | None = None) -> None:
        """Counts the bytes of a tensor. Those of all tensors together are free as far as the files have as many: no
        more than that is counted of a view that repeats elements, a sparse matrix, or a payload of many names. Raises
        Unsupported as `spend` does."""
        beyond = max(0, self._held + nbytes - self._file_bytes) - max(0, self._held - self._file_bytes)
        if beyond:
            self.spend(beyond, "repeats or expands what the file holds", tensor=tensor)
        self._held += nbytes

    def hold_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Counts what the tensors of a whole model hold, their parameters included, as often as each is named."""
        for name, tensor in tensors.items():
            self.hold(sum(data.nbytes for data in tensor.stored()), tensor=name)


def _configured() -> int | None:
    """The bytes that the environment allows; None where it says nothing. Raises UsageError for what is no size."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise UsageError(f"{VARIABLE}='{text}' is not a size in bytes (e.g. 800M or 16G)")
    return int(matched[1]) << _UNITS[matched[2].upper()]
