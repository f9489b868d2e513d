"""Numbers and names as a page shows them."""

from __future__ import annotations

from math import isfinite

from converters.errors import printable

_LONGEST_NAME = 120
_SHOWN_OF_LONG_NAMES = 56


def shown(text: str) -> str:
    """A name from a model or from a file system on one line: what cannot be printed, or would turn the direction of
    writing, as escapes; the middle of a very long one left out."""
    line = printable(text[:1_000] + text[-1_000:] if len(text) > 2_000 else text)
    if len(line) <= _LONGEST_NAME:
        return line
    return f"{line[:_SHOWN_OF_LONG_NAMES]} … {line[-_SHOWN_OF_LONG_NAMES:]}"


def number(value: float) -> str:
    """A number of four significant digits: 0.0703, 1.23e-05, 448, -6."""
    return f"{value:.4g}" if isfinite(value) else "not finite"


def count_text(value: float) -> str:
    """A count for an axis: 800, 1.2k, 3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """A number of bytes: 512 B, 1.5 KiB, 3.2 GiB."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def percent(share: float) -> str:
    """A share of 1 as a percentage; what is not 0 is not shown as 0."""
    return f"{100 * share:.2f} %" if share == 0 or share >= 0.00005 else "< 0.01 %"


def thousands(count: int) -> str:
    """A count with thin spaces between groups of three digits."""
    return f"{count:,}".replace(",", "\u202f")


def seconds_text(seconds: float) -> str:
    """A time: 0.12 s, 3.5 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
