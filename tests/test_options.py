"""Writers' options from text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Size, option
from nibblecast.converters.options import describe, parse, parse_size


@dataclass(frozen=True, slots=True)
class Options:
    layout: Literal["split", "header"] = option("split", "how many files")
    tail_padding: bool = option(False, "pad the tail")
    opset: int | None = option(None, "the opset")
    budget: Size | None = option(None, "at most this many bytes")
    prefix: str = option("", "of every name")


def test_text_becomes_the_fields_types() -> None:
    parsed = parse(
        Options,
        {"layout": "header", "tail-padding": "yes", "opset": "21", "budget": "1.5K", "prefix": "net"},
        "demo",
    )
    assert parsed == Options("header", True, 21, Size(1536), "net")


def test_typed_values_and_underscores_are_taken_as_they_are() -> None:
    assert parse(Options, {"tail_padding": True, "opset": None, "budget": 7}, "demo") == Options(
        tail_padding=True, budget=Size(7)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"color": "red"}, "format 'demo' has no option 'color': it has layout, tail-padding, opset, budget, prefix"),
        ({"layout": "both"}, "option layout of format 'demo': 'both' is not one of split, header"),
        ({"tail-padding": "maybe"}, "'maybe' is neither true nor false"),
        ({"opset": "x"}, "'x' is not a valid int"),
        ({"budget": "much"}, "'much' is not a size .e.g. 1000, 256K, 1.5M or 2G"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(Options, given, "demo")


def test_sizes() -> None:
    assert [parse_size(text, "x") for text in ("12", "1k", "2 MiB", "1G", "0.5K")] == [12, 1024, 2 << 20, 1 << 30, 512]


def test_options_describe_themselves() -> None:
    described = describe(Options)
    assert [(o.name, o.values, o.default) for o in described] == [
        ("layout", "split|header", "split"),
        ("tail-padding", "true|false", "false"),
        ("opset", "NUMBER", ""),
        ("budget", "SIZE", ""),
        ("prefix", "TEXT", ""),
    ]
    assert described[0].help == "how many files"
