"""The styles of data arrays other than bytes: they compile faster, and each asks something of the compiler.

Measured with gcc 12 -O2 on 4 MiB: bytes 5.9 s and 579 MB, words32 2.6 s and 237 MB, words64 1.3 s and 144 MB,
strings 0.4 s and 107 MB, `.incbin` 0.02 s and 21 MB. `benchmarks` measures them anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from nibblecast.formats.cheader.arrays import Array, Style
from nibblecast.formats.cheader.literals import notation
from nibblecast.formats.cheader.literals.notation import Notation

#: Fixed-width octal escapes take in no digit after them, and hold no trigraph.
_ESCAPES = replace(notation.by_table("uint8_t", np.uint8, "\\%03o", 20), before=b'    "', after=b'"\n')


@dataclass(frozen=True, slots=True)
class _Words(Style):
    """Words of several bytes each, little-endian, the last one filled up with zeros."""

    word: Notation = notation.UINT32

    def spell(self, array: Array) -> Array:
        """The array's bytes as words."""
        return replace(array, style=self, notation=self.word, count=-(-array.elements // self.word.nbytes), padding=0)


@dataclass(frozen=True, slots=True)
class _Text(Style):
    """A string literal, whose terminating NUL C++ wants room for."""

    def spell(self, array: Array) -> Array:
        """The array's bytes as characters."""
        return replace(array, style=self, notation=replace(_ESCAPES, c_type=array.notation.c_type), terminator=1)


@dataclass(frozen=True, slots=True)
class _File(Style):
    """Bytes of a file that the compiler reads."""

    def spell(self, array: Array) -> Array:
        """The array as it is."""
        return replace(array, style=self)


STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "words32": _Words("array", "words", word=notation.UINT32),
        "words64": _Words("array", "words", word=notation.UINT64),
        "string": _Text("array.string", "string", "diagnostics.end"),
        "incbin": _File("array.incbin", "incbin", "diagnostics.end", in_file=True, needs_source=True),
        "embed": _File("array.embed", "embed", "diagnostics.end", in_file=True),
    }
)
