"""The HTML file: one template for all reports, with its style sheet and its script inside.

Nothing is loaded from anywhere: the page's own policy forbids it, and allows no style and no script but these two, by
their SHA-256. jinja2 escapes all text. Without scripts the page is complete; it can only not be sorted and searched.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import jinja2
from markupsafe import Markup

from nibblecast.converters.version import __version__

_PARTS = re.compile(r"[^./_]*[./_]+|[^./_]+")
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table: its text, and what it is sorted by where that is another thing. `anchor` is what it links to;
    `bad` says that it should catch the eye."""

    text: str
    order: float | str | None = None
    anchor: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, and whether it holds numbers, or sentences."""

    title: str
    numbers: bool = True
    sentences: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be sorted; the first cell of each row is its header. With `search`, the label of a search box,
    rows can be looked for."""

    anchor: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    search: str = ""


@dataclass(frozen=True, slots=True)
class Detail:
    """What is shown when it is asked for: facts as pairs of a term and its value, plots, lines of text, counts as pairs
    of a value and how often it occurs."""

    anchor: str
    title: str
    facts: Sequence[tuple[str, str]] = ()
    plots: Sequence[Markup] = ()
    lines: Sequence[str] = ()
    counts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading."""

    anchor: str
    title: str
    text: str = ""
    plots: Sequence[Markup] = ()
    table: Table | None = None
    details: Sequence[Detail] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its heading, a line below it, the figures that matter most, the sections."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    style, script = ((_TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),  # noqa: S704  # this package's own
        script=Markup(script),  # noqa: S704
        policy=policy,
        version=__version__,
    )


def _breakable(name: str) -> Markup:
    """A name that lines may break in after its parts."""
    return Markup("<wbr>").join(_PARTS.findall(name))


def _hash(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()
