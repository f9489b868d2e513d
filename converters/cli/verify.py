"""`nibblecast verify A B`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from converters import api
from converters.cli.arguments import Json, print_json, progress_bar, table_console
from converters.comparison import Comparison
from converters.errors import ExitCode, printable

_SHOWN = 50


def verify(
    a: Annotated[Path, typer.Argument(help="A model file.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The model file to compare it with.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare two models: code for code where both are quantized, value for value otherwise. Exit 6 when different."""
    with progress_bar("verify", quiet=json) as progress:
        comparison = api.verify(a, b, progress=progress)
    if json:
        _print_json(comparison)
    else:
        _print(comparison)
    if not comparison.equal:
        raise typer.Exit(ExitCode.VERIFICATION_FAILED)


def _print(comparison: Comparison) -> None:
    if comparison.equal:
        print(
            f"equal: {comparison.tensors} tensors, {comparison.elements} elements, "
            f"{comparison.quantized} of the tensors code for code"
        )
        return
    from rich.table import Table
    from rich.text import Text

    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "what differs", "places", "the first ones"):
        table.add_column(column, overflow="fold")
    for difference in comparison.differences[:_SHOWN]:
        table.add_row(
            Text(printable(difference.tensor)),
            difference.kind,
            str(difference.count or ""),
            Text(printable(difference.detail)),
        )
    console.print(table)
    more = len(comparison.differences) - _SHOWN
    if more > 0:
        console.print(f"… and {more} more; --json lists all")
    console.print(f"different: {len(comparison.differences)} differences in {comparison.tensors} common tensors")


def _print_json(comparison: Comparison) -> None:
    print_json(
        {
            "equal": comparison.equal,
            "tensors": comparison.tensors,
            "code_for_code": comparison.quantized,
            "elements": comparison.elements,
            "differences": [
                {"tensor": d.tensor, "kind": d.kind, "places": d.count, "detail": d.detail}
                for d in comparison.differences
            ],
        }
    )
