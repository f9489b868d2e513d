"""What C files that the writer made declare: macros, arrays, the table of tensors. Bodies of arrays are only located.

Whatever is between the braces of an array is skipped at the speed of a search for the brace that closes it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from converters.errors import Unsupported
from converters.storage import MappedFile
from formats.cheader.c_tokens import Token, Tokens, corrupt, integer_of, without_comments
from formats.cheader.packings import PACKING_NAMES

TABLE_TYPE = b"nibblecast_tensor"

#: NumPy's dtypes of the element types that arrays have; words are read as little-endian bytes.
ELEMENT_TYPES = {
    **{f"{sign}int{bits}_t".encode(): f"<{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    b"char": "<u1",
    b"size_t": "<u8",
    b"float": "<f4",
    b"double": "<f8",
}

_DEFINE = re.compile(rb"#\s*define\s+(\w+)(?:\s+(.*))?", re.DOTALL)
_INTERFACE = re.compile(rb"#\s*if\s+NIBBLECAST_INTERFACE\s*!=\s*(\d{1,9})\s*")
_VALUE = re.compile(rb"[(\s]*(\w+)[)\s]*")
_SPECIAL_IN_BODY = tuple(re.compile(re.escape(mark)) for mark in (b"/", b'"', b"'", b"{", b"#"))
_EMBED = re.compile(rb"#\s*embed\b")
_PLAIN_STRINGS = re.compile(rb'(?:\s++"[^"\n]*+"(?<!\\"))*+')
_CLOSING = re.compile(rb"\}")
_MOST_WORDS = 32
_MOST_MACROS_DEEP = 8
_LARGE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ArrayText:
    """An array that is declared, and where its elements are written: bytes [start, stop) of `file`.

    `length` is what its brackets hold: one token, or nothing. `plain` says that there is nothing between the braces but
    literals, blanks and commas; `is_string`, that there are no braces but string literals.
    """

    file: MappedFile
    name: str
    element_type: bytes
    length: Token | None
    start: int
    stop: int = 0
    plain: bool = True
    is_string: bool = False

    @property
    def is_defined(self) -> bool:
        """Whether it has elements, or is only declared."""
        return self.stop > 0


@dataclass(slots=True)
class Declarations:
    """All that the files hold: macros by name, arrays by name, tables of tensors, the interface that they are for."""

    macros: dict[bytes, bytes] = field(default_factory=dict)
    arrays: dict[str, ArrayText] = field(default_factory=dict)
    declared: dict[str, ArrayText] = field(default_factory=dict)
    tables: dict[str, ArrayText] = field(default_factory=dict)
    interface: int | None = None
    _ambiguous: set[bytes] = field(default_factory=set)

    def add(self, file: MappedFile) -> None:
        """Takes in what a file declares. Raises CorruptFile when it is no C, or defines an array twice."""
        _Scanner(file, self).run()

    def add_directive(self, token: Token) -> None:
        """Takes in a preprocessor line, if it is of use."""
        if (define := _DEFINE.match(token.text)) is not None:
            name, value = define[1], without_comments(define[2] or b"").strip()
            if self.macros.setdefault(name, value) != value:
                self._ambiguous.add(name)
        elif self.interface is None and (found := _INTERFACE.match(token.text)) is not None:
            self.interface = int(found[1])

    def add_array(self, array: ArrayText) -> None:
        """Takes in an array, or a declaration of one."""
        if not array.is_defined:
            known = self.declared.setdefault(array.name, array)
        else:
            arrays = self.tables if array.element_type == TABLE_TYPE else self.arrays
            known = arrays.setdefault(array.name, array)
        if known is not array and (array.is_defined or not self.same(known, array)):
            raise corrupt(array.file, array.start, f"{array.name} is declared a second time")

    def same(self, one: ArrayText, other: ArrayText) -> bool:
        """Whether two declarations agree."""
        return one.element_type == other.element_type and self.length_of(one) == self.length_of(other)

    def length_of(self, array: ArrayText) -> int | None:
        """How many elements its brackets say; None when they are empty."""
        return None if array.length is None else self.integer(array.length.text, array.file, array.length.offset)

    def integer(self, text: bytes, file: MappedFile, offset: int) -> int:
        """The value of a literal, or of a macro that stands for one. Raises CorruptFile for anything else."""
        value = text
        for _ in range(_MOST_MACROS_DEEP):
            if (number := integer_of(value)) is not None:
                return number
            number = CONSTANTS.get(value)
            if number is not None:
                return number
            if value not in self.macros or value in self._ambiguous:
                break
            single = _VALUE.fullmatch(self.macros[value])
            if single is None:
                break
            value = single[1]
        shown = text[:80].decode("ascii", "backslashreplace")
        raise corrupt(file, offset, f"{shown} is no number, and no macro defined once that stands for one")


_KINDS = (
    *("UNSIGNED", "SIGNED", "CODEBOOK", "BOOL", "FLOAT64", "FLOAT32", "FLOAT16", "BFLOAT16"),
    *("FLOAT8_E4M3FN", "FLOAT8_E4M3FNUZ", "FLOAT8_E5M2", "FLOAT8_E5M2FNUZ", "FLOAT8_E8M0FNU"),
    *("FLOAT6_E2M3FN", "FLOAT6_E3M2FN", "FLOAT4_E2M1FN"),
)
_GRANULARITIES = ("NOT_QUANTIZED", "PER_TENSOR", "PER_AXIS", "BLOCKWISE", "GROUP_INDEX")

KIND_NAMES = dict(enumerate(_KINDS))
GRANULARITY_NAMES = dict(enumerate(_GRANULARITIES))

#: The macros of nibblecast.h that tables are made of.
CONSTANTS = {
    f"NIBBLECAST_{name}".encode(): value
    for names in (KIND_NAMES, GRANULARITY_NAMES, PACKING_NAMES)
    for value, name in names.items()
}


class _Scanner:
    """Goes through one file and notes what it declares."""

    def __init__(self, file: MappedFile, found: Declarations) -> None:
        self._file = file
        self._found = found
        self._tokens = Tokens(file)
        self._words: deque[bytes] = deque(maxlen=_MOST_WORDS)  # the names since the last declaration
        self._array: ArrayText | None = None  # the array that is being declared

    def run(self) -> None:
        """All of the file."""
        tokens = iter(self._tokens)
        before = last = b""  # the two tokens that came before
        for token in tokens:
            mark = token.text if token.kind == "mark" else b""
            if token.kind == "directive":
                self._found.add_directive(token)
            elif token.kind == "name":
                self._words.append(token.text)
            elif mark == b"[" and self._is_declarator(before, last):
                self._array = ArrayText(self._file, last.decode(), before, self._length(tokens), token.offset)
            elif last == b"=" and self._array is not None and (mark == b"{" or token.kind == "string"):
                located = self._in_braces if mark else self._in_quotes
                self._found.add_array(located(self._array, token))
                self._forget()
            elif mark == b";":
                if self._array is not None:
                    self._found.add_array(self._array)
                self._forget()
            elif mark in (b"{", b"}"):
                self._forget()
            before, last = last, token.text

    def _forget(self) -> None:
        self._words.clear()
        self._array = None

    def _is_declarator(self, before: bytes, last: bytes) -> bool:
        """Whether the two tokens before a bracket are the type and the name of a constant array."""
        known = before in ELEMENT_TYPES or before == TABLE_TYPE
        return known and b"const" in self._words and self._words[-1] == last

    def _length(self, tokens: Iterator[Token]) -> Token | None:
        """What is between brackets, one of which has just gone by."""
        inside: list[Token] = []
        for token in tokens:
            if token.text == b"]":
                return inside[0] if inside else None
            if inside or token.kind not in ("name", "number"):
                raise corrupt(self._file, token.offset, "a number between the brackets of an array is needed")
            inside.append(token)
        raise corrupt(self._file, self._file.view.size, "a bracket is not closed: the file is truncated")

    def _in_quotes(self, array: ArrayText, first: Token) -> ArrayText:
        """The array whose first string literal has just gone by."""
        stop = first.offset + len(first.text)
        if (plain := _PLAIN_STRINGS.match(self._file.mapping or b"", stop)) is not None:
            stop = plain.end()
        for token in Tokens(self._file, stop):
            if token.kind != "string":
                break
            stop = token.offset + len(token.text)
        self._tokens.position = stop
        return replace(array, start=first.offset, stop=stop, is_string=True)

    def _in_braces(self, array: ArrayText, opening: Token) -> ArrayText:
        """The array whose opening brace has just gone by."""
        text = self._file.mapping or b""
        start = opening.offset + 1
        closing = _CLOSING.search(text, start)
        if closing is None:
            raise corrupt(self._file, opening.offset, f"the elements of {array.name} do not end: the file is truncated")
        stop = closing.start()
        plain = not any(mark.search(text, start, stop) for mark in _SPECIAL_IN_BODY)
        if not plain:
            stop = self._matching_brace(array, start)
        elif stop - start > _LARGE:
            self._file.range(start, stop - start).release(0, stop - start)
        self._tokens.position = stop + 1
        return replace(array, start=start, stop=stop, plain=plain)

    def _matching_brace(self, array: ArrayText, start: int) -> int:
        """Where the brace is that closes the one before `start`, comments and strings aside."""
        depth = 1
        directives: list[bytes] = []
        for token in Tokens(self._file, start):
            if token.kind == "directive" and (not directives or _EMBED.match(token.text)):
                directives = [token.text]
            if token.kind == "mark":
                depth += (token.text == b"{") - (token.text == b"}")
            if not depth and directives:
                line = directives[0][:80].strip().decode("ascii", "backslashreplace")
                raise Unsupported(
                    f"the elements of {array.name} depend on the preprocessor ({line}): only arrays that are written "
                    "out can be read back: write it with another style",
                    path=self._file.path,
                )
            if not depth:
                return token.offset
        raise corrupt(self._file, start, f"the elements of {array.name} do not end: the file is truncated")
