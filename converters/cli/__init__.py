"""The command line. What goes wrong becomes one line on stderr and an exit code.

This module imports next to nothing: Python and NumPy take half a second to import the rest, and an interruption in that
time is to end the program as one at any later time does.
"""

import os
import signal
import sys

from nibblecast.converters.cli.signals import INTERRUPTED_CODE, end_at_once, on_signals

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any


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


def __getattr__(name: str) -> "Any":
    """`app`, the commands as Typer has them."""
    if name != "app":
        raise AttributeError(f"module 'nibblecast.converters.cli' has no attribute '{name}'")
    from nibblecast.converters.cli.commands import app

    return app
