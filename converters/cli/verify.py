"""`nibblecast verify A B`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nibblecast.converters import conversion
from nibblecast.converters.cli.arguments import (
    Json,
    ReaderOptions,
    cell,
    key_values,
    path,
    print_json,
    progress_bar,
    table_console,
)
from nibblecast.converters.compare.comparison import Comparison
from nibblecast.converters.compare.running import OutputDifference, compare_outputs
from nibblecast.converters.errors import ExitCode, line

_SHOWN = 50
_FEW_STEPS = 3  # how far LiteRT's own kernels are from each other


def verify(
    a: Annotated[str, typer.Argument(help="A model file.", show_default=False, parser=path)],
    b: Annotated[str, typer.Argument(help="The model file to compare with it.", show_default=False, parser=path)],
    run: Annotated[bool, typer.Option("--run", help="Run both models and compare their outputs.")] = False,
    given: Annotated[
        str | None,
        typer.Option("--input", help="With --run: an .npz file of inputs by name (default: random).", parser=path),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --run: the seed of the random inputs.")] = 0,
    tolerance: Annotated[
        float, typer.Option(help="With --run: the largest difference allowed, relative to the largest value.")
    ] = 0.02,
    opt: ReaderOptions = None,
    json: Json = False,
) -> None:
    """Compare two models: code for code where both are quantized, value for value otherwise. Exit 6 if they differ."""
    if run:
        _compare_outputs(a, b, given, seed, tolerance, json)
        return
    with progress_bar("verify", quiet=json) as progress:
        comparison = conversion.verify(a, b, progress=progress, **key_values(opt or ()))
    if json:
        _print_json(comparison)
    else:
        _print(comparison)
    if not comparison.equal:
        raise typer.Exit(ExitCode.VERIFICATION_FAILED)


def _compare_outputs(a: str, b: str, given: str | None, seed: int, tolerance: float, json: bool) -> None:
    outputs = compare_outputs(a, b, inputs=given, seed=seed)
    bad = [output for output in outputs if not _is_near(output, tolerance)]
    if json:
        print_json({"near": not bad, "outputs": [_output_document(output, tolerance) for output in outputs]})
    else:
        for output in outputs:
            steps = "" if output.steps is None else f", {output.steps:g} quantization steps"
            verdict = "  <- too far" if output in bad else ""
            print(
                f"{line(output.name)}: apart by {output.largest:.3g} at most{steps}, by {output.mean:.3g} on "
                f"average; the largest value is {output.scale_of_values:.3g}{verdict}"
            )
    if bad:
        raise typer.Exit(ExitCode.VERIFICATION_FAILED)


def _is_near(output: OutputDifference, tolerance: float) -> bool:
    return output.relative <= tolerance or (output.steps is not None and output.steps <= _FEW_STEPS)


def _output_document(output: OutputDifference, tolerance: float) -> dict[str, Any]:
    return {
        "name": output.name,
        "shape": list(output.shape),
        "largest_difference": output.largest,
        "mean_difference": output.mean,
        "largest_value": output.scale_of_values,
        "quantization_steps": output.steps,
        "near": _is_near(output, tolerance),
    }


def _print(comparison: Comparison) -> None:
    if comparison.equal:
        print(
            f"equal: {comparison.tensors} tensors, {comparison.elements} elements, "
            f"{comparison.quantized} of the tensors code for code"
        )
        return
    from rich.table import Table

    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "what differs", "places", "the first ones"):
        table.add_column(column, overflow="fold")
    for difference in comparison.differences[:_SHOWN]:
        table.add_row(*map(cell, (difference.tensor, difference.kind, str(difference.count or ""), difference.detail)))
    console.print(table)
    more = len(comparison.differences) - _SHOWN
    if more > 0:
        print(f"… and {more} more; --json lists all")
    print(f"different: {len(comparison.differences)} differences in {comparison.tensors} common tensors")


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
