"""Where each model's outputs go: the folders of the sources mirrored, one name for each, none of them twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import plugins
from converters.batches.jobs import Job, Request
from converters.batches.records import REPORT
from converters.batches.sources import Source
from converters.errors import UsageError


def planned_jobs(
    sources: Sequence[Source], folder: Path, formats: Sequence[str], request: Request, destination: str = ""
) -> list[Job]:
    """A job for each source, which writes to `folder`, or to the URL `destination` under the same names. Raises
    UsageError where two outputs have the same name, and for formats that are not there, or cannot be written."""
    writers = {name: plugins.format_named(name) for name in dict.fromkeys(formats)}
    folder = folder if destination else folder.absolute()
    jobs, taken = [], {folder / REPORT: "the report"}
    for source in sources:
        targets = tuple(
            (
                name,
                plugins.target_in(
                    format, folder / source.name, _own(request.options, name), is_folder=source.is_folder
                ),
            )
            for name, format in writers.items()
        )
        for _, target in targets:
            if target in taken:
                raise UsageError(
                    f"would be written for {source.name} and for {taken[target]}: leave one of them out with --exclude",
                    path=target,
                )
            taken[target] = source.name
        jobs.append(Job(source.path, source.name, folder, targets, request, source.remote, destination))
    _refuse_nested(taken, folder)
    return jobs


def _refuse_nested(taken: Mapping[Path, str], folder: Path) -> None:
    """An output that is a folder cannot be around another output."""
    for target, name in taken.items():
        around = next((parent for parent in target.parents if parent != folder and parent in taken), None)
        if around is not None:
            raise UsageError(
                f"is the output of {taken[around]}, in which that of {name} would lie: leave one of them out with "
                "--exclude",
                path=around,
            )


def _own(options: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The options as the format's writer calls them."""
    return {key.removeprefix(f"{format}."): value for key, value in options.items()}
