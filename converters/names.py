"""Unique names: the one way in which all formats make them."""

from __future__ import annotations

from collections.abc import Iterable


class UniqueNames:
    """Hands out names that were not taken and never handed out before: the wanted one, or that with a number behind
    it. The number goes on from the last one that a wish got, instead of from 1: a graph wants some names once for each
    of its operators, and counting up to a free one each time would be quadratic."""

    def __init__(self, taken: Iterable[str] = (), separator: str = "_") -> None:
        self._taken = set(taken)
        self._separator = separator
        self._numbers: dict[str, int] = {}

    def fresh(self, wanted: str) -> str:
        """`wanted`, with _1, _2, … appended while it is taken; the name is taken from then on."""
        name, number = wanted, self._numbers.get(wanted, 0)
        while name in self._taken:
            number += 1
            name = f"{wanted}{self._separator}{number}"
        self._numbers[wanted] = number
        self._taken.add(name)
        return name


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: it has no lone surrogates, which Python's JSON reads and no other library's."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
