"""Numbers and names as a page shows them."""

from __future__ import annotations

from math import isfinite

from nibblecast.converters.errors import printable
from nibblecast.converters.input.urls import without_secrets

_LONGEST_NAME = 120


def shown(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name from a model or from a file system on one line: what cannot be printed, or would turn the direction of
    writing, as escapes; the middle of a very long one left out, and what is secret in URLs."""
    text = without_secrets(text)
    line = printable(text if len(text) <= 2 * longest else text[:longest] + text[-longest:])
    return line if len(line) <= longest else f"{line[: longest // 2]} … {line[-longest // 2 :]}"


def number(value: float) -> str:
    """A number of three significant digits, a whole one with all of its: 0.0703, 1.23e-05, 57344, -6."""
    if not isfinite(value):
        return "not finite"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def count_text(value: float) -> str:
    """A count for an axis: 800, 1.2k, 3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share of 1 as a percentage; only 0 itself is shown as 0."""
    return f"{100 * share:.2f} %" if share == 0 or share >= 0.00005 else "< 0.01 %"


def thousands(count: int) -> str:
    """A count with thin spaces between groups of three digits."""
    return f"{count:,}".replace(",", "\u202f")


def seconds_text(seconds: float) -> str:
    """A time: 0.12 s, 3.5 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
