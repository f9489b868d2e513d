"""How many threads compute."""

from __future__ import annotations

import os

import pytest

from nibblecast.converters.errors import UsageError
from nibblecast.converters.machine import THREADS, processors, threads


def test_as_many_as_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(THREADS, raising=False)
    assert threads() == processors()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_as_many_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "3")
    assert threads() == 3


@pytest.mark.parametrize("wanted", ["0", "-1", "many", ""])
def test_another_value_is_an_error(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, wanted)
    with pytest.raises(UsageError, match=f"{THREADS}={wanted}: must be a number of threads"):
        threads()
