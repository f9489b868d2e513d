"""The page about a batch."""

from __future__ import annotations

from collections.abc import Iterator

from nibblecast.converters.batches.records import Record
from nibblecast.converters.errors import ExitCode
from nibblecast.converters.reports import plots
from nibblecast.converters.reports.batches import BatchStatistics, output_bytes
from nibblecast.converters.reports.page import Cell, Column, Detail, Page, Section, Table
from nibblecast.converters.reports.words import seconds_text, shown, thousands
from nibblecast.converters.sizes import bytes_text

_LONGEST_MESSAGE = 500
_MOST_LINES = 50
_FEWEST_FOR_PLOTS = 2


def batch_page(statistics: BatchStatistics, title: str | None = None) -> Page:
    """The page."""
    versions = sorted({record.nibblecast for record in statistics.records if record.nibblecast})
    return Page(
        title=shown(title or statistics.source or "batch"),
        subtitle=f"A batch of nibblecast {', '.join(map(shown, versions))}",
        figures=list(_figures(statistics)),
        sections=list(_sections(statistics)),
    )


def _figures(statistics: BatchStatistics) -> Iterator[tuple[str, str]]:
    yield "Models", thousands(len(statistics.records))
    yield "Converted", thousands(len(statistics.records) - len(statistics.failed))
    yield "Failed", thousands(len(statistics.failed))
    yield "Verified", thousands(sum(record.verified is True for record in statistics.records))
    yield "Not kept or changed", thousands(statistics.losses)
    yield "Written", bytes_text(statistics.bytes)
    yield "Time, added up", seconds_text(statistics.seconds)
    if statistics.peak_memory is not None:
        yield "Largest peak memory", bytes_text(statistics.peak_memory)


def _sections(statistics: BatchStatistics) -> Iterator[Section]:
    if statistics.failed:
        columns = [Column("Meaning", numbers=False), Column("Exit code"), Column("Models")]
        rows = [
            [Cell(_meaning(code)), Cell(str(code)), Cell(thousands(count), count)]
            for code, count in statistics.exit_codes.items()
        ]
        yield Section("failures", "Failures", table=Table("failure-table", "Failures", columns, rows))
    yield _models(statistics)
    drawn = [record for record in statistics.records if record.done and output_bytes(record) and record.seconds > 0]
    if len(drawn) >= _FEWEST_FOR_PLOTS:
        with plots.drawing():
            yield Section(
                "amounts",
                "Sizes and times",
                text="Of the models that were converted. The axes of bytes and seconds are logarithmic.",
                plots=[
                    plots.amounts_plot([output_bytes(r) for r in drawn], "Models by bytes written", bytes_text),
                    plots.amounts_plot([r.seconds for r in drawn], "Models by seconds", seconds_text),
                ],
            )
    lossy = [record for record in statistics.records if record.losses]
    if lossy:
        yield Section(
            "losses", "Not kept or changed", details=[_losses(r, f"loss-{i}") for i, r in enumerate(lossy, 1)]
        )


def _meaning(exit_code: int) -> str:
    known = exit_code in ExitCode.__members__.values()
    return ExitCode(exit_code).name.replace("_", " ").lower() if known else "unknown"


def _models(statistics: BatchStatistics) -> Section:
    columns = [Column("Model", numbers=False), Column("Status", numbers=False)]
    if statistics.failed:
        columns += [Column("Exit code"), Column("Error", numbers=False, sentences=True)]
    columns += map(Column, ("Written", "Seconds", "Peak memory", "Attempts", "Not kept or changed"))
    columns.append(Column("Verified", numbers=False))
    rows = [list(_cells(record, with_errors=bool(statistics.failed))) for record in statistics.records]
    return Section("models", "Models", table=Table("model-table", "Models", columns, rows, search="Search models"))


def _cells(record: Record, *, with_errors: bool) -> Iterator[Cell]:
    failure, nbytes = record.failure, output_bytes(record)
    yield Cell(shown(record.source))
    yield Cell("done" if failure is None else "failed", bad=failure is not None)
    if with_errors:
        yield Cell("" if failure is None else str(failure.exit_code))
        yield Cell("" if failure is None else shown(failure.message, _LONGEST_MESSAGE))
    yield Cell(bytes_text(nbytes), nbytes) if record.outputs else Cell("")
    yield Cell(f"{record.seconds:.3g}", record.seconds)
    yield Cell("") if record.peak_memory is None else Cell(bytes_text(record.peak_memory), record.peak_memory)
    yield Cell(str(record.attempts))
    yield Cell(str(len(record.losses)))
    yield Cell("" if record.verified is None else "yes" if record.verified else "no")


def _losses(record: Record, anchor: str) -> Detail:
    lines = [
        shown(f"{loss.get('tensor') or 'the model'}: {loss.get('kind', '')}: {loss.get('detail', '')}")
        for loss in record.losses[:_MOST_LINES]
    ]
    more = len(record.losses) - len(lines)
    return Detail(
        anchor,
        f"{shown(record.source)} · {len(record.losses)}",
        lines=lines + ([f"and {more} more: --json has all"] if more else []),
    )
