"""Arguments and options that several sub-commands share, and what they have in common when printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from nibblecast.converters.arithmetic.dtypes import FLOAT_DTYPES
from nibblecast.converters.errors import MOST_OF_MESSAGE, MOST_OF_NAME, UsageError, line
from nibblecast.converters.interfaces import Progress
from nibblecast.converters.ir import Loss
from nibblecast.converters.sizes import bytes_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def path(text: str) -> str:
    """A path as it is given, for Typer's `parser`. A `Path` would be checked by Typer, with a box of lines for what the
    system refuses, and would take "" for the current folder. The functions that get it check it, with one line."""
    return text


Source = Annotated[str, typer.Argument(help="The model file to read.", show_default=False, parser=path)]
ReaderOptions = Annotated[list[str] | None, typer.Option("--opt", help="key=value: an option of the reader.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

_MUCH = 1 << 28


def with_default_dequantize(arguments: Sequence[str]) -> list[str]:
    """The arguments with the dtype that a bare `--dequantize` means, float32, written out."""
    complete = []
    for position, argument in enumerate(arguments):
        complete.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument == "--dequantize" and following not in FLOAT_DTYPES:
            complete.append("float32")
    return complete


def float_dtype(name: str | None) -> np.dtype[Any] | None:
    """The dtype that --dequantize names; None without it. Raises UsageError for another one."""
    if name is not None and name not in FLOAT_DTYPES:
        raise UsageError(f"--dequantize '{name}': use {', '.join(FLOAT_DTYPES)}")
    return None if name is None else FLOAT_DTYPES[name]


def key_values(given: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a dictionary. Raises UsageError for one without an equals sign."""
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--opt '{text}': must be key=value; `nibblecast formats NAME` lists the keys")
        options[key] = value
    return options


def human_bytes(count: int | None) -> str:
    """A number of bytes for a person: 512 B, 1.5 KiB, 3.2 GiB."""
    return "size known when written" if count is None else bytes_text(count)


def shown_loss(loss: Loss) -> str:
    """A loss, or a note, on one line: `not kept: NAME: DETAIL`."""
    return line(str(loss), MOST_OF_NAME + MOST_OF_MESSAGE)


def loss_document(loss: Loss) -> dict[str, str]:
    """A loss as JSON has it."""
    return {"tensor": loss.tensor, "kind": loss.kind, "detail": loss.detail}


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that JSON lacks (NaN) would be refused."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def cell(text: str, most: int = MOST_OF_NAME) -> Text:
    """What a table shows of a text: one line of limited length. Characters that the output's encoding lacks become
    escapes before widths are counted."""
    from rich.text import Text

    encoding = sys.stdout.encoding or "utf-8"
    return Text(line(text, most).encode(encoding, "backslashreplace").decode(encoding))


def table_console() -> Console:
    """A console for tables: as wide as the terminal; without one, as wide as the table needs."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1_000, soft_wrap=True)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Progress | None]:
    """Something to tell how many bytes are done: a bar on stderr, only on a terminal, and only where there is much to
    do; None when nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bars: list[tuple[Any, Any]] = []

    def report(done: int, total: int) -> None:
        if total < _MUCH:
            return
        if not bars:
            bars.append(_started_bar(what, total))
        bar, task = bars[0]
        bar.update(task, completed=done)

    try:
        yield report
    finally:
        for bar, _ in bars:
            bar.stop()


def _started_bar(what: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task(what, total=total)
