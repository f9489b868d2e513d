"""Small figures as SVG that takes its colours from the page, which has light and dark ones.

matplotlib draws them: it is the best kept of Python's plot libraries, and its SVG is complete as it is. plotly, bokeh
and vega draw in the browser, with 1 to 5 MB of JavaScript in the page, which for hundreds of small histograms is slow,
says nothing to a screen reader and needs `unsafe-eval` or inline styles, which the page's policy forbids. Colours are
marked by class, and what a page with many figures must not repeat (identifiers, style sheets) is taken out. No text
that comes from a model is in any figure.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib.style
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nibblecast.converters.reports.counts import BINS_PER_OCTAVE, CodeCounts, Spread
from nibblecast.converters.reports.words import count_text, number
from nibblecast.converters.sizes import bytes_text, bytes_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that stand for classes of the page's style sheet.
_INK, _FIRST, _SECOND, _GRID = "#010101", "#020202", "#030303", "#040404"
_CLASSES = {_INK: "ink", _FIRST: "first", _SECOND: "second", _GRID: "grid"}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.labelcolor": _INK,
    "xtick.labelsize": 8,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.labelcolor": _INK,
    "ytick.labelsize": 8,
    "ytick.major.size": 0,
}
_HEIGHT = 1.7
_WIDTH = 3.6
_MOST_BINS = 64
_SVG = "{http://www.w3.org/2000/svg}"
_DECIMALS = re.compile(r"(\.\d\d?)\d*")


def codes_plot(codes: CodeCounts, title: str) -> Markup:
    """The histogram of codes."""

    def draw(axes: Axes) -> None:
        edges = [place - 0.5 for place in range(len(codes.counts) + 1)]
        _steps(axes, codes.counts, edges)
        step = max(1, -(-len(codes.values) // 8))
        places = range(0, len(codes.values), step)
        axes.set_xticks(list(places), [number(codes.values[place]) for place in places])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))

    most = max(range(len(codes.counts)), key=codes.counts.__getitem__)
    found = (
        f"histogram from {number(codes.values[0])} to {number(codes.values[-1])}, most often "
        f"{number(codes.values[most])}, {codes.unused} of {len(codes.values)} unused"
    )
    return _drawn(draw, title, found)


def spread_plot(spread: Spread, title: str) -> Markup:
    """The histogram of a parameter's absolute values, on a logarithmic axis."""
    bins, width = _coarser(spread.bins)

    def draw(axes: Axes) -> None:
        counted = dict(bins)
        first, last = bins[0][0], bins[-1][0]
        edges = [2 ** (i * width / BINS_PER_OCTAVE) for i in range(first, last + 2)]
        _steps(axes, [counted.get(i, 0) for i in range(first, last + 1)], edges)
        axes.set_xscale("log", base=2)
        inner = edges if len(edges) <= 4 else [edges[(len(edges) - 1) * i // 3] for i in range(4)]
        _marks(axes, inner, number)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))

    return _drawn(draw, title, f"histogram of {spread.count} from {number(spread.lowest)} to {number(spread.highest)}")


def layer_plots(quantized: Sequence[int], plain: Sequence[int], bits: Sequence[float]) -> list[Markup]:
    """Bytes, and bits per weight, of layers in their order."""
    edges = [position + 0.5 for position in range(len(bits) + 1)]
    both = [a + b for a, b in zip(quantized, plain, strict=True)]
    unit, size = bytes_unit(max(both))

    def sizes(axes: Axes) -> None:
        _steps(axes, [nbytes / size for nbytes in both], edges, _SECOND)
        _steps(axes, [nbytes / size for nbytes in quantized], edges)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    def widths(axes: Axes) -> None:
        _steps(axes, bits, edges)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    return [
        _drawn(
            sizes,
            f"{'Bytes' if size == 1 else unit} by layer",
            f"from {bytes_text(min(both))} to {bytes_text(max(both))}",
        ),
        _drawn(widths, "Bits per weight by layer", f"from {number(min(bits))} to {number(max(bits))}"),
    ]


def amounts_plot(amounts: Sequence[float], title: str, text: Callable[[float], str]) -> Markup:
    """The histogram of positive amounts, on a logarithmic axis."""
    found = sorted(amount for amount in amounts if amount > 0)
    low, high = found[0], max(found[-1], found[0] * 1.1)
    edges = [low * (high / low) ** (i / 12) for i in range(13)]
    edges[-1] = max(edges[-1], high)
    counts = [sum(a <= amount < b for amount in found) for a, b in pairwise(edges)]
    counts[-1] += sum(amount >= edges[-1] for amount in found)

    def draw(axes: Axes) -> None:
        _steps(axes, counts, edges)
        axes.set_xscale("log")
        places = [edges[0], edges[4], edges[8], edges[12]]
        _marks(axes, places, text)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))

    return _drawn(draw, title, f"histogram of {len(found)} from {text(found[0])} to {text(found[-1])}")


def _coarser(bins: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    """The bins, several of them put together where they span too many, and how many."""
    span = bins[-1][0] - bins[0][0] + 1
    width = -(-span // _MOST_BINS)
    together: dict[int, int] = {}
    for i, count in bins:
        together[i // width] = together.get(i // width, 0) + count
    return list(together.items()), width


def _steps(axes: Axes, counts: Sequence[float], edges: Sequence[float], colour: str = _FIRST) -> None:
    # one path for all bars: a page has hundreds of figures
    axes.stairs(counts, edges, fill=True, facecolor=colour, edgecolor="none", clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(axes.get_ylim()[1], max(counts) * 1.05, 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _marks(axes: Axes, places: Sequence[float], text: Callable[[float], str]) -> None:
    """Labels of the horizontal axis, from end to end and not beyond."""
    axes.set_xticks(places, [text(place) for place in places])
    axes.set_xticks([], minor=True)
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")


@contextmanager
def drawing() -> Iterator[None]:
    """A block in which figures ignore the user's own settings of matplotlib."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def _drawn(draw: Callable[[Axes], None], title: str, found: str) -> Markup:
    """A figure under a title; `found` says in words what it shows."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    FigureCanvasSVG(figure)
    # the room for text is fixed: to measure it, as the layout engines do, takes longer than all the rest
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.17, top=0.86)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    drawn = BytesIO()
    figure.savefig(drawn, format="svg", transparent=True)
    return _inline(ET.fromstring(drawn.getvalue()), f"{title}: {found}")  # noqa: S314  # of our own making


def _inline(document: ET.Element, label: str) -> Markup:
    """An SVG document as an element of an HTML page: its shapes and texts alone."""
    _, _, width, height = document.attrib["viewBox"].split()
    plot = ET.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label})
    for element in _drawn_elements(document):
        tag = element.tag.removeprefix(_SVG)
        attributes = dict(_attributes(element.attrib))
        if tag in ("path", "text") and "class" in attributes:
            ET.SubElement(plot, tag, attributes).text = element.text if tag == "text" else None
    return Markup(ET.tostring(plot, encoding="unicode"))  # noqa: S704  # ElementTree escapes


def _drawn_elements(element: ET.Element) -> Iterator[ET.Element]:
    yield element
    for child in element:
        if child.tag != f"{_SVG}defs":
            yield from _drawn_elements(child)


def _attributes(attributes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What of an element's attributes a page needs; its style as attributes and classes."""
    classes = []
    for name, value in attributes.items():
        if name in ("d", "x", "y"):
            yield name, _DECIMALS.sub(r"\1", " ".join(value.split()))
    for declaration in attributes.get("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if value in _CLASSES:
            classes.append(f"{name}-{_CLASSES[value]}")
        elif name in ("text-anchor", "stroke-width", "fill"):
            yield name, value
    if classes:
        yield "class", " ".join(classes)
