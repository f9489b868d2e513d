"""Values that readers find hard, and edits of lists; shared by the mutators of all formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

#: Where sizes, counts and indices change their nature: of bits, bytes, words, files and memory.
INTEGERS = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1000, 4096),
    *((1 << bits) + step for bits in (15, 16, 24, 31, 32, 33, 53, 62, 63, 64, 128) for step in (-1, 0, 1)),
    *(10**18, 10**310, -1, -2, -8, -128, -(1 << 31), -(1 << 63), -(1 << 64)),
)
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e-45, 1e-310, 3.4e38, 1e39, 1e308)
TEXTS = (
    *("", " ", ".", "..", "/", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "C:\\x", "\0", "a\0b"),
    *("\ud800", "\udfff\ud800", "\x1b[31m", "\n", "\r\n", "\t", "é", "重み", "🎉", "\u202e", "\ufeff", "%s%n", "{}"),
    *("{0.__class__}", "nan", "inf", "-1", "1e999", "0x10", "٣", "None", "null", "true", "__proto__", "__metadata__"),
    *("*/", "??/", '"', "'", "w" * 300, "重" * 200, "x" * 5000, "a." * 500, "weight", "F32", "int4", "config.json"),
)
_MOST_COPIES = 64


def integer(random: Random, value: int = 0, most: int | None = None) -> int:
    """Another integer: a hard one, or one near `value`; wrapped to 0 … `most` where that is given."""
    near = (value + 1, value - 1, value * 2, value // 2, -value, value + 8, value ^ (1 << random.randrange(40)))
    chosen = random.choice(INTEGERS if random.random() < 0.6 else near)
    return chosen if most is None else chosen % (most + 1)


def real(random: Random) -> float:
    """A number of floating point."""
    return random.choice(REALS)


def text(random: Random, value: str = "") -> str:
    """Another text: a hard one, or `value` with a part of it changed."""
    if random.random() < 0.6 or not value:
        return random.choice(TEXTS)
    at = random.randrange(len(value))
    return random.choice(
        (
            value[:at] + random.choice(TEXTS) + value[at:],
            value[:at] + value[at + 1 :],
            value[:at] + chr(random.randrange(32, 127)) + value[at + 1 :],
            value[:at],
            value + value,
            value.swapcase(),
        )
    )


def edited(random: Random, items: Sequence[T], others: Sequence[T], change: Callable[[T], T]) -> list[T]:
    """The items with one of them changed, mostly; or with one dropped, doubled, moved, copied many times over, or taken
    from `others`."""
    made = list(items)
    if not made:
        return [random.choice(others)] if others else made
    at, to = random.randrange(len(made)), random.randrange(len(made))
    choice = random.randrange(12)
    if choice == 0:
        del made[at]
    elif choice == 1:
        made.insert(to, made[at])
    elif choice == 2:
        made[at], made[to] = made[to], made[at]
    elif choice == 3:
        made[at] = made[to]
    elif choice == 4:
        made[at:at] = [made[at]] * random.randrange(2, _MOST_COPIES)
    elif choice == 5 and others:
        made.insert(at, random.choice(others))
    elif choice == 6:
        del made[min(at, to) : max(at, to)]
    else:
        made[at] = change(made[at])
    return made
