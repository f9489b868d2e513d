"""Figures: their bars are what was counted, from the first to the last, and a page has all that it should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.reports import plots
from nibblecast.converters.reports.counts import BINS_PER_OCTAVE, Spread
from nibblecast.converters.sizes import bytes_text
from tests.reports import samples

ROOT = Path(__file__).parents[2]
SECTIONS = re.compile(r'<section id="([^"]*)"')
LABELS = re.compile(r'role="img" aria-label="([^"]*)"')


def bars(figure: str, colour: str = "first") -> list[float]:
    """The heights of a figure's bars, as parts of the highest."""
    outline = re.search(rf'<path d="([^"]*)" class="fill-{colour}"', figure)
    assert outline is not None
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", outline[1])]
    found = [heights[0] - y for y in heights[1:-1:2]]
    return [height / max(found) for height in found]


def ticks(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


def spread(counts: dict[int, int]) -> Spread:
    """Of absolute values in bins of a part of an octave."""
    ordered = sorted(counts.items())
    edge = [2 ** (place / BINS_PER_OCTAVE) for place in (ordered[0][0], ordered[-1][0] + 1)]
    return Spread(
        sum(counts.values()), edge[0], edge[1], mean=1.0, zeros=0, negative=0, not_finite=0, bins=tuple(ordered)
    )


def test_a_parameters_bars_are_its_bins_from_the_first_on() -> None:
    counts = {-3: 4, -2: 8, 0: 2, 1: 1}
    with plots.drawing():
        figure = plots.spread_plot(spread(counts), "Scales")
    wanted = [counts.get(place, 0) / 8 for place in range(-3, 2)]
    assert bars(figure) == pytest.approx(wanted, abs=0.01)
    assert LABELS.findall(figure)[0].startswith("Scales: histogram of 15 from ")


def test_bins_that_are_too_many_are_put_together() -> None:
    counts = dict.fromkeys(range(-100, 100), 3) | {-100: 30}
    with plots.drawing():
        drawn = bars(plots.spread_plot(spread(counts), "Scales"))
    assert len(drawn) <= 64
    assert drawn[0] == 1
    together = 200 / len(drawn)
    assert drawn[1] == pytest.approx(3 * together / (27 + 3 * together), abs=0.05)


def test_amounts_are_counted_between_the_smallest_and_the_largest() -> None:
    with plots.drawing():
        figure = plots.amounts_plot([1, 1, 1, 4096, 64], "Models by bytes written", bytes_text)
    drawn = bars(figure)
    assert len(drawn) == 12
    assert [place for place, height in enumerate(drawn) if height] == [0, 6, 11]
    assert [drawn[place] for place in (0, 6, 11)] == pytest.approx([1, 1 / 3, 1 / 3], abs=0.01)
    assert LABELS.findall(figure) == ["Models by bytes written: histogram of 5 from 1 B to 4.0 KiB"]
    assert {"1 B", "4.0 KiB"} <= set(ticks(figure))


def test_equal_amounts_are_one_bar() -> None:
    with plots.drawing():
        assert bars(plots.amounts_plot([5.0, 5.0, 5.0], "Models by seconds", str))[0] == 1


def test_layers_are_drawn_in_their_order() -> None:
    with plots.drawing():
        sizes, widths = plots.layer_plots([100, 400, 0], [0, 400, 200], [4, 6, 32])
    assert bars(sizes, "second") == pytest.approx([1 / 8, 1, 1 / 4], abs=0.01)
    assert bars(sizes)[:2] == pytest.approx([1 / 4, 1], abs=0.01)
    assert bars(widths) == pytest.approx([4 / 32, 6 / 32, 1], abs=0.01)
    assert LABELS.findall(sizes) == ["Bytes by layer: from 100 B to 800 B"]
    assert LABELS.findall(widths) == ["Bits per weight by layer: from 4 to 32"]


def test_the_page_of_a_batch_has_all_sections(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    nibblecast.report(samples.batch(tmp_path / "batch"), page)
    text = page.read_text("utf-8")
    assert SECTIONS.findall(text) == ["failures", "models", "amounts", "losses"]
    assert "Sizes and times" in text
    assert LABELS.findall(text) == [
        "Models by bytes written: histogram of 8 from 1000 B to 7.8 KiB",
        "Models by seconds: histogram of 8 from 0.1 s to 0.8 s",
    ]


def test_the_page_of_a_batch_of_one_has_no_figures(tmp_path: Path) -> None:
    """Nothing is compared there."""
    batch = tmp_path / "batch"
    batch.mkdir()
    record = samples.Record("a", "0" * 64, "", (samples.Output("a.h", 10, "0" * 64),), seconds=1)
    samples.write_report(batch / samples.REPORT, [record])
    nibblecast.report(batch, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert SECTIONS.findall(text) == ["models"]
    assert not LABELS.findall(text)


def test_the_page_of_a_model_has_a_figure_of_codes_and_of_each_parameter(tmp_path: Path) -> None:
    floats = ROOT / "fixtures" / "tflite" / "mlp_float32.tflite"
    nibblecast.convert(floats, tmp_path / "m.safetensors", quantize="int4,block=8,asymmetric")
    nibblecast.report(tmp_path / "m.safetensors", tmp_path / "page.html")
    labels = LABELS.findall((tmp_path / "page.html").read_text("utf-8"))
    model = nibblecast.load(tmp_path / "m.safetensors")
    weights = [tensor for tensor in model.values() if tensor.quantization is not None]
    assert weights
    for title in ("Codes", "Scales", "Zero points"):
        assert sum(label.startswith(title) for label in labels) == len(weights), labels
