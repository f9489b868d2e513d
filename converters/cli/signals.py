"""How an interrupted run ends.

This module imports next to nothing: the command line needs it before Python and NumPy import all else.
"""

import os
import signal

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

INTERRUPTED = "interrupted: nothing was left half written"
INTERRUPTED_CODE = 128 + signal.SIGINT


def on_signals(handler: "Callable[[int, FrameType | None], None] | signal.Handlers") -> None:
    """Sets the handler of SIGINT and SIGTERM. A signal that was ignored when the program started stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once(number: int, _: "FrameType | None") -> None:
    """Ends the process at once, while nothing is being written."""
    if number == signal.SIGINT:
        try:  # noqa: SIM105 - `contextlib` would have to be imported
            os.write(2, f"nibblecast: {INTERRUPTED}\n".encode())
        except OSError:  # nobody is there to be told
            pass
    os._exit(128 + number)
