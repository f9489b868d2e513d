"""Names that nothing else has: those of counting up to a free one, without the counting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.converters.names import UniqueNames
from tests.growth import assert_linear

WISHES = st.text("ab_1:", max_size=4)


def counted(taken: list[str], wishes: list[str], separator: str) -> list[str]:
    """What each wish gets where every one begins to count at 1."""
    known, given = set(taken), []
    for wish in wishes:
        name, number = wish, 0
        while name in known:
            number += 1
            name = f"{wish}{separator}{number}"
        known.add(name)
        given.append(name)
    return given


@given(taken=st.lists(WISHES), wishes=st.lists(WISHES, max_size=30), separator=st.sampled_from(["_", ":"]))
def test_names_are_those_that_counting_finds(taken: list[str], wishes: list[str], separator: str) -> None:
    names = UniqueNames(taken, separator)
    assert [names.fresh(wish) for wish in wishes] == counted(taken, wishes, separator)


def of_one_wish(count: int) -> Callable[[], object]:
    def run() -> None:
        names = UniqueNames()
        for _ in range(count):
            names.fresh("add")

    return run


def past_those_that_are_taken(count: int) -> Callable[[], object]:
    taken = ["add", *(f"add_{number}" for number in range(1, count))]

    def run() -> None:
        names = UniqueNames(taken)
        for _ in range(count):
            names.fresh("add")

    return run


@pytest.mark.parametrize("make", [of_one_wish, past_those_that_are_taken], ids=lambda make: make.__name__)
def test_many_names_take_time_in_proportion(make: Callable[[int], Callable[[], object]]) -> None:
    assert_linear(make, 2000)
