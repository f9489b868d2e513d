"""The command line. What goes wrong becomes one line on stderr and an exit code.

This module imports next to nothing: Python and NumPy take half a second to import the rest, and an interruption in that
time is to end the program as one at any later time does.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

INTERRUPTED = "interrupted: nothing was left half written"
INTERRUPTED_CODE = 128 + signal.SIGINT


def main() -> None:
    """Runs the command line on `sys.argv` and exits."""
    # An exception would not do while things are imported: it may come where Python can only print it (in what an import
    # runs when a lock is let go), or where a library takes it for a missing package.
    on_signals(end_at_once)
    from nibblecast.converters.cli.commands import run

    code = run(sys.argv[1:])
    on_signals(signal.SIG_IGN)  # all is done, and Python tidies up
    if code == INTERRUPTED_CODE:  # Python would end itself by the signal where the exception went through its exec()
        os._exit(code)
    sys.exit(code)


def on_signals(handler: "Callable[[int, FrameType | None], None] | signal.Handlers") -> None:
    """What an interruption and the signal to end do from now on; each that whoever started the program has it ignore
    stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once(number: int, _: "FrameType | None") -> None:
    """Ends the process. For when nothing is being written."""
    if number == signal.SIGINT:
        try:  # noqa: SIM105 - `contextlib` would have to be imported
            os.write(2, f"nibblecast: {INTERRUPTED}\n".encode())
        except OSError:  # nobody is there to be told
            pass
    os._exit(128 + number)


def __getattr__(name: str) -> "Any":
    """`app`, the commands as Typer has them."""
    if name != "app":
        raise AttributeError(f"module 'nibblecast.converters.cli' has no attribute '{name}'")
    from nibblecast.converters.cli.commands import app

    return app
