"""Names from a model as C identifiers, comments and strings. A name is data: whatever it holds, the C stays what it is.

C99 lets a compiler tell identifiers apart by their first 63 characters only (5.2.4.1), and C++ reserves those with two
underscores in a row; neither language lets a comment hold "*/" or end a line in a backslash, however it is spelled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from nibblecast.converters.errors import UsageError

MAX_IDENTIFIER = 63
MAX_PREFIX = 24
MAX_STRING = 4095  # C99 5.2.4.1: the longest string literal that every compiler takes
MAX_STRING_C90 = 509

_RESERVED_PREFIX = "nibblecast"  # the run-time header's own names
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_UNSAFE_IN_COMMENT = re.compile(r"[^ -~]|\\|(?<=\*)/|(?<=/)\*|(?<=\?)\?")
_UNSAFE_IN_STRING = re.compile(rb'[^ -~]|["\\?]')


def words(text: str) -> str:
    """`text` with every run of characters other than letters and digits as one underscore, and none at its ends."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def prefix_of(stem: str) -> str:
    """The prefix of all identifiers of a file with this stem: begins with a letter, at most MAX_PREFIX characters."""
    prefix = words(stem)
    if not prefix[:1].isalpha() or prefix.lower().startswith(_RESERVED_PREFIX):
        prefix = f"model_{prefix}".strip("_")
    return _shortened(prefix, MAX_PREFIX, stem)


def checked_prefix(prefix: str) -> str:
    """A prefix that the user chose, as it is. Raises UsageError when it cannot be one."""
    if not _OPTION.fullmatch(prefix) or len(prefix) > MAX_PREFIX or prefix.lower().startswith(_RESERVED_PREFIX):
        raise UsageError(
            f"prefix={prefix}: letters, digits and single underscores between them are needed, a letter first, "
            f"at most {MAX_PREFIX} in all, and not '{_RESERVED_PREFIX}' at the beginning"
        )
    return prefix


class Identifiers:
    """Gives every tensor a base such that `base + suffix` is new for each of the suffixes that it will be used with."""

    def __init__(self, prefix: str, taken: Iterable[str]) -> None:
        self._prefix = prefix
        self._taken = set(taken)

    def claim(self, name: str, suffixes: Iterable[str]) -> str:
        """The base for the tensor `name`: the prefix and the name's words, with a hash of the name where that is too
        long or taken. It depends on the names claimed before and on nothing else."""
        suffixes = tuple(suffixes)
        longest = MAX_IDENTIFIER - max(map(len, suffixes))
        base = plain = f"{self._prefix}_{words(name) or 'tensor'}"
        attempt = 0
        while len(base) > longest or not self._taken.isdisjoint(base + suffix for suffix in suffixes):
            hashed = f"{name}#{attempt}" if attempt else name
            base = _hashed(plain, longest, hashed)
            attempt += 1
        self._taken.update(base + suffix for suffix in suffixes)
        return base


def comment(text: str) -> str:
    """`text` in printable ASCII on one line that neither ends nor opens a comment and holds no trigraph."""
    return _UNSAFE_IN_COMMENT.sub(lambda match: _escaped(match[0]), text)


def string_literal(text: str, longest: int = MAX_STRING) -> str:
    """`text` as a C string literal of its UTF-8 bytes, in ASCII; those beyond the `longest` are left out."""
    encoded = text.encode("utf-8", "surrogatepass")[:longest]
    escaped = _UNSAFE_IN_STRING.sub(lambda match: b"\\%03o" % match[0][0], encoded)  # \ooo takes in no digit after it
    return f'"{escaped.decode("ascii")}"'


def fits_string(text: str, longest: int = MAX_STRING) -> bool:
    """Whether `string_literal` leaves nothing out."""
    return len(text.encode("utf-8", "surrogatepass")) <= longest


def includable(file_name: str) -> bool:
    """Whether every compiler finds a file of this name by `#include "..."`."""
    return re.search(r'[^ -~]|["\\]|\?\?|//|/\*', file_name) is None


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return f"\\x{ord(character):02x}" if ord(character) <= 0xFF else f"\\u{ord(character):04x}"


def _shortened(text: str, longest: int, name: str) -> str:
    return text if len(text) <= longest else _hashed(text, longest, name)


def _hashed(text: str, longest: int, name: str) -> str:
    """As much of `text` as fits before a hash of `name`."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{text[: longest - len(digest) - 1].rstrip('_')}_{digest}"
