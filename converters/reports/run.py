"""A report from beginning to end: what the source is, its numbers, the page, the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibblecast.converters import pipeline
from nibblecast.converters.errors import MissingDependency, UsageError
from nibblecast.converters.interfaces import Progress
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
    """Raises UsageError where the system refuses (a full disk, say)."""
    try:
        with atomic_outputs([target]) as staged:
            staged.streams[0].write(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror or error}", path=target) from error


def make_report(
    source: Path,
    target: Path | None,
    *,
    reference: Path | None,
    only: Sequence[str],
    skip: Sequence[str],
    title: str | None,
    options: Mapping[Path, Mapping[str, Any]],
    progress: Progress | None,
) -> Report:
    """The report of `source`, written to `target` if there is one; `options` are those of the readers, by file."""
    if target is not None and target.suffix.lower() not in _SUFFIXES:
        raise UsageError("a report is HTML: give it a name that ends in .html", path=target)
    with pipeline.readable(source):
        lines = report_of(source)
    if lines is not None:
        if reference is not None or only or skip or options.get(source):
            raise UsageError("a batch's report takes no --reference, --only, --skip or --opt", path=source)
        with pipeline.readable(lines):
            report = Report(batch_statistics(lines))
    else:
        model = pipeline.read(source, options.get(source))
        compared = None if reference is None else pipeline.read(reference, options.get(reference))
        if target is not None:
            for each in (model, compared):
                if each is not None:
                    pipeline.refuse_input(each, target)
        report = Report(measure(pipeline.select(model, only, skip), compared, progress))
    if target is not None:
        _write(report.html(title), target)
    return report
