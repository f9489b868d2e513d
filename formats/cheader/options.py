"""What a user can choose about the C: the writer's options, and what they make of the arrays."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Size, option
from nibblecast.formats.cheader.arrays import ALIGNMENT, BYTES, Arrangement, Style
from nibblecast.formats.cheader.packings import Packing

_MOST_ALIGNMENT = 4096
_SECTION = re.compile(r"[A-Za-z_.][A-Za-z0-9_.$]{0,127}")

#: The styles of data that C90 knows nothing of, and why.
_BEYOND_C90 = {
    "words64": "it has no literals of 64 bits",
    "string": "its strings have 509 characters at most",
    "embed": "#embed is C23",
}


@dataclass(frozen=True, slots=True)
class CHeaderOptions:
    """How the C is laid out."""

    layout: Literal["split", "header"] = option(
        "split", "split: weights.h, weights.c and nibblecast.h; header: everything static in one weights.h"
    )
    prefix: str = option("", "what all identifiers begin with; empty: made of the output's name")
    style: Literal["bytes", "words32", "words64", "string", "incbin", "embed"] = option(
        "bytes",
        "how data of 8 bits and fewer are spelled; words are for little-endian processors; "
        "incbin and embed put them into weights.bin, which the compiler reads",
    )
    packing: Literal["dense", "rows", "unpacked"] = option(
        "dense",
        "codes of 2 and 4 bits: dense as kernels take them, rows: each row of the last axis from a new byte on, "
        "unpacked: one to a byte as int8_t or uint8_t",
    )
    nibble_order: Literal["low", "high"] = option(
        "low", "where the first code of a byte is: in its lowest bits, as kernels take them, or in its highest"
    )
    tail_padding: bool = option(
        False, "all arrays filled up with zeros to multiples of 16 bytes, which MVE (Helium) loads at once"
    )
    align: int = option(ALIGNMENT, "what data are aligned to, in bytes: a power of two up to 4096")
    section: str = option("", "the section that all arrays go into, .qspi_rodata say; empty: the compiler's")
    std: Literal["c99", "c90"] = option(
        "c99", "c90: no literals of 64 bits and no strings above 509 characters, for compilers of strict C90"
    )
    model_array: Literal["no", "only", "also"] = option(
        "no", "the whole source file as one array PREFIX_model, as TensorFlow Lite Micro takes it: only it, or also it"
    )
    fixed_point: bool = option(
        False,
        "also the Q31 multipliers, shifts and offsets with which int8 kernels requantize, as in TFLite Micro",
    )
    budget: Size | None = option(None, "the most bytes of flash that all arrays may take; above it nothing is written")
    max_array: Size | None = option(
        None, "the most bytes that one array may take, 32767 for AVR; above it nothing is written"
    )
    depfile: str = option("", "a file that tells make and ninja what the output is made of")

    def arrangement(self) -> Arrangement:
        """What these options say of arrays. Raises UsageError where they contradict each other."""
        if not 1 <= self.align <= _MOST_ALIGNMENT or self.align & (self.align - 1):
            raise UsageError(f"align={self.align}: a power of two from 1 to {_MOST_ALIGNMENT} is needed")
        if self.section and not _SECTION.fullmatch(self.section):
            raise UsageError(
                f"section={self.section}: letters, digits, '_', '.' and '$' are what a section's name is made of here, "
                "no digit first; for another, leave the option out and define NIBBLECAST_AFTER when the C is compiled"
            )
        if self.packing == "unpacked" and self.nibble_order == "high":
            raise UsageError("packing=unpacked leaves nothing for nibble-order=high to order: choose one of them")
        packing = Packing(self.packing == "unpacked", self.nibble_order == "high", self.packing == "rows")
        style, c90 = self._style(), self.std == "c90"
        return Arrangement(style, packing, self.align, self.section, self.tail_padding, c90)

    def _style(self) -> Style:
        if self.std == "c90" and self.style in _BEYOND_C90:
            raise UsageError(f"style={self.style} is not for std=c90, as {_BEYOND_C90[self.style]}: choose words32")
        if self.style == "bytes":
            return BYTES
        from nibblecast.formats.cheader.styles import STYLES

        style = STYLES[self.style]
        if style.needs_source and self.layout == "header":
            raise UsageError(f"style={self.style} needs a source file: add --opt layout=split, or choose style=embed")
        return style

    def described(self, prefix: str) -> dict[str, Any]:
        """The options to name in the output: layout, prefix, and those that differ from their defaults; no paths, which
        would make the same input give other bytes elsewhere."""
        chosen, defaults = asdict(self), asdict(CHeaderOptions())
        always = {"layout": self.layout, "prefix": prefix}
        return always | {
            name.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
            for name, value in chosen.items()
            if name not in (*always, "depfile") and value != defaults[name]
        }
