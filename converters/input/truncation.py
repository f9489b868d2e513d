"""The end of a process whose input is cut off while it is mapped into memory.

Reading what a file no longer has is the signal SIGBUS, which ends a process without a word. It cannot become an
exception: the processor stops amid an instruction, of NumPy's or the C library's. So the one thing that can be done is
to say which file it was, to remove what is half written, and to end. Python's own handlers would never run, for they
wait until that instruction is done; this one is called by the system itself, through ctypes, at a moment when neither
Python nor malloc is at work, because it is a read of mapped memory that failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from nibblecast.converters.errors import ChangedFile, ExitCode
from nibblecast.converters.output.private_folder import remove_all
from nibblecast.converters.storage import truncated_file

_STDERR = 2
_first = threading.Lock()
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def end_at_truncated_inputs(*, quiet: bool = False) -> None:
    """Has a truncated input end this process with one line on stderr (none, if `quiet`) and exit code 8. For processes
    that do nothing else than nibblecast's work; nothing where the system is not Linux."""
    if sys.platform == "linux":
        _libc().signal(signal.SIGBUS, _quiet if quiet else _loud)


def _end(*, quiet: bool) -> None:
    while not _first.acquire(blocking=False):
        time.sleep(1)  # another thread has read it as well, and is about to end the process
    code = int(ExitCode.BUG)
    try:
        file = truncated_file()
        if file is None:  # a disk that cannot be read, e.g.: the instruction is tried again, and the system ends it
            _libc().signal(signal.SIGBUS, None)
            code = 0
            _first.release()
            return
        code = int(ExitCode.CHANGED)
        remove_all()
        if not quiet:
            message = f"was cut off while it was read (it had {file.view.size} bytes): convert it again"
            line = f"nibblecast: {ChangedFile(message, path=file.path)}\n"
            os.write(_STDERR, line.encode(errors="backslashreplace"))
    finally:
        if code:
            os._exit(code)


_loud = _Handler(lambda _: _end(quiet=False))
_quiet = _Handler(lambda _: _end(quiet=True))


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, _Handler]
    library.signal.restype = ctypes.c_void_p
    return library
