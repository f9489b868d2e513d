"""A pickle machine that executes nothing: names stay names, and what they would make stays a record of its parts.

All opcodes of protocols 0 to 5 (Python 3.11, pickletools). What a pickle may name is in
`formats.pytorch.pickle.globals`; a few constructors of plain data, given there, are the only functions that run.
Everything is bounded by the length of the pickle: lengths are checked before anything is read, what takes more than one
opcode's share is counted (`formats.pytorch.pickle.limits`), and keys are such that hashing them takes no time
(`formats.pytorch.pickle.records.key_of`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.formats.pytorch.pickle.globals import checked_global, made
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import AttributedDict, Global, UnknownObject, key_of, reason_of

#: Makes a value of a persistent id; raises CorruptFile where it is none.
PersistentLoad = Callable[[Any], Any]

_MOST_INTEGER_BYTES = 1 << 10
_MOST_DIGITS = 2467  # of as many bytes
_LINE_BYTES = 1 << 12
_HIGHEST_PROTOCOL = 5
_MARK = object()
_STOP = ord(".")


class Unpickler:
    """Unpickles values from `data`, one after the other, beginning at `position`, which is behind each afterwards.

    `load` raises CorruptFile where the pickle is damaged, names what it must not or asks for more than `limits` allow,
    Unsupported for extension codes.
    """

    def __init__(self, data: memoryview, persistent_load: PersistentLoad, limits: Limits, position: int = 0) -> None:
        self.position = position
        self._data = data
        self._persistent_load = persistent_load
        self._limits = limits
        self._begin = position
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def load(self) -> Any:
        """The value of the next pickle."""
        self._stack, self._memo, self._begin = [], [], self.position
        try:
            value = self._run()
        except MemoryError:
            raise CorruptFile(f"its pickle takes more memory than there is before byte {self.position}") from None
        except (IndexError, ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError) as error:
            raise CorruptFile(f"its pickle is damaged before byte {self.position} ({reason_of(error)})") from None
        self._limits.read += self.position - self._begin
        return value

    def spend(self, nbytes: int) -> None:
        """Counts bytes that are about to be made of values that are here already."""
        self._limits.spend(nbytes, self.position - self._begin)

    def _run(self) -> Any:
        operations, data = self._OPERATIONS, self._data
        while True:
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                return self._pop()
            operation = operations.get(opcode)
            if operation is None:
                raise CorruptFile(f"its pickle has the unknown opcode {opcode} at byte {self.position - 1}")
            operation(self)

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _take(self, count: int) -> memoryview:
        begin = self.position
        self.position = end = begin + count
        if count < 0 or end > len(self._data):
            raise CorruptFile(f"its pickle ends at byte {len(self._data)}, where {count} more after {begin} are due")
        return self._data[begin:end]

    def _line(self) -> bytes:
        end = self.position
        while end < len(self._data):
            found = bytes(self._data[end : end + _LINE_BYTES]).find(b"\n")
            if found >= 0:
                line = bytes(self._data[self.position : end + found])
                self.position = end + found + 1
                return line
            end += _LINE_BYTES
        raise CorruptFile(f"its pickle has a line at byte {self.position} that does not end")

    def _number(self, nbytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(nbytes), "little", signed=signed)

    def _push_byte(self) -> None:
        self._stack.append(self._data[self.position])
        self.position += 1

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is due")
        return value

    def _discard(self) -> None:
        self._stack.pop()

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value is due")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        values = self._stack[position + 1 :]
        del self._stack[position:]
        return values

    def _text(self, count: int) -> None:
        self._stack.append(str(self._take(count), "utf-8", "surrogatepass"))

    def _bytes(self, count: int) -> None:
        self._stack.append(bytes(self._take(count)))

    def _integer(self, count: int) -> None:
        if count > _MOST_INTEGER_BYTES:
            raise ValueError(f"an integer of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _decimal_integer(self) -> None:
        line = self._line()
        if line in (b"00", b"01"):
            self._push(line == b"01")
        else:
            self._push(_integer_of(line.removesuffix(b"L")))

    def _quoted(self) -> None:
        line = self._line().strip()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string without quotes")
        self._push(line[1:-1].decode("unicode_escape"))

    def _get(self, index: int) -> None:
        if index < 0 or self._memo[index] is _MARK:
            raise IndexError("nothing is remembered under that number")
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        memo, value = self._memo, self._top()
        if index == len(memo):  # what all picklers write
            memo.append(value)
        elif 0 <= index < len(memo):
            memo[index] = value
        elif 0 <= index < self.position - self._begin:  # some numbers are left out where nothing refers to them
            memo += [_MARK] * (index - len(memo))
            memo.append(value)
        else:
            raise ValueError("a number to remember a value by that is larger than the pickle")

    def _global_of_lines(self) -> Global:
        module, name = self._line().decode(), self._line().decode()
        return checked_global(module, name, self.spend)

    def _global_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._push(checked_global(module, name, self.spend))

    def _make(self, maker: Any, arguments: Any, keywords: Any = None) -> None:
        if not isinstance(maker, Global):
            raise TypeError(f"a call needs a name, not {type(maker).__name__}")
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict | None):
            raise TypeError("a call without arguments")
        self._push(made(maker, arguments, keywords or {}, self.spend))

    def _reduce(self) -> None:
        arguments, maker = self._pop(), self._pop()
        self._make(maker, arguments)

    def _new_object_with_keywords(self) -> None:
        keywords, arguments, maker = self._pop(), self._pop(), self._pop()
        self._make(maker, arguments, keywords)

    def _instance(self) -> None:
        maker = self._global_of_lines()
        self._make(maker, tuple(self._pop_to_mark()))

    def _object(self) -> None:
        maker, *arguments = self._pop_to_mark()
        self._make(maker, tuple(arguments))

    def _build(self) -> None:
        state, built = self._pop(), self._top()
        if isinstance(built, UnknownObject):
            built.state = state
        elif isinstance(built, AttributedDict):
            built.attributes = state
        elif not isinstance(state, dict | None):  # attributes that a user has set on a tensor are of no use here
            raise TypeError(f"a state needs an object, not {type(built).__name__}")

    def _append(self, values: list[Any]) -> None:
        onto = self._top()
        if isinstance(onto, list):
            onto.extend(values)
        elif isinstance(onto, UnknownObject):
            onto.items.extend(values)
        else:
            raise TypeError(f"appending to {type(onto).__name__}")

    def _append_one(self) -> None:
        value = self._pop()
        self._append([value])

    def _set_items(self, values: list[Any]) -> None:
        onto = self._top()
        entries = onto.entries if isinstance(onto, UnknownObject) else onto
        if not isinstance(entries, dict):
            raise TypeError(f"setting items of {type(onto).__name__}")
        entries.update(self._pairs(values))

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _add_items(self) -> None:
        values, onto = self._pop_to_mark(), self._top()
        if not isinstance(onto, set):
            raise TypeError(f"adding items to {type(onto).__name__}")
        onto.update(self._keys(values))

    def _keys(self, values: list[Any]) -> Iterator[Any]:
        return (key_of(value, self.spend) for value in values)

    def _pairs(self, values: list[Any]) -> Iterator[tuple[Any, Any]]:
        return zip(self._keys(values[::2]), values[1::2], strict=True)

    def _tuple(self, count: int) -> None:
        values = self._stack[-count:]
        if len(values) < count:
            raise IndexError("fewer values than a tuple is of")
        for value in values:
            if value is _MARK:
                raise ValueError("a mark where a value is due")
        self._stack[-count:] = (tuple(values),)

    def _persistent(self, identifier: Any) -> None:
        self._push(self._persistent_load(identifier))

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if protocol > _HIGHEST_PROTOCOL:
            raise ValueError(f"protocol {protocol}")

    def _refuse_extension(self) -> None:
        raise Unsupported("its pickle has codes of a private registry (EXT), whose meaning is not in the file")

    def _refuse_buffers(self) -> None:
        raise Unsupported("its pickle has buffers that are not in the file (NEXT_BUFFER): save it without a callback")

    #: What each opcode does.
    _OPERATIONS: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(code): operation
        for code, operation in {
            "\x80": _protocol,
            "\x95": lambda self: self._take(8) and None,  # FRAME: a length that says nothing here
            # numbers and singletons
            "I": _decimal_integer,
            "L": _decimal_integer,
            "F": lambda self: self._push(float(self._line())),
            "G": lambda self: self._push(struct.unpack(">d", self._take(8))[0]),
            "J": lambda self: self._push(self._number(4, signed=True)),
            "K": _push_byte,
            "M": lambda self: self._push(self._number(2)),
            "\x8a": lambda self: self._integer(self._byte()),
            "\x8b": lambda self: self._integer(self._number(4, signed=True)),
            "N": lambda self: self._push(None),
            "\x88": lambda self: self._push(True),
            "\x89": lambda self: self._push(False),
            # texts and bytes
            "S": _quoted,
            "T": lambda self: self._push(str(self._take(self._number(4, signed=True)), "latin-1")),
            "U": lambda self: self._push(str(self._take(self._byte()), "latin-1")),
            "V": lambda self: self._push(self._line().decode("raw_unicode_escape")),
            "X": lambda self: self._text(self._number(4)),
            "\x8c": lambda self: self._text(self._byte()),
            "\x8d": lambda self: self._text(self._number(8)),
            "B": lambda self: self._bytes(self._number(4)),
            "C": lambda self: self._bytes(self._byte()),
            "\x8e": lambda self: self._bytes(self._number(8)),
            "\x96": lambda self: self._push(bytearray(self._take(self._number(8)))),
            # the stack and the memo
            "(": lambda self: self._push(_MARK),
            "0": _discard,
            "1": lambda self: self._pop_to_mark() and None,
            "2": lambda self: self._push(self._top()),
            "g": lambda self: self._get(_integer_of(self._line())),
            "h": lambda self: self._get(self._byte()),
            "j": lambda self: self._get(self._number(4)),
            "p": lambda self: self._put(_integer_of(self._line())),
            "q": lambda self: self._put(self._byte()),
            "r": lambda self: self._put(self._number(4)),
            "\x94": lambda self: self._put(len(self._memo)),
            # containers
            "]": lambda self: self._push([]),
            "}": lambda self: self._push({}),
            ")": lambda self: self._push(()),
            "\x8f": lambda self: self._push(set()),
            "l": lambda self: self._push(self._pop_to_mark()),
            "d": lambda self: self._push(dict(self._pairs(self._pop_to_mark()))),
            "t": lambda self: self._push(tuple(self._pop_to_mark())),
            "\x85": lambda self: self._tuple(1),
            "\x86": lambda self: self._tuple(2),
            "\x87": lambda self: self._tuple(3),
            "\x91": lambda self: self._push(frozenset(self._keys(self._pop_to_mark()))),
            "a": _append_one,
            "e": lambda self: self._append(self._pop_to_mark()),
            "s": _set_item,
            "u": lambda self: self._set_items(self._pop_to_mark()),
            "\x90": _add_items,
            # names and what they would make
            "c": lambda self: self._push(self._global_of_lines()),
            "\x93": _global_of_stack,
            "R": _reduce,
            "\x81": _reduce,
            "\x92": _new_object_with_keywords,
            "i": _instance,
            "o": _object,
            "b": _build,
            "P": lambda self: self._persistent(self._line().decode()),
            "Q": lambda self: self._persistent(self._pop()),
            "\x82": _refuse_extension,
            "\x83": _refuse_extension,
            "\x84": _refuse_extension,
            "\x97": _refuse_buffers,
            "\x98": _refuse_buffers,
        }.items()
    }


def _integer_of(line: bytes) -> int:
    if len(line) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(line)} digits")
    return int(line)
