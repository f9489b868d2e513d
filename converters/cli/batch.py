"""`nibblecast batch SRC DST --to NAME`"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from nibblecast.converters.cli.arguments import (
    Json,
    Quiet,
    cell,
    float_dtype,
    human_bytes,
    key_values,
    print_json,
    table_console,
)
from nibblecast.converters.errors import MOST_OF_MESSAGE, MOST_OF_PATH, ExitCode, line
from nibblecast.converters.options import parse_size

if TYPE_CHECKING:
    from nibblecast.converters.batches.records import Record
    from nibblecast.converters.batches.run import BatchResult, OnResult, OnRunning

_SHOWN_FAILURES = 50


def batch(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of models or its URL, or a text file (- for stdin) with one path or URL per line."
        ),
    ],
    target: Annotated[str, typer.Argument(help="The folder to write to, or its URL.", show_default=False)],
    to: Annotated[list[str], typer.Option(help="The format to write; repeat it for several formats.")],
    include: Annotated[
        list[str] | None, typer.Option(help="Convert only sources whose path matches this pattern.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out sources whose path matches this pattern.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Parallel jobs (default: one per processor).")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Time limit per model, in seconds.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory limit per model, e.g. 4G (memory-mapped files not counted).")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(help="Where jobs run: dask://HOST:PORT, or dask for a local cluster (default: local processes)."),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Retries after failures that may be temporary.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Skip models that are converted and unchanged.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    dequantize: Annotated[str | None, typer.Option(help="As in `convert`.")] = None,
    quantize: Annotated[str | None, typer.Option(help="As in `convert`.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="As in `convert`.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="As in `convert`.")] = None,
    opt: Annotated[list[str] | None, typer.Option(help="key=value: an option of the readers or writers.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-read the outputs and compare every value.")] = False,
    fail_on_loss: Annotated[bool, typer.Option("--fail-on-loss", help="As in `convert`.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written and its size; write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert every model of a folder and write a report of the results. Exit code 7 if any model failed."""
    from nibblecast.converters.batches import run

    dtype = float_dtype(dequantize)
    settings = run.BatchSettings(
        jobs=jobs,
        timeout=timeout,
        memory=None if memory is None else parse_size(memory, "--memory"),
        retries=retries,
        resume=resume,
        fail_fast=fail_fast,
        dry_run=dry_run,
        executor=executor,
    )
    if executor is not None:
        _silence_dask()
    with _progress(quiet=quiet or json) as (on_result, on_running):
        result = run.batch(
            source,
            target,
            to,
            include=include or (),
            exclude=exclude or (),
            dequantize=dtype,
            quantize=quantize,
            only=only or (),
            skip=skip or (),
            verify=verify,
            fail_on_loss=fail_on_loss,
            settings=settings,
            on_result=on_result,
            on_running=on_running,
            **key_values(opt or ()),
        )
    if json:
        print_json(_document(result))
    elif not quiet:
        _print(result, dry_run=dry_run)
    if result.failed:
        raise typer.Exit(ExitCode.BATCH_FAILED)


def _silence_dask() -> None:
    """What Dask logs of lost workers and connections is told by records."""
    import logging

    with suppress(ImportError):  # it sets its loggers up when it is imported
        import distributed  # noqa: F401
    for name in ("asyncio", "distributed", "distributed.client", "tornado", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[OnResult | None, OnRunning | None]]:
    """A bar on a terminal, with a line for each worker below it; a line for each model in a log."""
    if quiet:
        yield None, None
        return
    if not sys.stderr.isatty():
        with _log() as log:
            yield log
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (TextColumn("batch"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns)
    task = bar.add_task("batch", total=None)
    with Live(bar, console=Console(stderr=True), transient=True, refresh_per_second=5) as live:

        def on_result(record: Record, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not record.done:
                live.console.print(_line(record), markup=False, highlight=False)

        def on_running(names: Sequence[str]) -> None:
            lines = (Text(f"  {line(name)}", overflow="ellipsis", no_wrap=True) for name in names)
            live.update(Group(bar, *lines))

        yield on_result, on_running


@contextmanager
def _log() -> Iterator[tuple[OnResult, OnRunning]]:
    """Lines that come together are written together: small models are done within a millisecond."""
    lines: list[str] = []

    def on_result(record: Record, done: int, total: int) -> None:
        if not record.kept:
            lines.append(f"{done}/{total} {_line(record)}\n")

    def on_running(_: Sequence[str]) -> None:
        if lines:
            print("".join(lines), file=sys.stderr, end="", flush=True)
            lines.clear()

    try:
        yield on_result, on_running
    finally:
        on_running(())


def _line(record: Record) -> str:
    if record.failure is not None:
        return f"failed: {line(record.failure.message, MOST_OF_MESSAGE)}"
    nbytes = human_bytes(sum(output.bytes for output in record.outputs))
    return f"done: {line(record.source, MOST_OF_PATH)} ({nbytes}, {record.seconds:.1f} s)"


def _print(result: BatchResult, *, dry_run: bool) -> None:
    from rich.table import Table

    if result.failed:
        table = Table(box=None, pad_edge=False)
        for column in ("failed", "exit code", "why"):
            table.add_column(column, overflow="fold", justify="right" if column == "exit code" else "left")
        for record in result.failed[:_SHOWN_FAILURES]:
            if record.failure is not None:
                code, why = str(record.failure.exit_code), record.failure.message
                table.add_row(cell(record.source), cell(code), cell(why, MOST_OF_MESSAGE))
        table_console().print(table)
    if len(result.failed) > _SHOWN_FAILURES:
        print(f"and {len(result.failed) - _SHOWN_FAILURES} more; the report lists all")
    verb = "would be converted" if dry_run else "converted"
    nbytes = sum(output.bytes for record in result.records for output in record.outputs)
    source_bytes = sum(record.source_bytes for record in result.records)
    kept = sum(record.kept for record in result.records)
    losses = sum(len(record.losses) for record in result.records)
    before = f" ({kept} of them in an earlier run)" if kept else ""
    print(
        f"{len(result.records) - len(result.failed)} of {len(result.records)} models {verb}{before}: "
        f"{human_bytes(source_bytes)} to {human_bytes(nbytes)} in {result.seconds:.1f} s; {losses} not kept or changed"
    )


def _document(result: BatchResult) -> dict[str, object]:
    import json

    return {
        "models": len(result.records),
        "failed": len(result.failed),
        "exit_codes": dict(Counter(str(r.failure.exit_code) for r in result.failed if r.failure)),
        "seconds": round(result.seconds, 3),
        "records": [json.loads(record.line()) for record in result.records],
    }
