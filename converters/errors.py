"""The exceptions meant for a person, and the exit codes they carry.

Every one is a single line of text that names the file, the tensor, the value seen and what to do. Text that comes from
a model (e.g. a tensor's name) is data: control characters in it are escaped, so that it can neither break the line nor
drive a terminal, what is very long is shortened, and what is secret in URLs is hidden.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from nibblecast.converters.input.urls import without_secrets

#: How many characters of a name, a path or a message are shown: paths of most systems and all messages of ours whole.
MOST_OF_NAME = 200
MOST_OF_PATH = 1_000
MOST_OF_MESSAGE = 1_500

_BRIEF_ITEMS = 8
_BRIEF_BITS = 256
_BRIEF_TYPES = (int, float, complex, bool, type(None), str, bytes, tuple, list, dict, set, frozenset)


class ExitCode(IntEnum):
    """What the command line's exit status means."""

    DONE = 0
    BUG = 1
    USAGE = 2
    UNREADABLE = 3
    UNSUPPORTED = 4
    REFUSED_LOSS = 5
    VERIFICATION_FAILED = 6
    BATCH_FAILED = 7
    CHANGED = 8


def printable(text: str) -> str:
    """`text` on one line, with control and other unprintable characters as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def line(text: str, most: int = MOST_OF_NAME) -> str:
    """`text` as a person is shown it: on one line as of `printable`, without secrets, and of `most` characters or few
    more. Of a longer one the middle is left out, for both ends of a name tell it from others."""
    safe = without_secrets(text)
    shown = printable(safe if len(safe) <= 2 * most else safe[:most] + safe[-most:])
    if len(shown) <= most:
        return shown
    return f"{shown[: most // 2]}… ({len(safe)} characters) …{shown[-(most // 2) :]}"


def brief(value: object, most: int = 80) -> str:
    """A value out of a file as a short text for a message, in time and memory that do not depend on the value. `repr`
    would format all of it first: a tuple that holds itself twice, sixty levels deep, takes it for ever, and an integer
    of 8000 bits is an error of its own. What is inside containers is told one level deep; of a class that is not known
    here only the name is."""
    if type(value) not in (tuple, list) or not isinstance(value, tuple | list):
        return _flat(value, most)
    items = [_flat(item, most) for item in value[:_BRIEF_ITEMS]] + ["…"] * (len(value) > _BRIEF_ITEMS)
    text = ", ".join(items)
    return f"[{text}]" if isinstance(value, list) else f"({text}{',' * (len(items) == 1)})"


def _flat(value: object, most: int) -> str:
    kind = type(value)
    if kind not in _BRIEF_TYPES:  # a class derived from one of these may have a `__repr__` of its own
        return f"a value of type {kind.__name__}"
    if isinstance(value, int) and value.bit_length() > _BRIEF_BITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return printable(repr(value[:most])) + "…" * (len(value) > most)
    if isinstance(value, tuple | list | dict | set | frozenset):
        return f"a {kind.__name__} of {len(value)}"
    return repr(value)


class Error(Exception):
    """The base of every exception meant for a person; `str()` of it is one line.

    `path` and `tensor` say where; whoever knows them first fills them in (a reader knows the tensor, `load` the path).
    """

    exit_code = ExitCode.BUG

    def __init__(self, message: str, *, path: Path | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor

    def __str__(self) -> str:
        where = [] if self.path is None else [line(str(self.path), MOST_OF_PATH)]
        if self.tensor is not None:
            where.append(f"tensor '{line(self.tensor)}'")
        return ": ".join([*where, line(self.message, MOST_OF_MESSAGE)])


class located:  # noqa: N801  (used like a function; a class because a generator would cost more and hide returns from mypy)
    """Has every `Error` that leaves the block say where it was, unless it says so already. `over`: also where it names
    a tensor, for errors that name a weight's parameter and are to name the weight."""

    __slots__ = ("_over", "_path", "_tensor")

    def __init__(self, *, path: Path | None = None, tensor: str | None = None, over: bool = False) -> None:
        self._path, self._tensor, self._over = path, tensor, over

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Error):
            error.path = error.path or self._path
            error.tensor = self._tensor if self._over else error.tensor or self._tensor


class Notice(UserWarning):
    """A warning for the user: the command line shows these warnings only."""


class UsageError(Error):
    """The call itself is wrong: an unknown option, an unknown format, an output that is the input."""

    exit_code = ExitCode.USAGE


class CorruptFile(Error):
    """The file contradicts its own format, or cannot be opened."""

    exit_code = ExitCode.UNREADABLE


class MissingFile(CorruptFile):
    """A file that another one refers to does not exist: `file`."""

    def __init__(self, message: str, *, file: Path, path: Path | None = None) -> None:
        super().__init__(message, path=path)
        self.file = file


class ChangedFile(Error):
    """An input was truncated or written to while it was read."""

    exit_code = ExitCode.CHANGED


class Unsupported(Error):
    """The file seems valid, but contains something that nibblecast does not support."""

    exit_code = ExitCode.UNSUPPORTED


class MissingDependency(Unsupported):
    """A package that this format needs is not installed; the message says which one."""


class RefusedLoss(Error):
    """Continuing would lose something; the message says what, and what to add to the command to accept it."""

    exit_code = ExitCode.REFUSED_LOSS


class VerificationFailed(Error):
    """Two models that should be equal are not."""

    exit_code = ExitCode.VERIFICATION_FAILED
