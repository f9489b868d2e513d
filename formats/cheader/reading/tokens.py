"""C text as tokens: names, numbers, strings, marks and preprocessor lines, without comments. Nothing is ever compiled.

The text may be anything: every token is found in one pass, nothing is matched twice, and nothing recurses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.storage import MappedFile

Kind = Literal["name", "number", "string", "mark", "directive"]

_BLOCK_COMMENT = rb"/\*(?:[^*]++|\*(?!/))*+(?:\*/)?"
_LINE_COMMENT = rb"//(?:[^\n\\]++|\\\r?\n|\\)*+"
_STRING = rb'"(?:[^"\\\n]++|\\\r\n|\\.)*+"?'
_TOKEN = re.compile(
    rb"(?P<blank>(?:\s++|\\\r?\n)++)"
    rb"|(?P<comment>" + _BLOCK_COMMENT + rb"|" + _LINE_COMMENT + rb")"
    rb"|(?P<name>[A-Za-z_]\w*+)"
    rb"|(?P<number>\.?[0-9](?:[eEpP][+-]|[\w.])*+)"
    rb"|(?P<string>" + _STRING + rb"|'(?:[^'\\\n]++|\\.)*+'?)"
    rb"|(?P<directive>\#(?:[^\n\\/\"]++|"
    + _BLOCK_COMMENT
    + rb"|"
    + _LINE_COMMENT
    + rb"|"
    + _STRING
    + rb"|\\\r?\n|[^\n])*+)"
    rb"|(?P<mark>.)",
    re.DOTALL,
)
_COMMENT_OR_STRING = re.compile(_BLOCK_COMMENT + rb"|" + _LINE_COMMENT + rb"|(?P<string>" + _STRING + rb")")
_INTEGER = re.compile(rb"(?:0[xX](?P<hex>[0-9A-Fa-f]+)|0[bB](?P<binary>[01]+)|(?P<decimal>[0-9]+))(?:[uU]|[lL])*")
_MOST_DIGITS = 64
_ESCAPE = re.compile(
    rb"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]+)|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(\r?\n)|(.)|\Z)", re.DOTALL
)
_SIMPLE_ESCAPES = dict(zip(b"abfnrtv\\\"'?", b"\a\b\f\n\r\t\v\\\"'?", strict=True))


class Token(NamedTuple):
    """A token: its text, and the byte of the file at which it begins."""

    kind: Kind
    text: bytes
    offset: int


def line_of(file: MappedFile, offset: int) -> int:
    """The number of the line that the byte is on, from 1."""
    step, count = 1 << 22, 1
    for start in range(0, offset, step):
        count += int((file.view[start : min(start + step, offset)] == ord("\n")).sum())
    return count


def corrupt(file: MappedFile, offset: int, message: str, tensor: str | None = None) -> CorruptFile:
    """The error for something that is wrong at this byte of the file."""
    return CorruptFile(f"line {line_of(file, offset)}: {message}", path=file.path, tensor=tensor)


class Tokens:
    """The tokens in bytes [start, stop) of a file; `position` is the byte at which the next one is looked for, and may
    be set by whoever knows more. Raises CorruptFile for a comment or a string that is not closed."""

    def __init__(self, file: MappedFile, start: int = 0, stop: int | None = None) -> None:
        self.position = start
        self._file = file
        self._text = b"" if file.mapping is None else file.mapping
        self._end = file.view.size if stop is None else stop

    def __iter__(self) -> Iterator[Token]:
        while (match := _TOKEN.match(self._text, self.position, self._end)) is not None:
            offset, self.position = self.position, match.end()
            kind, found = match.lastgroup, match[0]
            if kind == "comment":
                self._check_closed(
                    "comment", offset, found.startswith(b"//") or (len(found) > 3 and found[-2:] == b"*/")
                )
            elif kind != "blank":
                if kind == "string":
                    self._check_closed("string", offset, len(found) > 1 and found[-1] == found[0])
                yield Token(cast("Kind", kind), found, offset)

    def _check_closed(self, what: str, offset: int, closed: bool) -> None:
        if not closed:
            raise corrupt(self._file, offset, f"a {what} is not closed: the file is truncated or damaged")


def without_comments(text: bytes) -> bytes:
    """The text with a blank in place of every comment."""
    return _COMMENT_OR_STRING.sub(lambda match: match["string"] or b" ", text) if b"/" in text else text


def integer_of(text: bytes) -> int | None:
    """The value of an integer literal, suffixes aside; None where it is none."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(text) > _MOST_DIGITS:
        return None
    if match["hex"]:
        return int(match["hex"], 16)
    if match["binary"]:
        return int(match["binary"], 2)
    octal = match["decimal"].startswith(b"0")
    if octal and re.search(rb"[89]", match["decimal"]):
        return None
    return int(match["decimal"], 8 if octal else 10)


def string_bytes(literal: bytes) -> bytes | None:
    """What a string literal, with its quotes, stands for; None where an escape in it is none of C's."""
    wrong = False

    def character(match: re.Match[bytes]) -> bytes:
        nonlocal wrong
        octal, hexadecimal, short, long, newline, simple = match.groups()
        if newline:
            return b""
        if simple is not None and simple[0] in _SIMPLE_ESCAPES:
            return bytes([_SIMPLE_ESCAPES[simple[0]]])
        if octal or hexadecimal:
            value = int(octal, 8) if octal else int(hexadecimal[-16:], 16)
            if value <= 0xFF:
                return bytes([value])
        elif (short or long) and int(short or long, 16) <= 0x10FFFF:
            return chr(int(short or long, 16)).encode("utf-8", "surrogatepass")
        wrong = True
        return b""

    value = _ESCAPE.sub(character, literal[1:-1])
    return None if wrong else value
