"""Writes a report: detects the kind of the source, takes its numbers, and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibblecast.converters import pipeline
from nibblecast.converters.errors import MissingDependency, UsageError
from nibblecast.converters.input.paths import AnyPath, input_path, output_path
from nibblecast.converters.interfaces import Progress
from nibblecast.converters.option_routing import reader_options
from nibblecast.converters.output.atomic import atomic_outputs
from nibblecast.converters.reports.batches import BatchStatistics, batch_statistics, report_of
from nibblecast.converters.reports.documents import model_document
from nibblecast.converters.reports.statistics import ModelStatistics, measure

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True)
class Report:
    """The numbers of a model or of a batch."""

    statistics: ModelStatistics | BatchStatistics

    def document(self) -> dict[str, Any]:
        """The numbers as JSON can hold them."""
        found = self.statistics
        return found.document() if isinstance(found, BatchStatistics) else model_document(found)

    def html(self, title: str | None = None) -> str:
        """The page. Raises MissingDependency without the packages of the extra `report`."""
        try:
            from nibblecast.converters.reports.batch_page import batch_page
            from nibblecast.converters.reports.model_page import model_page
            from nibblecast.converters.reports.page import render
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            message = f"a page needs the package '{package}': pip install 'nibblecast[report]'"
            raise MissingDependency(message) from error
        found = self.statistics
        return render(batch_page(found, title) if isinstance(found, BatchStatistics) else model_page(found, title))


def _write(page: str, target: Path) -> None:
    """Raises UsageError if the system refuses, e.g. for a full disk."""
    try:
        with atomic_outputs([target]) as staged:
            staged.streams[0].write(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror or error}", path=target) from error


def report(
    source: AnyPath,
    target: AnyPath | None = None,
    *,
    reference: AnyPath | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    title: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Measures a model, or sums up a batch (its target folder or its report), and writes a page about it to `target`,
    an HTML file, if there is one; `document()` of the result gives the numbers.

    `reference` is a model with the floats that the codes stand for, by the same names; `only` and `skip` are shell
    patterns of tensor names; `options` are the readers' own. Raises nibblecast.Error: MissingDependency where the page
    needs `pip install 'nibblecast[report]'`.
    """
    paths = [input_path(path) for path in (source, reference) if path is not None]
    read_with = reader_options(options, paths) if options else {}
    page = None if target is None else output_path(target)
    if page is not None and page.suffix.lower() not in _SUFFIXES:
        raise UsageError("a report is HTML: give it a name that ends in .html", path=page)
    with pipeline.readable(paths[0]):
        lines = report_of(paths[0])
    if lines is not None:
        if reference is not None or only or skip or read_with.get(paths[0]):
            raise UsageError(
                "--reference, --only, --skip and --opt do not apply to the report of a batch", path=paths[0]
            )
        with pipeline.readable(lines):
            made = Report(batch_statistics(lines))
    else:
        model, *compared = [pipeline.read(path, read_with.get(path)) for path in paths]
        if page is not None:
            for each in (model, *compared):
                pipeline.refuse_input(each, page)
        made = Report(measure(pipeline.select(model, only, skip), compared[0] if compared else None, progress))
    if page is not None:
        _write(made.html(title), page)
    return made
