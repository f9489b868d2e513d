"""The page about a model."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan

from markupsafe import Markup

from nibblecast.converters.arithmetic.accuracy import Accuracy
from nibblecast.converters.reports import plots
from nibblecast.converters.reports.counts import CodeCounts, Spread
from nibblecast.converters.reports.page import Cell, Column, Detail, Page, Section, Table
from nibblecast.converters.reports.statistics import Layer, ModelStatistics, TensorStatistics
from nibblecast.converters.reports.words import number, percent, shown, thousands
from nibblecast.converters.sizes import bytes_text

_MOST_DETAILS = 256
_MOST_LINES = 200
_LISTED_CODES = 16

_ACCURACY = (Column("Largest error"), Column("Mean square error"), Column("Signal to noise, dB"))


def model_page(statistics: ModelStatistics, title: str | None = None) -> Page:
    """The page."""
    with plots.drawing():
        sections = [_layers(statistics), *_tensors(statistics)]
    if statistics.unmatched:
        sections.append(_unmatched(statistics))
    if statistics.losses:
        sections.append(_losses(statistics))
    made_by = f", made by {shown(statistics.producer)}" if statistics.producer else ""
    compared = "" if statistics.reference is None else f"; compared with {shown(statistics.reference)}"
    return Page(
        title=shown(title or statistics.source or "model"),
        subtitle=f"Format {shown(statistics.format)}{made_by}{compared}",
        figures=list(_figures(statistics)),
        sections=[section for section in sections if section is not None],
    )


def _figures(statistics: ModelStatistics) -> Iterator[tuple[str, str]]:
    whole, quantized = statistics.whole, Layer("", statistics.quantized)
    yield "Tensors", thousands(len(statistics.tensors))
    yield "Quantized", thousands(len(quantized.tensors))
    yield "Elements", thousands(whole.elements)
    yield "Size", bytes_text(whole.bytes)
    yield "Bits per weight", f"{whole.bits_per_weight:.2f}"
    if quantized.tensors:
        yield "Bits per weight, quantized", f"{quantized.bits_per_weight:.2f}"
    if statistics.accuracy is not None:
        yield "Signal to noise", f"{_decibels(statistics.accuracy)} dB"
        yield "Largest error", number(statistics.accuracy.max_error)


def _decibels(accuracy: Accuracy) -> str:
    noise = accuracy.signal_to_noise
    return "not finite" if isnan(noise) else "∞" if noise == float("inf") else f"{noise:.1f}"


def _layers(statistics: ModelStatistics) -> Section | None:
    layers = statistics.layers
    if not layers:
        return None
    rows = [
        [
            Cell(shown(layer.name)),
            Cell(str(position)),
            Cell(str(len(layer.tensors))),
            Cell(thousands(layer.elements), layer.elements),
            Cell(bytes_text(layer.bytes), layer.bytes),
            Cell(f"{layer.bytes / max(1, statistics.whole.bytes):.1%}", layer.bytes),
            Cell(f"{layer.bits_per_weight:.2f}", layer.bits_per_weight),
        ]
        for position, layer in enumerate(layers, 1)
    ]
    drawn = plots.layer_plots(
        [layer.quantized_bytes for layer in layers],
        [layer.bytes - layer.quantized_bytes for layer in layers],
        [layer.bits_per_weight for layer in layers],
    )
    columns = [Column("Layer", numbers=False)]
    columns += map(Column, ("Number", "Tensors", "Elements", "Size", "Share", "Bits per weight"))
    return Section(
        "layers",
        "Size by layer",
        text="Scales and other parameters included. What is not quantized is grey; layers are numbered as below.",
        plots=drawn,
        table=Table("layer-table", "Size by layer", columns, rows),
    )


def _tensors(statistics: ModelStatistics) -> Iterator[Section]:
    if not statistics.tensors:
        return
    detailed = sorted(statistics.quantized, key=lambda tensor: -tensor.elements)[:_MOST_DETAILS]
    anchors = {tensor.name: f"tensor-{position}" for position, tensor in enumerate(statistics.tensors, 1)}
    anchors = {tensor.name: anchors[tensor.name] for tensor in detailed}
    columns = [Column(title, numbers=False) for title in ("Tensor", "Shape", "Dtype", "Granularity")]
    columns += map(Column, ("Size", "Bits per weight", "Unused codes", "At lowest", "At highest"))
    columns += map(Column, ("Smallest scale", "Largest scale"))
    columns += _ACCURACY if statistics.reference is not None else ()
    rows = [
        [
            *_tensor_cells(tensor, anchors.get(tensor.name, "")),
            *(_accuracy_cells(tensor.accuracy) if statistics.reference is not None else ()),
        ]
        for tensor in statistics.tensors
    ]
    yield Section(
        "tensors",
        "Tensors",
        table=Table("tensor-table", "Tensors", columns, rows, search="Search tensors"),
    )
    if detailed:
        few = len(detailed) < len(statistics.quantized)
        yield Section(
            "codes",
            "Codes and scales",
            text=f"Of the {len(detailed)} largest quantized tensors; --json has all." if few else "",
            details=[_detail(tensor, anchors[tensor.name]) for tensor in statistics.tensors if tensor.name in anchors],
        )


def _tensor_cells(tensor: TensorStatistics, anchor: str) -> Iterator[Cell]:
    yield Cell(shown(tensor.name), anchor=anchor)
    yield Cell(_shape(tensor), tensor.elements)
    yield Cell(shown(tensor.dtype))
    yield Cell("" if tensor.granularity == "none" else tensor.granularity)
    yield Cell(bytes_text(tensor.bytes), tensor.bytes)
    yield Cell(f"{tensor.bits_per_weight:.2f}", tensor.bits_per_weight)
    codes, scale = tensor.codes, tensor.scale
    if codes is None:
        yield from (Cell(""),) * 3
    else:
        yield Cell(f"{codes.unused} of {len(codes.values)}", codes.unused)
        for share in (codes.lowest_share, codes.highest_share):
            yield Cell(percent(share), share)
    if scale is None:
        yield from (Cell(""),) * 2
    else:
        for value in (scale.lowest, scale.highest):
            yield Cell(number(value), "" if isnan(value) else value)


def _shape(tensor: TensorStatistics) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _accuracy_cells(accuracy: Accuracy | None) -> Iterator[Cell]:
    if accuracy is None:
        yield from (Cell(""),) * 3
        return
    for value in (accuracy.max_error, accuracy.mean_square_error):
        yield Cell(number(value), "" if isnan(value) else value)
    noise = accuracy.signal_to_noise
    # Number() of JavaScript reads Infinity, not inf
    order = "" if isnan(noise) else "Infinity" if noise == float("inf") else noise
    yield Cell(_decibels(accuracy), order)


def _detail(tensor: TensorStatistics, anchor: str) -> Detail:
    codes = tensor.codes
    listed = codes is not None and len(codes.values) <= _LISTED_CODES
    return Detail(
        anchor,
        f"{shown(tensor.name)} · {shown(tensor.dtype)} · {_shape(tensor)}",
        facts=list(_facts(tensor)),
        plots=list(_plots(tensor)),
        counts=[(number(value), thousands(count)) for value, count in zip(codes.values, codes.counts, strict=True)]
        if codes is not None and listed
        else (),
    )


def _plots(tensor: TensorStatistics) -> Iterator[Markup]:
    if tensor.codes is not None:
        yield plots.codes_plot(tensor.codes, "Codes")
    if tensor.scale is not None and tensor.scale.count > 1 and tensor.scale.bins:
        yield plots.spread_plot(tensor.scale, "Scales, absolute" if tensor.scale.negative else "Scales")
    zero_points = tensor.zero_point_codes
    if zero_points is not None and len(zero_points.counts) - zero_points.unused > 1:
        yield plots.codes_plot(zero_points, "Zero points")


def _facts(tensor: TensorStatistics) -> Iterator[tuple[str, str]]:
    yield "Granularity", tensor.granularity
    yield from _code_facts(tensor.codes) if tensor.codes is not None else ()
    for name, spread in (("Scales", tensor.scale), ("Zero points", tensor.zero_point)):
        if spread is not None:
            yield from _spread_facts(name, spread)
    if tensor.accuracy is not None:
        yield "Largest error", number(tensor.accuracy.max_error)
        yield "Mean square error", number(tensor.accuracy.mean_square_error)
        yield "Signal to noise", f"{_decibels(tensor.accuracy)} dB"


def _code_facts(codes: CodeCounts) -> Iterator[tuple[str, str]]:
    yield "Unused codes", f"{codes.unused} of {len(codes.values)}"
    yield f"At the lowest code, {number(codes.values[0])}", percent(codes.lowest_share)
    yield f"At the highest code, {number(codes.values[-1])}", percent(codes.highest_share)
    if codes.not_finite:
        yield "NaN or infinite", thousands(codes.not_finite)


def _spread_facts(name: str, spread: Spread) -> Iterator[tuple[str, str]]:
    yield name, thousands(spread.count)
    if spread.lowest < spread.highest:
        yield f"{name}, range", f"{number(spread.lowest)} to {number(spread.highest)}"
        yield f"{name}, mean", number(spread.mean)
    elif spread.lowest == spread.highest:
        yield f"{name}, all", number(spread.lowest)
    for what, count in (("zero", spread.zeros if name == "Scales" else 0), ("not finite", spread.not_finite)):
        if count:
            yield f"{name}, {what}", thousands(count)


def _unmatched(statistics: ModelStatistics) -> Section:
    return Section(
        "unmatched",
        "Not in the reference",
        text="The reference has no tensor of the same name and shape, or its values cannot be compared:",
        details=[Detail("unmatched-names", _counted(statistics.unmatched, "tensor"), lines=_few(statistics.unmatched))],
    )


def _losses(statistics: ModelStatistics) -> Section:
    lines = [str(loss) for loss in statistics.losses]
    return Section(
        "losses",
        "Not read as it is stored",
        details=[Detail("loss-lines", _counted(lines, "entry", "entries"), lines=_few(lines))],
    )


def _counted(items: tuple[str, ...] | list[str], one: str, several: str = "") -> str:
    return f"{len(items)} {one if len(items) == 1 else several or one + 's'}"


def _few(lines: tuple[str, ...] | list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return [shown(line) for line in lines[:_MOST_LINES]] + ([f"and {more} more: --json has all"] if more > 0 else [])
