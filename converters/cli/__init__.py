"""The command line: one file per sub-command. What goes wrong becomes one line on stderr and an exit code."""

from __future__ import annotations

import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer

from converters.allocator import keep_freed_memory
from converters.cli import batch, convert, formats, inspect, report, verify
from converters.cli.arguments import with_default_dequantize
from converters.errors import Error, ExitCode, printable
from converters.truncation import end_at_truncated_inputs
from converters.version import __version__

app = typer.Typer(
    name="nibblecast",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(verify.verify)
app.command()(batch.batch)
app.command()(report.report)
app.command()(formats.formats)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Moves 4-bit models between the formats they are trained in and the formats they ship in, code for code."""
    if version:
        print(f"nibblecast {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line on `sys.argv` and exits."""
    signal.signal(signal.SIGTERM, _terminated)
    keep_freed_memory()
    end_at_truncated_inputs()
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]  # the rest of its arguments is not shown
    try:
        app(args=with_default_dequantize(sys.argv[1:]))
    except Error as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("interrupted: nothing was left half written")
        sys.exit(128 + signal.SIGINT)
    except MemoryError:
        _complain("out of memory: nothing was left half written")
        sys.exit(ExitCode.UNREADABLE)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        sys.exit(ExitCode.DONE)


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    """Ends by an exception, so that temporary files are removed on the way out."""
    sys.exit(128 + signal.SIGTERM)


def _one_line_warning(message: Warning | str, *_: object) -> None:
    _complain(f"warning: {message}")


def _complain(text: str) -> None:
    print(f"nibblecast: {printable(text)}", file=sys.stderr)
