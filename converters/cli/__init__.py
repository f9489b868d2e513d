"""The command line. An error becomes one line on stderr and an exit code.

This module imports almost nothing. Importing the rest, with NumPy, takes half a second, and an interruption then
must end the program as it does later.
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
