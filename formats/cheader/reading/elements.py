"""Initialisers -> elements: the text of arrays as NumPy arrays, at the speed of a table look-up where its lines are as
the writer makes them, and literal by literal where somebody has reformatted them.

The writer gives every literal of an array the same number of characters and every line the same number of literals, so
that any range of elements is found without reading what comes before it. Each fast path accepts only characters whose
meaning it knows at their places; whatever else there is goes through the slow one, which knows all of C's literals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile
from nibblecast.formats.cheader.reading.source import ELEMENT_TYPES, ArrayText
from nibblecast.formats.cheader.reading.tokens import Tokens, integer_of, string_bytes, without_comments

Elements = NDArray[Any]

_CHUNK_ELEMENTS = 1 << 14
_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 1 << 12
_LONGEST_INDENT = 1 << 8
_BLANKS = b" \t\r\n\v\f"
_MOST_KNOWN = 1 << 16

_LAST_BLANKS = re.compile(rb"(?<=\n) *\Z")
_SPLIT_LITERAL = re.compile(rb"[\w.]\s+[\w.]")
_PYTHON_ESCAPES = re.compile(rb'(?:[^\\]++|\\[0-3][0-7]{2}|\\[0-7]{1,2}(?![0-7])|\\[abfnrtv\\"\'])*+', re.DOTALL)
_HEX = re.compile(rb"0[xX]([0-9A-Fa-f]+)[uUlL]*,")
_DECIMAL = re.compile(rb" *-?[0-9]+,")
_FLOAT = re.compile(rb" *-?[0-9]+\.[0-9]+[eE][+-][0-9][0-9]([fF]?),")
_FLOAT_LITERAL = re.compile(rb"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)[fFlL]?")
_HEX_FLOAT_LITERAL = re.compile(rb"(0[xX][0-9A-Fa-f.]+[pP][+-]?[0-9]+)[fFlL]?")
_OCTAL = re.compile(rb"(?:\A|,) *[+-]?0[0-9]+(?=,)")
_LEAST = re.compile(rb"\(?-([0-9]+)[uUlL]*-1[uUlL]*\)?")
_HALVES = re.compile(
    rb"\bNIBBLECAST_(U?)INT64\s*+\(\s*+0[xX]([0-9A-Fa-f]{1,8})[uUlL]*+\s*+,\s*+0[xX]([0-9A-Fa-f]{1,8})[uUlL]*+\s*+\)"
)
_NAMED_INTEGERS = {f"INT{bits}_MIN".encode(): -(1 << (bits - 1)) for bits in (8, 16, 32, 64)} | {
    **{f"INT{bits}_MAX".encode(): (1 << (bits - 1)) - 1 for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}_MAX".encode(): (1 << bits) - 1 for bits in (8, 16, 32, 64)},
}
#: Where rounding to a float of so many bytes gives infinity.
_TOO_LARGE = {4: 2.0**128 - 2.0**103, 8: float("inf")}
_NAMED_FLOATS = dict.fromkeys((b"NIBBLECAST_NAN", b"NAN"), float("nan")) | dict.fromkeys(
    (b"NIBBLECAST_INF", b"INFINITY", b"HUGE_VALF", b"HUGE_VAL"), float("inf")
)


@dataclass(frozen=True, slots=True)
class Lines:
    """Where the elements lie: from byte `start` of the file lines of `before`, `per_line` literals, and `after`. A
    literal takes `width` characters, its comma included; the last line may have fewer of them."""

    start: int
    before: bytes
    after: bytes
    width: int
    per_line: int
    count: int

    @property
    def stride(self) -> int:
        """Characters of a whole line."""
        return len(self.before) + self.per_line * self.width + len(self.after)

    @classmethod
    def of(cls, start: int, stop: int, before: bytes, after: bytes, width: int, per_line: int) -> Lines | None:
        """Those that fill bytes [start, stop); None when there are none such."""
        around = len(before) + len(after)
        whole, rest = divmod(stop - start, around + per_line * width)
        more, odd = divmod(rest - around, width) if rest else (0, 0)
        if odd or more < 0 or (rest and not 0 < more < per_line):
            return None
        return cls(start, before, after, width, per_line, whole * per_line + more)


def lines_of(array: ArrayText) -> Lines | None:
    """The lines of an array that is laid out as the writer does; None for any other."""
    if array.is_string:
        return _lines_of_strings(array)
    if not array.plain:
        return None
    view, start = array.file.view, array.start
    head = view[start : min(array.stop, start + _LONGEST_LINE)].tobytes()
    ending = b"\r\n" if head.startswith(b"\r\n") else b"\n"
    line = head[len(ending) :].partition(b"\n")[0] + b"\n"
    per_line = line.count(b",")
    if not head.startswith(ending) or not line.endswith(b"," + ending):
        return None
    first = line.index(b",")
    width = line.index(b",", first + 1) - first if per_line > 1 else first + 1
    indent = first + 1 - width
    if indent < 0 or indent + per_line * width + len(ending) != len(line):
        return None
    return Lines.of(start + len(ending), array.stop, b" " * indent, ending, width, per_line)


def _lines_of_strings(array: ArrayText) -> Lines | None:
    """The lines of string literals, each of octal escapes of three digits, one below the other."""
    view = array.file.view
    indent = _LAST_BLANKS.search(view[max(0, array.start - _LONGEST_INDENT) : array.start].tobytes())
    head = view[array.start : min(array.stop, array.start + _LONGEST_LINE)].tobytes()
    line, _, rest = head.partition(b"\n")
    ending = b'"\r\n' if line.endswith(b"\r") else b'"\n'
    characters = len(line) + 1 - (len(ending) if rest else 2) - 1
    # behind the last literal there is a line end, too, if there is anything
    if indent is None or characters < 4 or characters % 4 or array.stop + len(ending) - 1 > view.size:
        return None
    before = indent[0] + b'"'
    stop = array.stop + len(ending) - 1
    return Lines.of(array.start - len(indent[0]), stop, before, ending, 4, characters // 4)


def regular_elements(array: ArrayText, lines: Lines, first: int, last: int) -> Elements | None:
    """Elements [first, last); None where the text is not what it seemed to be."""
    out = np.empty(last - first, ELEMENT_TYPES[array.element_type])
    done = first
    for begin, cells in _cells(array, lines, first, last):
        decode = _octal if array.is_string else _elements_of_cells
        elements = None if cells is None else decode(cells, lines.width, out.dtype)
        if elements is None:
            return None
        part = elements[done - begin : last - begin]
        out[done - first : done - first + part.size] = part
        done += part.size
    return out


def all_elements(array: ArrayText) -> Elements:
    """All elements, however they are written. Raises CorruptFile with the first literal that is none."""
    if array.is_string:
        return _string_elements(array)
    text = array.file.view[array.start : array.stop].tobytes()
    text = without_comments(text).strip(_BLANKS)
    dtype = np.dtype(ELEMENT_TYPES[array.element_type])
    if dtype.itemsize == 8:
        text = _HALVES.sub(_joined, text)
    if text and not text.endswith(b","):
        text += b","
    parts: list[Elements] = []
    literals = _Literals(array.name, dtype)
    for piece in _pieces(text):
        compact = piece.translate(None, _BLANKS)
        if (split := _SPLIT_LITERAL.search(piece)) is not None:
            shown = piece[split.start() : split.end()].decode("ascii", "backslashreplace")
            raise CorruptFile(f"{array.name} has no comma in '{shown}'", path=array.file.path)
        elements = _elements_of_cells(compact, compact.index(b",") + 1, dtype)
        if elements is None and dtype.kind == "f":
            elements = _plain_floats(compact, None, dtype)
        if elements is None:
            try:
                elements = literals.elements(compact)
            except CorruptFile as error:
                error.path = array.file.path
                raise
        parts.append(elements)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _joined(halves: re.Match[bytes]) -> bytes:
    """The literal of 64 bits whose halves a macro has."""
    value = int(halves[2], 16) << 32 | int(halves[3], 16)
    return b"%d" % (value if halves[1] or value < 1 << 63 else value - (1 << 64))


def _cells(array: ArrayText, lines: Lines, first: int, last: int) -> Iterator[tuple[int, bytes | None]]:
    """The literals and commas of the lines that hold elements [first, last), in chunks, each with the position of its
    first element; None for a chunk whose indents or line ends are not such."""
    view = array.file.view
    step = max(1, _CHUNK_ELEMENTS // lines.per_line)
    whole = lines.count // lines.per_line
    for line in range(first // lines.per_line, -(-last // lines.per_line), step):
        stop = min(line + step, -(-last // lines.per_line))
        full = max(0, min(stop, whole) - line)
        begin = lines.start + line * lines.stride
        block = view[begin : begin + full * lines.stride].reshape(full, lines.stride)
        cells = _stripped(block, lines)
        if stop > whole and cells is not None:
            begin += full * lines.stride
            end = begin + lines.stride - (lines.per_line - lines.count % lines.per_line) * lines.width
            rest = _stripped(view[begin:end].reshape(1, -1), lines)
            cells = None if rest is None else cells + rest
        yield line * lines.per_line, cells


def _stripped(block: NDArray[np.uint8], lines: Lines) -> bytes | None:
    """The literals of some lines; None when what is around them is not as it should be."""
    start, stop = len(lines.before), block.shape[1] - len(lines.after)
    around = np.frombuffer(lines.before, np.uint8), np.frombuffer(lines.after, np.uint8)
    if not ((block[:, :start] == around[0]).all() and (block[:, stop:] == around[1]).all()):
        return None
    return block[:, start:stop].tobytes()


def _pieces(text: bytes) -> Iterator[bytes]:
    """Text in pieces that end in a comma."""
    start = 0
    while start < len(text):
        stop = text.find(b",", min(start + _PIECE_BYTES, len(text) - 1)) + 1
        yield text[start:stop]
        start = stop


def _elements_of_cells(text: bytes, width: int, dtype: np.dtype[Any]) -> Elements | None:
    """Elements whose literals, commas included, are all of one width; None when they are not, or of another kind."""
    if not text or len(text) % width:
        return None
    cell = text[:width]
    if dtype.kind == "f":
        match = _FLOAT.fullmatch(cell)
        elements = None if match is None else _floats(text, match, dtype)
        return _plain_floats(text, width, dtype) if elements is None else elements
    for pattern, decode in ((_HEX, _hexadecimal), (_DECIMAL, _decimal)):
        if (match := pattern.fullmatch(cell)) is not None:
            return decode(text, match, dtype)
    return None


def _plain_floats(text: bytes, width: int | None, dtype: np.dtype[Any]) -> Elements | None:
    """Decimal floats, of one width if that is given; None where there is anything else among them."""
    if width is not None:
        ends = np.frombuffer(text, np.uint8)[width - 1 :: width]
        if text.count(b",") != ends.size or not (ends == ord(",")).all():
            return None
    text = text.replace(b"f,", b",").replace(b"F,", b",")
    if text.translate(None, b"0123456789+-.eE, ") or _OCTAL.search(text):
        return None
    try:
        values = np.array(list(map(float, text[:-1].split(b","))))
    except ValueError:
        return None
    with np.errstate(over="ignore"):
        elements = values.astype(dtype)
    return elements if bool(np.isfinite(elements).all()) else None


def _classes(*classes: tuple[bytes, int]) -> bytes:
    """A table for bytes.translate: to every character the class given, and 0xFF to all others."""
    table = bytearray(b"\xff" * 256)
    for characters, value in classes:
        for character in characters:
            table[character] = value
    return bytes(table)


def _digits(characters: bytes, base: int, value: int = 0) -> tuple[tuple[bytes, int], ...]:
    return tuple((bytes([character]), base + value + i) for i, character in enumerate(characters))


_HEX_CLASSES = _classes(
    *_digits(b"0123456789", 0),
    *_digits(b"abcdef", 0, 10),
    *_digits(b"ABCDEF", 0, 10),
    *((b"xX", 0x20), (b"uU", 0x30), (b"lL", 0x40), (b",", 0x50)),
)
_ESCAPE_CLASSES = _classes(*_digits(b"01234567", 0), (b"\\", 0x20))
_BLANK, _MINUS, _PLUS, _DIGIT, _DOT, _E, _F, _COMMA = 0x10, 0x20, 0x30, 0x40, 0x4F, 0x60, 0x70, 0x80
_NUMBER_CLASSES = _classes(
    *_digits(b"0123456789", _DIGIT),
    *((b" ", _BLANK), (b"-", _MINUS), (b"+", _PLUS), (b".", _DOT), (b"eE", _E), (b"fF", _F), (b",", _COMMA)),
)


def _hexadecimal(text: bytes, cell: re.Match[bytes], dtype: np.dtype[Any]) -> Elements | None:
    width, digits = len(cell[0]), len(cell[1])
    if digits > 2 * dtype.itemsize:
        return None
    classes = np.frombuffer(text.translate(_HEX_CLASSES), np.uint8)
    pattern = (classes[:width] & 0xF0).tobytes()
    rows = classes.reshape(-1, width)
    if (classes & 0xF0).tobytes() != pattern * len(rows) or rows[:, 0].any():
        return None
    values = rows[:, 2].astype(f"<u{dtype.itemsize}")
    for column in range(3, 2 + digits):
        values <<= 4
        values |= rows[:, column]
    elements = values.view(dtype)
    return None if dtype.kind == "i" and bool((elements < 0).any()) else elements


def _octal(text: bytes, width: int, dtype: np.dtype[Any]) -> Elements | None:
    classes = np.frombuffer(text.translate(_ESCAPE_CLASSES), np.uint8)
    rows = classes.reshape(-1, width)
    if (classes & 0xF8).tobytes() != b"\x20\0\0\0" * len(rows) or (rows[:, 1] > 3).any():
        return None
    values = (rows[:, 1] << 6) | (rows[:, 2] << 3) | rows[:, 3]
    return values.view(dtype)


def _decimal(text: bytes, cell: re.Match[bytes], dtype: np.dtype[Any]) -> Elements | None:
    columns = _columns(text, len(cell[0]))
    body = columns[:-1]
    if not (columns[-1] == _COMMA).all() or not _right_aligned(body) or len(body) > 20:
        return None
    leading_zero = (body[1:-1] == _DIGIT) & (body[:-2] < _DIGIT)  # which would make the number an octal one
    if leading_zero.any() or (len(body) > 1 and (body[0] == _DIGIT).any()) or (body == _DOT).any():
        return None
    if len(body) > 19 and (body[0] >= _DIGIT).any():  # uint64 does not hold all numbers of 20 digits
        return None
    values: Elements = np.zeros(body.shape[1], np.uint64 if len(body) > 9 else np.uint32)
    for column in body:
        values = values * values.dtype.type(10) + (column & np.uint8(0x0F))
    negative = (body == _MINUS).any(axis=0)
    limits = np.iinfo(dtype)
    if (values > np.where(negative, np.uint64(-int(limits.min)), np.uint64(limits.max))).any():
        return None
    return np.where(negative, -values.astype(np.int64), values.astype(np.int64)).astype(dtype)


def _floats(text: bytes, cell: re.Match[bytes], dtype: np.dtype[Any]) -> Elements | None:
    suffix = len(cell[1])
    columns = _columns(text, len(cell[0]))
    mantissa, tail = columns[: -5 - suffix], columns[-5 - suffix :]
    wanted = (_E, None, _DIGIT, _DIGIT, *((_F,) * suffix), _COMMA)
    for column, kind in zip(tail, wanted, strict=True):
        if kind is not None and not ((column & 0xF0) == kind).all():
            return None
    dots = mantissa == _DOT
    if (
        len(mantissa) > 18
        or dtype.itemsize != 4
        or not ((tail[1] == _MINUS) | (tail[1] == _PLUS)).all()
        or (tail[2:4] == _DOT).any()
        or not _right_aligned(mantissa)
        or not (dots.sum(axis=0) == 1).all()
        or dots[-1].any()
        or (dots[1:] & (mantissa[:-1] < _DIGIT)).any()
    ):
        return None
    digits, decimals = _mantissa(mantissa, dots)
    exponent = (tail[2] & 15).astype(np.int64) * 10 + (tail[3] & 15)
    power = np.where(tail[1] == _MINUS, -exponent, exponent) - decimals
    values = digits * _POWERS[power + _POWER_BIAS]
    values[(mantissa == _MINUS).any(axis=0)] *= -1
    with np.errstate(over="ignore", under="ignore"):
        below, above = (values * (1 - _DOUBT)).astype(np.float32), (values * (1 + _DOUBT)).astype(np.float32)
    # where the error of float64 might decide between two floats, the slow path does
    return below.astype(dtype) if np.array_equal(below, above) and bool(np.isfinite(below).all()) else None


def _mantissa(columns: NDArray[np.uint8], dots: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The digits as one number, exact below 2 ** 53, and how many of them follow the dot."""
    digits = np.zeros(columns.shape[1], np.int64)
    after = np.zeros(columns.shape[1], np.bool_)
    decimals = np.zeros(columns.shape[1], np.int64)
    for column, dot in zip(columns, dots, strict=True):
        decimals += after
        after |= dot
        digits = np.where(dot, digits, digits * 10 + (column & 15))
    return digits.astype(np.float64), decimals


_POWER_BIAS = 130
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(-_POWER_BIAS, _POWER_BIAS + 1)])
_DOUBT = 2e-15


def _columns(text: bytes, width: int) -> NDArray[np.uint8]:
    """The classes of the characters, shape (width, count), each row contiguous."""
    return np.ascontiguousarray(np.frombuffer(text.translate(_NUMBER_CLASSES), np.uint8).reshape(-1, width).T)


def _right_aligned(columns: NDArray[np.uint8]) -> bool:
    """Whether every number is blanks, perhaps one minus sign, and digits (or dots) to the end."""
    kinds = columns & 0xF0
    ordered = (kinds[1:] >= kinds[:-1]).all() and not ((kinds[1:] == _MINUS) & (kinds[:-1] == _MINUS)).any()
    return bool(ordered and (kinds != _PLUS).all() and (kinds[-1] == _DIGIT).all())


class _Literals(dict[bytes, Any]):
    """Literals of one array to their values; each is worked out once."""

    def __init__(self, array: str, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._array = array
        self._dtype = dtype

    def elements(self, text: bytes) -> Elements:
        """Those of literals that all end in commas, without blanks."""
        if len(self) > _MOST_KNOWN:
            self.clear()
        return np.array(list(map(self.__getitem__, text[:-1].split(b","))), self._dtype)

    def __missing__(self, literal: bytes) -> Any:
        value = self._float(literal) if self._dtype.kind == "f" else self._integer(literal)
        if value is None:
            shown = literal[:40].decode("ascii", "backslashreplace")
            raise CorruptFile(f"{self._array} holds '{shown}', which is not an element of {self._dtype}")
        self[literal] = value
        return value

    def _integer(self, literal: bytes) -> int | None:
        unsigned = literal.lstrip(b"+-")
        value = _NAMED_INTEGERS.get(unsigned, integer_of(unsigned))
        if value is None and (least := _LEAST.fullmatch(literal)) is not None and len(literal) < 50:
            return self._integer(b"-%d" % (int(least[1]) + 1))
        if value is None or len(literal) - len(unsigned) > 1:
            return None
        value = -value if literal.startswith(b"-") else value
        limits = np.iinfo(self._dtype)
        return value if limits.min <= value <= limits.max else None

    def _float(self, literal: bytes) -> float | None:
        unsigned = literal.lstrip(b"+-")
        value = _NAMED_FLOATS.get(unsigned)
        if len(literal) - len(unsigned) > 1 or len(literal) > 1 << 10:
            return None
        if value is None:
            value = _number(unsigned)
            if value is None or not isfinite(value) or value >= _TOO_LARGE[self._dtype.itemsize]:
                return None
        return -value if literal.startswith(b"-") else value


def _number(literal: bytes) -> float | None:
    """The value of a literal without a sign, of any kind that C knows; None where it is none."""
    if (integer := integer_of(literal)) is not None:
        return float(integer)
    if (decimal := _FLOAT_LITERAL.fullmatch(literal)) is not None:
        return float(decimal[1])
    if (hexadecimal := _HEX_FLOAT_LITERAL.fullmatch(literal)) is not None:
        try:
            return float.fromhex(hexadecimal[1].decode("ascii"))
        except (ValueError, OverflowError):
            return None
    return None


def _string_elements(array: ArrayText) -> Elements:
    """The bytes of string literals, without the NUL that C may add."""
    dtype = np.dtype(ELEMENT_TYPES[array.element_type])
    if dtype.itemsize != 1:
        raise CorruptFile(f"{array.name} is a string of elements wider than a byte", path=array.file.path)
    parts: list[bytes] = []
    for token in Tokens(array.file, array.start, array.stop):
        if _PYTHON_ESCAPES.fullmatch(token.text, 1, len(token.text) - 1) is not None:
            parts.append(token.text[1:-1].decode("unicode_escape").encode("latin-1"))
            continue
        value = string_bytes(token.text)
        if value is None:
            raise CorruptFile(f"{array.name} has an escape that is none of C's", path=array.file.path)
        parts.append(value)
    return np.frombuffer(b"".join(parts), dtype)
