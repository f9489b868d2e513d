"""Standard output and standard error, as all commands have them.

They may be closed, on a full disk, a pipe that nobody reads any more, or of an encoding that lacks a character.
Commands, and the libraries that print for them, are not to know: whatever is written is taken. What the system refuses
is dropped, so that a command does all that it was told to, and in the end `refusal` says why nothing more came out.
Exceptions where something is printed would not do: Typer and rich each make something else of them, and what they cut
short may be a batch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from select import select
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Forgiving(io.FileIO):
    """A file that accepts all writes. `refusal` is the first error of the system; later writes are dropped."""

    refusal: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        """Says that all was written, or what of it was."""
        try:
            while self.refusal is None:
                count: int | None = super().write(data)
                if count is not None:
                    return count
                select((), (self,), ())  # a pipe that does not wait, and is full
        except OSError as error:
            self.refusal = error
        return memoryview(data).nbytes


def open_standard_streams() -> None:
    """Replaces `sys.stdin`, `sys.stdout` and `sys.stderr` by streams that raise nothing. Characters that an encoding
    lacks become backslash escapes; bytes of names in a list that are no characters are kept."""
    for number in range(3):
        if not _is_open(number):  # else the next file has the number, and what a library prints is written to it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout, sys.stderr = _forgiving(sys.stdout), _forgiving(sys.stderr)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _forgiving(stream: TextIO | None) -> TextIO:
    """A stream to the same file; to nowhere where there is none. One that is no file of the system stays: a test's."""
    try:
        raw = _Forgiving(os.devnull, "w") if stream is None else _Forgiving(stream.fileno(), "w", closefd=False)
    except OSError:
        return cast("TextIO", stream)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=any(getattr(stream, name, False) for name in ("line_buffering", "write_through")),
    )


def refusal() -> OSError | None:
    """Why some of what was printed was not taken; None where all of it was. A reader that has seen enough (`| head`) is
    no reason."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    refused = raw.refusal if isinstance(raw, _Forgiving) else None
    return None if refused is None or refused.errno == errno.EPIPE else refused
