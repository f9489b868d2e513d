"""What a user can choose about the C: the writer's options, and what they make of the arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from converters.errors import UsageError
from converters.interfaces import Size, option
from formats.cheader.arrays import BYTES, Arrangement


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
    model_array: Literal["no", "only", "also"] = option(
        "no", "the whole source file as one array PREFIX_model, as TensorFlow Lite Micro takes it: only it, or also it"
    )
    fixed_point: bool = option(
        False,
        "also the Q31 multipliers, shifts and offsets with which int8 kernels requantize, as in TFLite Micro",
    )
    budget: Size | None = option(None, "the most bytes of flash that all arrays may take; above it nothing is written")

    def arrangement(self) -> Arrangement:
        """What these options say of arrays. Raises UsageError where they contradict each other."""
        style = BYTES
        if self.style != "bytes":
            from formats.cheader.styles import STYLES

            style = STYLES[self.style]
        if style.needs_source and self.layout == "header":
            raise UsageError(f"style={self.style} needs a source file: add --opt layout=split, or choose style=embed")
        return Arrangement(style)

    def described(self, prefix: str) -> dict[str, Any]:
        """The options to name in the output: layout, prefix, and those that differ from their defaults."""
        chosen, defaults = asdict(self), asdict(CHeaderOptions())
        always = {"layout": self.layout, "prefix": prefix}
        return always | {
            name.replace("_", "-"): value
            for name, value in chosen.items()
            if name not in always and value != defaults[name]
        }
