"""Files that ask for time or memory without end are refused, or read, in time and memory that fit their size.

Each is read, decoded and planned in a process of its own with limits (`measured`). Processor time is compared with what
an honest file of a megabyte takes there and then.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.formats.pytorch.pickle import measured
from tests.formats.pytorch.pickle.bombs import PLACES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
_TIMES_AS_LONG = 20
_HARMLESS_SECONDS = 10.0

Results = dict[str, dict[str, Any]]


def results_of(module: str, function: str, folder: Path) -> Results:
    """What came of the files of a function, by their names."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.pytorch.pickle.measured", module, function, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


def faults(results: Results, honest: dict[str, Any]) -> list[str]:
    """What is wrong with these results."""
    seconds = max(_HARMLESS_SECONDS, _TIMES_AS_LONG * honest["cpu"])
    found = []
    for name, result in results.items():
        if not result["came"].startswith(("read", "refused: ")) or "more memory than there is" in result["came"]:
            found.append(f"{name}: {result['came'][-300:]}")
        if result["cpu"] > seconds or result["memory"] > measured.MEMORY:
            found.append(f"{name}: {result['cpu']:.1f} s, {result['memory'] >> 20} MiB")
    return found


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("bombs", "everywhere", tmp_path_factory.mktemp("bombs"))


@pytest.mark.parametrize("place", PLACES)
def test_a_strange_value_is_read_or_refused_at_once(place: str, everywhere: Results) -> None:
    results = {name: result for name, result in everywhere.items() if name.startswith(f"{place}: ")}
    assert len(results) > 10
    assert not faults(results, everywhere["honest: a megabyte"])


@pytest.mark.parametrize(
    ("module", "function", "least"),
    [
        ("copying_bombs", "unpickled", 30),
        ("copying_bombs", "walked", 15),
        ("copying_bombs", "repeating", 10),
        ("program_bombs", "programs", 15),
        ("random_pickles", "some", 300),
    ],
)
def test_a_bomb_is_read_or_refused_at_once(module: str, function: str, least: int, tmp_path: Path) -> None:
    results = results_of(module, function, tmp_path)
    assert len(results) > least
    assert not faults(results, results["honest: a megabyte"])


def test_the_honest_file_is_read(everywhere: Results) -> None:
    assert everywhere["honest: a megabyte"]["came"] == "read"
