"""Where each model's outputs go: in the same folders as the sources, each under a unique name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nibblecast.converters import plugins
from nibblecast.converters.batches.job import Job, Request
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.batches.sources import Source
from nibblecast.converters.errors import UsageError
from nibblecast.converters.option_routing import options_of


def planned_jobs(
    sources: Sequence[Source], folder: Path, formats: Sequence[str], request: Request, destination: str = ""
) -> list[Job]:
    """A job for each source, which writes to `folder`, or to the URL `destination` under the same names. Raises
    UsageError where two outputs have the same name, and for formats that are not there, or cannot be written."""
    writers = {name: plugins.format_named(name) for name in dict.fromkeys(formats)}
    folder = folder if destination else folder.absolute()
    jobs, taken = [], {str(folder / REPORT): "the report"}
    for source in sources:
        _refuse_outside(source)
        targets = tuple(
            (
                name,
                plugins.target_in(
                    format, folder / source.name, options_of(request.options, name), is_folder=source.is_folder
                ),
            )
            for name, format in writers.items()
        )
        for _, target in targets:
            if str(target) in taken:
                raise UsageError(
                    f"would be written for {source.name} and for {taken[str(target)]}: "
                    "leave one of them out with --exclude",
                    path=target,
                )
            taken[str(target)] = source.name
        jobs.append(Job(source.path, source.name, folder, targets, request, source.remote, destination))
    _refuse_nested(taken, folder)
    return jobs


def _refuse_outside(source: Source) -> None:
    """Outputs are named by the sources' names, which must not lead out of the target."""
    if source.name.startswith("/") or "\0" in source.name or ".." in source.name.split("/"):
        raise UsageError(
            f"the output of {source.path} would be '{source.name}' below the target, which is outside of it: give the "
            "path of the source without '..'"
        )


def _refuse_nested(taken: Mapping[str, str], folder: Path) -> None:
    """An output that is a folder cannot be around another output. Paths are text here, of which there may be many."""
    for target, name in taken.items():
        around = target.rpartition(os.sep)[0]
        while len(around) > len(str(folder)):
            if around in taken:
                raise UsageError(
                    f"is the output of {taken[around]}, in which that of {name} would lie: leave one of them out with "
                    "--exclude",
                    path=Path(around),
                )
            around = around.rpartition(os.sep)[0]
