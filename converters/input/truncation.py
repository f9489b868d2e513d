"""Ends a process whose input is truncated while it is mapped into memory, with a message.

Reading beyond the file's new end raises the signal SIGBUS, which ends a process without a message. It cannot become an
exception: the processor stops within an instruction of NumPy or the C library. So all that can be done is to name the
file, remove partial outputs, and end. Python's own signal handlers would never run, because they wait until that
instruction is done. The system calls this handler directly, through ctypes. This is safe because a read of mapped
memory has failed, so neither Python nor malloc is at work at that moment.
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
    """Makes a truncated input end this process with one line on stderr (no line if `quiet`) and exit code 8. For
    processes that do only nibblecast's work. Does nothing on systems other than Linux."""
    if sys.platform == "linux":
        _libc().signal(signal.SIGBUS, _quiet if quiet else _loud)


def _end(*, quiet: bool) -> None:
    while not _first.acquire(blocking=False):
        time.sleep(1)  # another thread has failed on it too, and is about to end the process
    code = int(ExitCode.BUG)
    try:
        file = truncated_file()
        if file is None:  # e.g. a disk error: the instruction runs again, and the system ends the process
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
