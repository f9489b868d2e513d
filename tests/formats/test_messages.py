"""Messages about what is in a file: its values are shown by `brief` only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FORMATS = Path(__file__).parents[2] / "formats"
#: PyTorch's package has rules of its own.
MODULES = sorted(path for path in FORMATS.rglob("*.py") if path.relative_to(FORMATS).parts[0] != "pytorch")


def shown_whole(tree: ast.AST) -> Iterator[ast.AST]:
    """Values that messages of errors show by `repr`, which makes all of a text before any is cut."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield from (
                part
                for part in ast.walk(node)
                if (isinstance(part, ast.FormattedValue) and part.conversion == ord("r"))
                or (isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("repr", "ascii"))
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(FORMATS)))
def test_values_are_shown_briefly(path: Path) -> None:
    found = [f"line {node.lineno}" for node in shown_whole(ast.parse(path.read_text("utf-8")))]
    assert not found, f"{path}: use nibblecast.converters.errors.brief in {found}"


def test_the_rule_sees_what_it_is_for() -> None:
    tree = ast.parse("raise CorruptFile(f'has {value!r:.40}')\nraise CorruptFile('has ' + repr(value))")
    assert len(list(shown_whole(tree))) == 2
