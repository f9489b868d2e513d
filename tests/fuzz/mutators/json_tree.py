"""Changes of JSON, value by value: in documents, in the headers of safetensors files, and in lines of reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, real, text

_DEPTH = 3000
_HEADER_LENGTH = 8


class Pairs(list[tuple[str, Any]]):
    """An object as its members in order, of which two may have one name."""


@dataclass(frozen=True)
class Raw:
    """What is written as it is, be it JSON or not."""

    text: str


#: What json.loads and what is done with its result may stumble over.
RAW = tuple(
    Raw(text)
    for text in (
        *("[" * _DEPTH + "]" * _DEPTH, '{"a":' * _DEPTH + "1" + "}" * _DEPTH, "9" * 5000, "-" + "9" * 400, "1e400"),
        *("-0", "01", "NaN", "-Infinity", "", "nul", "'x'", '"\\ud800"', '"\\u0000"', "/**/1", "1.0", "0.5", "\ufeff"),
    )
)
_SCALARS = (None, True, False, 0, -1, 1.5, "", "x", Raw("[]"), Raw("{}"))


def document(data: bytes, other: bytes, random: Random) -> bytes:
    """A JSON document with one value changed."""
    try:
        return _dumped(_changed(_parsed(data), _nodes(_try(other)), random))
    except (ValueError, RecursionError):
        return havoc(data, other, random)


def lines(data: bytes, other: bytes, random: Random) -> bytes:
    """Lines of JSON, of which one is changed, dropped, doubled, cut or replaced."""

    def change(line: bytes) -> bytes:
        return document(line, other.partition(b"\n")[0], random)

    return b"\n".join(edited(random, data.split(b"\n"), other.split(b"\n"), change))


def safetensors(data: bytes, other: bytes, random: Random) -> bytes:
    """A safetensors file with one value of its header changed; the length of the header is right, mostly."""
    length = int.from_bytes(data[:_HEADER_LENGTH], "little")
    rest = _HEADER_LENGTH + int.from_bytes(other[:_HEADER_LENGTH], "little")
    if not _HEADER_LENGTH < _HEADER_LENGTH + length <= len(data):
        return havoc(data, other, random)
    header = document(data[_HEADER_LENGTH : _HEADER_LENGTH + length], other[_HEADER_LENGTH:rest], random)
    header += b" " * (-len(header) % 8 if random.random() < 0.5 else 0)
    claimed = len(header) if random.random() < 0.95 else integer(random, len(header), (1 << 64) - 1)
    payload = data[_HEADER_LENGTH + length :]
    if random.random() < 0.1:
        payload = havoc(payload, other, random)
    return claimed.to_bytes(_HEADER_LENGTH, "little") + header + payload


def _parsed(data: bytes) -> Any:
    return json.loads(data, object_pairs_hook=Pairs)


def _try(data: bytes) -> Any:
    try:
        return _parsed(data)
    except (ValueError, RecursionError):
        return None


def _nodes(value: Any) -> list[Any]:
    found = [value]
    for node in found:  # which grows meanwhile
        if isinstance(node, Pairs):
            found += [member for _, member in node]
        elif isinstance(node, list):
            found += node
    return found


def _changed(value: Any, others: list[Any], random: Random) -> Any:
    """The value with a change somewhere in it: each level is as likely as the levels below it together."""
    children = list(value) if isinstance(value, list) else []
    if children and random.random() < 0.75:
        at = random.randrange(len(children))
        if isinstance(value, Pairs):
            name, child = children[at]
            children[at] = (name, _changed(child, others, random))
            return Pairs(children)
        children[at] = _changed(children[at], others, random)
        return children
    return _other_value(value, others, random)


def _other_value(value: Any, others: list[Any], random: Random) -> Any:
    choice = random.random()
    if choice < 0.08:
        return random.choice(RAW)
    if choice < 0.16:
        return random.choice(_SCALARS)
    if choice < 0.24 and others:
        return random.choice(others)
    if isinstance(value, Pairs):
        members = [member for node in others if isinstance(node, Pairs) for member in node]
        return Pairs(edited(random, value, members, lambda member: (text(random, member[0]), member[1])))
    if isinstance(value, list):
        return edited(random, value, others, lambda each: _other_value(each, others, random))
    if isinstance(value, bool) or value is None:
        return random.choice(_SCALARS)
    if isinstance(value, int):
        return integer(random, value)
    if isinstance(value, float):
        return real(random)
    return text(random, value) if isinstance(value, str) else value


def _dumped(value: Any) -> bytes:
    return _text_of(value).encode("utf-8", "surrogatepass")


def _text_of(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{_text_of(member)}" for name, member in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text_of, value)) + "]"
    return json.dumps(value)
