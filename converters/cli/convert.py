"""`nibblecast convert SRC DST...`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibblecast.converters import conversion as conversions
from nibblecast.converters.cli.arguments import (
    Json,
    Quiet,
    Source,
    cell,
    float_dtype,
    human_bytes,
    key_values,
    loss_document,
    path,
    print_json,
    progress_bar,
    shown_loss,
    table_console,
)
from nibblecast.converters.errors import MOST_OF_MESSAGE, MOST_OF_PATH, line
from nibblecast.converters.interfaces import OutputFile

if TYPE_CHECKING:
    from nibblecast.converters.arithmetic.accuracy import Accuracy

_SHOWN_LINES = 10
_SHOWN_TENSORS = 10


def convert(
    source: Source,
    targets: Annotated[
        list[str], typer.Argument(help="The files or folders to write; each suffix selects a format.", parser=path)
    ],
    to: Annotated[str | None, typer.Option(help="The format to write, if the suffix does not select one.")] = None,
    dequantize: Annotated[
        str | None, typer.Option(help="Turn codes into plain floats: float32 (the default), float16 or bfloat16.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Turn float weights into codes, e.g. int4,block=32 or int8,per-channel,mse.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Convert only tensors whose names match this pattern.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out tensors whose names match this pattern.")] = None,
    opt: Annotated[list[str] | None, typer.Option(help="key=value: an option of the reader or the writer.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read the outputs and compare every value.")] = False,
    fail_on_loss: Annotated[
        bool, typer.Option("--fail-on-loss", help="Fail if anything is not kept or changed (exit 5).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that an interrupted run completed.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model to one or several files, reading it once."""
    dtype = float_dtype(dequantize)
    with progress_bar("convert", quiet=quiet or json) as progress:
        conversion = conversions.convert(
            source,
            *targets,
            to=to,
            dequantize=dtype,
            quantize=quantize,
            only=only or (),
            skip=skip or (),
            verify=verify,
            fail_on_loss=fail_on_loss,
            dry_run=dry_run,
            resume=resume,
            progress=progress,
            **key_values(opt or ()),
        )
    if json:
        print_json(_document(conversion, dry_run))
    elif not quiet:
        _print(conversion, dry_run)


def _print(conversion: conversions.Conversion, dry_run: bool) -> None:
    for output, files in _by_output(conversion).items():
        verb, nbytes = "would write" if dry_run else "wrote", [file.nbytes for file in files]
        size = human_bytes(None if None in nbytes else sum(each or 0 for each in nbytes))
        count = f"{len(files)} files, " if files[0].folder is not None else ""
        print(f"{verb} {line(str(output), MOST_OF_PATH)} ({count}{size})")
    for target, comparison in conversion.verified.items():
        shown = line(str(target), MOST_OF_PATH)
        if comparison is None:
            print(f"not verified: {shown} (its format has no reader)")
        else:
            print(
                f"verified {shown}: {comparison.tensors} tensors, {comparison.elements} elements, "
                f"{comparison.quantized} of the tensors code for code"
            )
    if conversion.quantized:
        _print_accuracy(conversion.quantized)
    for text in conversion.report:
        print(line(text, MOST_OF_MESSAGE))
    _print_some([f"note: {line(note, MOST_OF_MESSAGE)}" for note in conversion.notes], "note")
    _print_some([shown_loss(loss) for loss in conversion.losses], "not kept or changed")


def _print_some(lines: Sequence[str], word: str) -> None:
    for text in lines[:_SHOWN_LINES]:
        print(text, file=sys.stderr)
    if len(lines) > _SHOWN_LINES:
        print(f"{word}: {len(lines) - _SHOWN_LINES} more; --json lists all", file=sys.stderr)


def _by_output(conversion: conversions.Conversion) -> dict[Path, list[OutputFile]]:
    """The files, those of a folder under its name."""
    outputs: dict[Path, list[OutputFile]] = {}
    for file in conversion.files:
        outputs.setdefault(file.folder or file.path, []).append(file)
    return outputs


def _print_accuracy(quantized: Sequence[Accuracy]) -> None:
    """The tensors with the lowest signal-to-noise ratio, and all of them together."""
    from rich.table import Table

    from nibblecast.converters.arithmetic.accuracy import Accuracy

    table = Table(box=None, pad_edge=False)
    for column in ("quantized", "to"):
        table.add_column(column, overflow="fold")
    for column in ("largest error", "mean square error", "signal to noise"):
        table.add_column(column, justify="right")
    worst = sorted(quantized, key=lambda each: each.signal_to_noise)[:_SHOWN_TENSORS]
    total = replace(Accuracy.total(quantized), tensor=f"all {len(quantized)} tensors")
    for each in (*worst, total) if len(quantized) > 1 else worst:
        figures = f"{each.max_error:.3g}", f"{each.mean_square_error:.3g}", f"{each.signal_to_noise:.1f} dB"
        table.add_row(*map(cell, (each.tensor, each.kind, *figures)))
    table_console().print(table)
    if len(quantized) > len(worst):
        print(f"{len(worst)} of {len(quantized)} tensors, the worst first; --json lists all")


def _document(conversion: conversions.Conversion, dry_run: bool) -> dict[str, Any]:
    return {
        "source": str(conversion.source),
        "dry_run": dry_run,
        "files": [{"path": str(file.path), "bytes": file.nbytes} for file in conversion.files],
        "losses": [loss_document(loss) for loss in conversion.losses],
        "notes": list(conversion.notes),
        "report": list(conversion.report),
        "quantized": [
            {
                "tensor": each.tensor,
                "to": each.kind,
                "elements": each.elements,
                "max_error": each.max_error,
                "mean_square_error": each.mean_square_error,
                "signal_to_noise_db": each.signal_to_noise if isfinite(each.signal_to_noise) else None,
            }
            for each in conversion.quantized
        ],
        "verified": [
            {
                "path": str(path),
                "readable": comparison is not None,
                "tensors": comparison.tensors if comparison else 0,
                "elements": comparison.elements if comparison else 0,
                "code_for_code": comparison.quantized if comparison else 0,
            }
            for path, comparison in conversion.verified.items()
        ],
    }
