"""How values out of files are told in messages."""

from __future__ import annotations

import time
from typing import Any

import pytest

from converters.errors import brief


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
    began = time.process_time()
    assert brief(value) == "(a tuple of 2, a tuple of 2)"
    assert time.process_time() - began < 1


def test_brief_runs_nothing_of_a_class() -> None:
    class Text(str):
        __slots__ = ()

        def __repr__(self) -> str:
            raise AssertionError

        __str__ = __repr__

    assert brief(Text("x")) == "a value of type Text"
