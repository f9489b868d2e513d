"""Changes of bytes, without regard to what they mean."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.fuzz.mutators.values import integer

_MOST_EDITS = 6
_LONGEST_RUN = 64


def havoc(data: bytes, other: bytes, random: Random) -> bytes:
    """Some edits, one after the other; `other` is what parts may come from."""
    made = bytearray(data)
    for _ in range(random.randrange(1, _MOST_EDITS)):
        random.choice(_EDITS)(made, other, random)
    return bytes(made)


def _flip(made: bytearray, _: bytes, random: Random) -> None:
    if made:
        made[random.randrange(len(made))] ^= 1 << random.randrange(8)


def _set(made: bytearray, _: bytes, random: Random) -> None:
    if made:
        made[random.randrange(len(made))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _number(made: bytearray, _: bytes, random: Random) -> None:
    width = random.choice((1, 2, 4, 8))
    at = random.randrange(len(made) + 1)
    made[at : at + width] = integer(random, most=(1 << 8 * width) - 1).to_bytes(width, "little")


def _digits(made: bytearray, _: bytes, random: Random) -> None:
    places = [at for at, byte in enumerate(made[: 1 << 12]) if 0x30 <= byte <= 0x39]
    if places:
        at = random.choice(places)
        made[at : at + 1] = str(integer(random)).encode()


def _cut(made: bytearray, _: bytes, random: Random) -> None:
    at = random.randrange(len(made) + 1)
    del made[at : at + random.randrange(_LONGEST_RUN)]


def _repeat(made: bytearray, _: bytes, random: Random) -> None:
    at = random.randrange(len(made) + 1)
    part = made[at : at + random.randrange(_LONGEST_RUN)]
    made[at:at] = part * random.randrange(1, 8)


def _insert(made: bytearray, _: bytes, random: Random) -> None:
    at = random.randrange(len(made) + 1)
    made[at:at] = random.randbytes(random.randrange(1, 16))


def _splice(made: bytearray, other: bytes, random: Random) -> None:
    at, to = random.randrange(len(made) + 1), random.randrange(len(other) + 1)
    length = random.randrange(4 * _LONGEST_RUN)
    made[at : at + length] = other[to : to + length]


def _truncate(made: bytearray, _: bytes, random: Random) -> None:
    del made[random.randrange(len(made) + 1) :]


_EDITS: tuple[Callable[[bytearray, bytes, Random], None], ...] = (
    *(_flip, _flip, _set, _set, _number, _number, _digits, _cut, _repeat, _insert, _splice),
    _truncate,
)
