"""The command line. What goes wrong becomes one line on stderr and an exit code.

This module imports next to nothing: Python and NumPy take half a second to import the rest, and an interruption in that
time is to end the program as one at any later time does.
"""

import os
import signal
import sys
from contextlib import suppress

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

INTERRUPTED = "interrupted: nothing was left half written"


def main() -> None:
    """Runs the command line on `sys.argv` and exits."""
    _end_at_once_when_told()
    from converters.cli.commands import run

    sys.exit(run(sys.argv[1:]))


def _end_at_once_when_told() -> None:
    """Until everything is imported. An exception would not do: it may come where Python can only print it (in what an
    import runs when a lock is let go), or where a library takes it for a missing package. Signals that whoever started
    the program has it ignore stay ignored."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == default:
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, _: "FrameType | None") -> None:
    if number == signal.SIGINT:
        with suppress(OSError):  # nobody may be there to be told
            os.write(2, f"nibblecast: {INTERRUPTED}\n".encode())
    os._exit(128 + number)


def __getattr__(name: str) -> "Any":
    """`app`, the commands as Typer has them."""
    if name != "app":
        raise AttributeError(f"module 'converters.cli' has no attribute '{name}'")
    from converters.cli.commands import app

    return app
