"""How values out of files are told in messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nibblecast.converters.errors import CorruptFile, brief, line
from tests.growth import assert_linear, ends


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (1 << 8000, "an integer of 8001 bits"),
        (0.5, "0.5"),
        (None, "None"),
        ("a\nb", r"'a\nb'"),
        ("x" * 1_000_000, "'" + "x" * 80 + "'…"),
        (b"\0" * 100, repr(b"\0" * 80) + "…"),
        ((2, 3), "(2, 3)"),
        ((2,), "(2,)"),
        ([1] * 9, "[1, 1, 1, 1, 1, 1, 1, 1, …]"),
        ([10**400], "[an integer of 1329 bits]"),
        (((1, 2), {}), "(a tuple of 2, a dict of 0)"),
        (object(), "a value of type object"),
        ("\ud800", r"'\ud800'"),
    ],
)
def test_brief(value: object, text: str) -> None:
    assert brief(value) == text


def test_brief_does_not_look_into_what_nests() -> None:
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    with ends():
        assert brief(value) == "(a tuple of 2, a tuple of 2)"


def test_brief_runs_nothing_of_a_class() -> None:
    class Text(str):
        __slots__ = ()

        def __repr__(self) -> str:
            raise AssertionError

        __str__ = __repr__

    assert brief(Text("x")) == "a value of type Text"


def test_a_line_is_of_limited_length_and_keeps_both_ends() -> None:
    assert line("short") == "short"
    assert line("a\nb\x1b") == r"a\nb\x1b"
    assert line("b" + "x" * 1_000_000 + "e", 20) == "bxxxxxxxxx… (1000002 characters) …xxxxxxxxxe"
    assert len(line("\U000e0001" * 1_000_000)) < 300


def test_errors_shorten_each_of_their_parts() -> None:
    """A name of a million characters does not push out what is wrong, nor what to do."""
    error = CorruptFile(f"has no '{'k' * 1_000_000}': leave it out", path=Path("p" * 5_000), tensor="t" * 1_000_000)
    text = str(error)
    assert len(text) < 3_000
    assert text.startswith("ppp")
    assert "tensor 'ttt" in text
    assert "(1000000 characters)" in text
    assert text.endswith("kkk': leave it out")


def test_shortening_takes_time_in_proportion_to_the_text() -> None:
    for character in ("a", "\n", "\ud800", "\u202e"):

        def make(count: int, character: str = character) -> Callable[[], object]:
            text = character * count
            return lambda: line(text)

        assert_linear(make, 1_000_000)
