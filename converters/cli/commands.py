"""All sub-commands, and the exit codes of a run."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from nibblecast.converters.cli import batch, convert, formats, inspect, report, streams, verify
from nibblecast.converters.cli.arguments import with_default_dequantize
from nibblecast.converters.cli.signals import INTERRUPTED, INTERRUPTED_CODE, end_at_once, on_signals
from nibblecast.converters.errors import MOST_OF_MESSAGE, Error, ExitCode, Notice, line
from nibblecast.converters.input.truncation import end_at_truncated_inputs
from nibblecast.converters.machine import keep_freed_memory
from nibblecast.converters.version import __version__

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_MOMENT_SECONDS = 0.02

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
    """Move 4-bit models between the formats they are trained in and the formats they ship in, code for code."""
    if version:
        print(f"nibblecast {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Runs a command, whatever the standard streams are. Returns its exit code."""
    streams.open_standard_streams()
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]  # the rest of its arguments is not shown
    sys.unraisablehook = _unraisable
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries log is not for whoever runs a command
    keep_freed_memory()
    end_at_truncated_inputs()
    code = _outcome(arguments)
    on_signals(end_at_once)
    refused = streams.refusal()
    if refused is not None and code in (ExitCode.DONE, ExitCode.VERIFICATION_FAILED, ExitCode.BATCH_FAILED):
        _complain(f"cannot write to standard output: {refused.strerror or refused}")
        code = code or ExitCode.USAGE
    return code


def _outcome(arguments: Sequence[str]) -> int:
    """The exit code of a command. What goes wrong is told in one line; a bug's exception is raised."""
    try:
        on_signals(_raise)
        app(args=with_default_dequantize(arguments))
    except Error as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except MemoryError:
        _complain("out of memory: nothing was left half written")
        return ExitCode.UNREADABLE
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        _complain(line(f"{where}{error.strerror or error}", MOST_OF_MESSAGE))
        return ExitCode.USAGE
    except SystemExit as ended:  # Typer's way to return
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return _interrupted() if code == INTERRUPTED_CODE else code
    return ExitCode.DONE


def _interrupted() -> int:
    _complain(INTERRUPTED)
    return INTERRUPTED_CODE


def _raise(number: int, _: FrameType | None) -> None:
    """Ends the program by an exception, so that temporary files are removed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _unraisable(unraisable: UnraisableHookArgs) -> None:
    """Sends a signal again that came where Python cannot raise (while it releases an import's lock). Errors of the
    system are dropped here: they follow an error that is reported."""
    for exception, number in ((KeyboardInterrupt, signal.SIGINT), (SystemExit, signal.SIGTERM)):
        if isinstance(unraisable.exc_value, exception):
            main = threading.main_thread().ident or 0
            threading.Timer(_MOMENT_SECONDS, signal.pthread_kill, (main, number)).start()
            return
    if not isinstance(unraisable.exc_value, OSError):
        sys.__unraisablehook__(unraisable)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Shows converters' own warnings; those of libraries only on request (`python -W`)."""
    if issubclass(category, Notice) or sys.warnoptions:
        _complain(line(f"warning: {message}", MOST_OF_MESSAGE))


def _complain(text: str) -> None:
    print(f"nibblecast: {text}", file=sys.stderr)
