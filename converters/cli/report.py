"""`nibblecast report SRC -o FILE.html`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nibblecast.converters.cli.arguments import (
    Json,
    Quiet,
    ReaderOptions,
    human_bytes,
    key_values,
    path,
    print_json,
    progress_bar,
)
from nibblecast.converters.errors import MOST_OF_PATH, UsageError, line


def report(
    source: Annotated[
        str,
        typer.Argument(help="A model, or a batch (its target folder or its report).", show_default=False, parser=path),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The HTML file to write.", show_default=False, parser=path)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The float model to measure errors against.", show_default=False, parser=path),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title (default: the source's name).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Include only tensors whose names match this pattern.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out tensors whose names match this pattern.")] = None,
    opt: ReaderOptions = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page about a model or a batch: sizes, histograms of codes, scales, errors. It loads nothing else.

    With --json the numbers are printed, and the page is optional.
    """
    if output is None and not json:
        raise UsageError("nothing to write: add -o FILE.html or --json")
    from nibblecast.converters.reports.run import report as make_report

    with progress_bar("report", quiet=quiet or json) as progress:
        made = make_report(
            source,
            output,
            reference=reference,
            only=only or (),
            skip=skip or (),
            title=title,
            progress=progress,
            **key_values(opt or ()),
        )
    if json:
        print_json(made.document())
    elif output is not None and not quiet:
        print(f"{line(output, MOST_OF_PATH)} ({human_bytes(Path(output).stat().st_size)})")
