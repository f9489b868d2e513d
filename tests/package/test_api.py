"""The public API: what `nibblecast` exports, what docs/api.md explains, and the Python of that page and the README."""

from __future__ import annotations

import inspect
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import nibblecast

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures" / "tflite"
PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
#: Each name with the text under its heading.
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def blocks(text: str) -> list[str]:
    """The Python in a text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def words(text: str) -> set[str]:
    """All words between backticks."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with the models of the examples."""
    shutil.copy(FIXTURES / "mlp_int4_blockwise.tflite", tmp_path / "model.tflite")
    shutil.copy(FIXTURES / "mlp_float32.tflite", tmp_path / "float.tflite")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_explains_every_name_and_no_other() -> None:
    assert dir(nibblecast) == sorted(nibblecast.__all__)
    assert sorted(SECTIONS) == sorted(nibblecast.__all__)


def test_every_name_is_there() -> None:
    for name in nibblecast.__all__:
        assert getattr(nibblecast, name) is not None
    with pytest.raises(AttributeError, match="module 'nibblecast' has no attribute 'quantise'"):
        _ = nibblecast.quantise  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name in nibblecast.__all__ if name != "__version__"])
def test_every_name_has_a_docstring_types_and_an_example(name: str) -> None:
    thing, section = getattr(nibblecast, name), SECTIONS[name]
    assert thing.__doc__
    assert name in "".join(blocks(PAGE))
    wanted = {field.name for field in fields(thing)} if is_dataclass(thing) else set()
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())
        wanted = set(signature.parameters)
    assert wanted <= words(section)


def test_the_examples_run(folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(PAGE)):
        exec(compile(code, f"docs/api.md, example {number}", "exec"), names)
    assert (folder / "weights.h").exists()


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    found = blocks(README)
    assert found
    for number, code in enumerate(found):
        exec(compile(code, f"README.md, example {number}", "exec"), {"__name__": "__main__"})


def test_no_page_but_that_of_plugins_imports_anything_else() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    importing = [page.name for page in pages if re.search(r"(import|from) nibblecast\.", page.read_text("utf-8"))]
    assert importing == ["plugins.md"]
