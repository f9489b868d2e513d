"""Changes of C sources, token by token."""

from __future__ import annotations

import re
from random import Random

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, text

_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|/\*.*?\*/|//[^\n]*|[\w.]+|\s+|.', re.DOTALL)
_NUMBER = re.compile(rb"(0x)?[\da-fA-F.]+[uUlLf]*|-?\d+")
_STRAY = (b"/*", b"*/", b'"', b"{", b"}", b";", b"#if 0\n", b"#endif\n", b"\\\n", b"??/", b"\0", b"-", b",", b"0x")
_MOST_TOKENS = 1 << 15


def source(data: bytes, other: bytes, random: Random) -> bytes:
    """A source with a few tokens changed."""
    tokens = _TOKEN.findall(data)[:_MOST_TOKENS]
    if not tokens:
        return havoc(data, other, random)
    others = _TOKEN.findall(other)[:_MOST_TOKENS]
    for _ in range(random.choice((1, 1, 2, 4))):
        tokens = edited(random, tokens, others, lambda token: _other_token(token, random))
    return b"".join(tokens)


def _other_token(token: bytes, random: Random) -> bytes:
    choice = random.random()
    if choice < 0.1:
        return random.choice(_STRAY)
    if _NUMBER.fullmatch(token):
        value = integer(random, int(token) if token.isdigit() and len(token) < 40 else 1)
        return random.choice((b"%d" % value, b"0x%x" % abs(value), b"%dU" % abs(value), b"1.5e999f", b"0x1.8p+3f"))
    return text(random, token.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
