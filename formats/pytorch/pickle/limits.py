"""What one model may cost to read: a pickle may ask for far more than its bytes, and so may its tensors.

A pickle refers to what it has made before, so that a few bytes can copy, hash or walk any number of values, and again
and again. A limit for each kind of copy would have to be found for each, and many small ones would pass it. So all of
them are counted together, in the bytes that they take or that take as long to handle, and held against the bytes of
pickles, and of the JSON of exported programs, that were read until then.
"""

from __future__ import annotations

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.input.allowance import Allowance

#: A reference that is copied.
REFERENCE = 8
#: A value that is looked at by itself.
STEP = 32
#: A value that is put in a set or a dictionary.
ENTRY = 64
#: A tensor that gets a name.
LEAF = 1024

_LEAST = 1 << 20
_TIMES = 64


class Limits:
    """The limits of one model, shared by all its files, which have `file_bytes` together."""

    def __init__(self, file_bytes: int) -> None:
        self.read = 0
        self._spent = 0
        self._file_bytes_left = file_bytes
        self._allowance = Allowance(file_bytes)

    def spend(self, nbytes: int, reading: int = 0) -> None:
        """Counts what is about to be done with values that were read; `reading` are the bytes that have been read of a
        pickle that is not in `read` yet. Raises CorruptFile where it is out of all proportion to these."""
        self._spent += nbytes
        read = self.read + reading
        if self._spent > _LEAST + _TIMES * read:
            raise CorruptFile(
                f"repeats the values in its {read} bytes of pickle or JSON without end: "
                "it may be an attack, or holds itself"
            )

    def take(self, nbytes: int, tensor: str) -> None:
        """Counts the bytes of a tensor that will be read or written. Those of most models are in their files once, and
        nothing is spent; views that repeat elements, and many names for the same ones, spend the model's allowance.
        Raises Unsupported where that does not cover them."""
        held = min(nbytes, self._file_bytes_left)
        self._file_bytes_left -= held
        if nbytes > held:
            self._allowance.spend(nbytes - held, "repeats elements of its file", tensor=tensor)
