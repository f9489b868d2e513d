"""What C files that the writer made declare: macros, arrays, the table of tensors. Bodies of arrays are only located.

Whatever is between the braces of an array is skipped at the speed of a search for the brace that closes it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.cheader.packings import PACKING_NAMES
from nibblecast.formats.cheader.reading.tokens import Token, Tokens, corrupt, integer_of, string_bytes, without_comments

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
_VALUE = re.compile(rb"[(\s]*(\w+|\"(?:[^\"\\]++|\\.)*+\")[)\s]*", re.DOTALL)
_SPECIAL_IN_BODY = tuple(re.compile(re.escape(mark)) for mark in (b"/", b'"', b"'", b"{", b"#"))
_CONDITION = re.compile(rb"#\s*(?:if|ifdef|ifndef|elif|else|endif)\b")
_EMBED = re.compile(rb"#\s*+embed\b")
_EMBEDDED_BYTES = re.compile(
    rb"#\s*+embed\s++(?P<location>\w++|\"[^\"\n]*+\")\s*+limit\s*+\(\s*+(?P<nbytes>\w++)\s*+\)"
    rb"\s*+(?:(?:clang|gnu)\s*+::\s*+)?+offset\s*+\(\s*+(?P<offset>\w++)\s*+\)\s*+"
)
_INCBIN = b"NIBBLECAST_INCBIN"
_INCBIN_MARKS = [b"(", b",", b",", b",", b",", b")"]
_PLAIN_STRINGS = re.compile(rb'(?:\s++"[^"\n]*+"(?<!\\"))*+')
_CLOSING = re.compile(rb"\}")
_MOST_WORDS = 32
_MOST_MACROS_DEEP = 8
_LARGE = 1 << 20
_SEVERAL = 2


@dataclass(frozen=True, slots=True)
class Placement:
    """Where elements lie that are not in the text: `nbytes` bytes at `offset` of the file at `location`. All as the
    text has them: literals, or macros that stand for such. Byte `at` of `file` says so."""

    location: bytes
    offset: bytes
    nbytes: bytes
    file: MappedFile = field(compare=False)
    at: int = field(compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayText:
    """An array that is declared, and where its elements are written: bytes [start, stop) of `file`, or a file of their
    own (`placement`).

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
    placement: Placement | None = None

    @property
    def is_defined(self) -> bool:
        """Whether it has elements, or is only declared."""
        return self.stop > 0


@dataclass(slots=True)
class Declarations:
    """All that the files hold: macros by name, arrays by name, tables of tensors, the interface that they are for.
    `included` are the arrays that the assembler reads from a file, of which there are declarations only; `nbytes` is
    the size of the files."""

    macros: dict[bytes, bytes] = field(default_factory=dict)
    arrays: dict[str, ArrayText] = field(default_factory=dict)
    declared: dict[str, ArrayText] = field(default_factory=dict)
    tables: dict[str, ArrayText] = field(default_factory=dict)
    included: dict[str, Placement] = field(default_factory=dict)
    interface: int | None = None
    nbytes: int = 0
    _ambiguous: set[bytes] = field(default_factory=set)

    def add(self, file: MappedFile) -> None:
        """Takes in what a file declares. Raises CorruptFile when it is no C, or defines an array twice."""
        self.nbytes += file.view.size
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

    def add_included(self, name: str, placement: Placement) -> None:
        """Takes in an array that the assembler reads from a file."""
        if self.included.setdefault(name, placement) is not placement:
            raise corrupt(placement.file, placement.at, f"{name} is read from a file a second time")

    def array(self, name: str) -> ArrayText | None:
        """The array of this name, if it is said where its elements are."""
        declared, placement = self.declared.get(name), self.included.get(name)
        if declared is None or placement is None:
            return self.arrays.get(name)
        if name in self.arrays:
            raise corrupt(placement.file, placement.at, f"{name} is read from a file, and written out as well")
        return replace(declared, placement=placement)

    def same(self, one: ArrayText, other: ArrayText) -> bool:
        """Whether two declarations agree."""
        return one.element_type == other.element_type and self.length_of(one) == self.length_of(other)

    def length_of(self, array: ArrayText) -> int | None:
        """How many elements its brackets say; None when they are empty."""
        return None if array.length is None else self.integer(array.length.text, array.file, array.length.offset)

    def integer(self, text: bytes, file: MappedFile, offset: int) -> int:
        """The value of a literal, or of a macro that stands for one. Raises CorruptFile for anything else."""
        value = self._expanded(text)
        number = integer_of(value)
        if number is None:
            number = CONSTANTS.get(value)
        if number is None:
            raise _unknown(file, offset, text, "number")
        return number

    def string(self, text: bytes, file: MappedFile, offset: int) -> str:
        """The text of a string literal, or of a macro that stands for one. Raises CorruptFile for anything else."""
        value = self._expanded(text)
        content = string_bytes(value) if len(value) > 1 and value[:1] == value[-1:] == b'"' else None
        if content is None:
            raise _unknown(file, offset, text, "string")
        return content.decode("utf-8", "surrogateescape")

    def _expanded(self, text: bytes) -> bytes:
        """What a macro stands for, macros of macros included; `text` itself where it is none that is defined once."""
        for _ in range(_MOST_MACROS_DEEP):
            if text in CONSTANTS or text not in self.macros or text in self._ambiguous:
                break
            single = _VALUE.fullmatch(self.macros[text])
            if single is None:
                break
            text = single[1]
        return text


def _unknown(file: MappedFile, offset: int, text: bytes, what: str) -> CorruptFile:
    shown = text[:80].decode("ascii", "backslashreplace")
    return corrupt(file, offset, f"{shown} is not a {what}, nor a macro that is defined once as one")


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
                if token.text == _INCBIN:
                    self._add_included(token, tokens)
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
        plain, placement = not any(mark.search(text, start, stop) for mark in _SPECIAL_IN_BODY), None
        if not plain:
            stop, placement = self._matching_brace(array, start)
        elif stop - start > _LARGE:
            self._file.range(start, stop - start).release(0, stop - start)
        self._tokens.position = stop + 1
        return replace(array, start=start, stop=stop, plain=plain, placement=placement)

    def _matching_brace(self, array: ArrayText, start: int) -> tuple[int, Placement | None]:
        """Where the brace is that closes the one before `start`, comments and strings aside; and the place in a file
        whose bytes are all that there is between the two, whatever the #ifs around it say."""
        depth = 1
        directive = b""
        found: set[Placement | None] = set()  # None: something that is no file's bytes
        for token in Tokens(self._file, start):
            place = None
            if token.kind == "directive":
                place = _embedded(self._file, token)
                directive = token.text if _EMBED.match(token.text) or not directive else directive
            elif token.kind == "mark":
                depth += (token.text == b"{") - (token.text == b"}")
            if not depth:
                return token.offset, self._single(array, directive, found)
            if len(found) < _SEVERAL and not (token.kind == "directive" and _CONDITION.match(token.text)):
                found.add(place)
        raise corrupt(self._file, start, f"the elements of {array.name} do not end: the file is truncated")

    def _single(self, array: ArrayText, directive: bytes, found: set[Placement | None]) -> Placement | None:
        """The only thing that is between the braces of an array with preprocessor lines; None where there are none."""
        if directive and (len(found) != 1 or None in found):
            line = directive[:80].strip().decode("ascii", "backslashreplace")
            raise Unsupported(
                f"the elements of {array.name} depend on the preprocessor ({line}): only arrays that are written out, "
                "or are bytes of one file, can be read back: write it anew",
                path=self._file.path,
            )
        return found.pop() if directive else None

    def _add_included(self, first: Token, tokens: Iterator[Token]) -> None:
        """Takes in NIBBLECAST_INCBIN("name", file, "offset", "length", alignment), whose first token is `first`."""
        given: list[Token] = []
        for token in tokens:
            given.append(token)
            if token.text == b")" or len(given) == 2 * len(_INCBIN_MARKS) - 1:
                break
        if [token.text for token in given[0::2]] != _INCBIN_MARKS:
            raise corrupt(self._file, first.offset, f"{_INCBIN.decode()} takes an array, a file and three numbers")
        name, location, offset, nbytes, _ = (token.text for token in given[1::2])
        place = Placement(location, offset.strip(b'"'), nbytes.strip(b'"'), self._file, first.offset)
        self._found.add_included(name.strip(b'"').decode("latin-1"), place)
        self._forget()


def _embedded(file: MappedFile, directive: Token) -> Placement | None:
    """What an #embed is for: so many bytes of a file, from some byte on. None for anything else."""
    found = _EMBEDDED_BYTES.fullmatch(without_comments(directive.text))
    if found is None:
        return None
    return Placement(found["location"], found["offset"], found["nbytes"], file, directive.offset)
