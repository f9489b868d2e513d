"""The Python of the documentation runs, on real files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- fixture: (?P<fixture>\S+) -->\n```python\n(?P<code>.*?)```", re.DOTALL)
LOADED = re.compile(r'load\("(?P<name>[^"]+)"')


def blocks() -> list[tuple[str, str, str]]:
    """The page, the fixture and the code of each block that names a fixture."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        found += [(page.stem, m["fixture"], m["code"]) for m in BLOCK.finditer(page.read_text())]
    return found


@pytest.mark.parametrize(("page", "fixture", "code"), blocks(), ids=lambda value: str(value)[:40])
def test_a_block_gives_what_it_says(
    page: str, fixture: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LOADED.search(code)
    assert loaded is not None, page
    shutil.copy(ROOT / "fixtures" / fixture, tmp_path / loaded["name"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    codes, scale, values = (np.asarray(names[name]) for name in ("codes", "scale", "values"))
    assert codes.shape == values.shape
    assert codes.dtype in (np.int8, np.uint8)
    assert scale.dtype.kind == "f"
    assert values.dtype == np.float32
    zero_point = names.get("zero_point")
    if isinstance(zero_point, np.ndarray):
        centred = codes.astype(np.float64) - zero_point.astype(np.float64)
        np.testing.assert_array_equal(values, (centred * scale.astype(np.float64)).astype(np.float32))


def test_there_are_blocks_for_every_scenario() -> None:
    fixtures = {fixture.split("/")[0] + Path(fixture).suffix for _, fixture, _ in blocks()}
    assert fixtures == {"tflite.tflite", "pytorch.pt", "pytorch.pt2"}
