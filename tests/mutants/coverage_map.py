"""Which test functions execute which line, in the process of the test and in those that it starts.

As a pytest plugin this module tells coverage.py which test runs, and notes how long each takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutants"
FAST = "not peers and not firmware and not slow"
_CONFIG_FILE = FOLDER / "coveragerc"
_TIMES = "NIBBLECAST_TEST_TIMES"
_TEST = "NIBBLECAST_TEST"
_CONFIG = f"""
[run]
source = {ROOT}/converters, {ROOT}/formats
data_file = {FOLDER}/coverage
parallel = true
context = ${{{_TEST}-}}
"""


@dataclass(frozen=True, slots=True)
class Map:
    """`data` has, for each line, the tests that execute it; `seconds` the passing tests and what each takes."""

    data: coverage.CoverageData
    seconds: dict[str, float]

    def tests(self, path: str, lines: range) -> list[str]:
        """The tests that execute one of the lines, nearest to the file and fastest first. Where none does, those of the
        whole file: coverage.py does not see what Numba has compiled."""
        contexts = self.data.contexts_by_lineno(str(ROOT / path))
        found = {test for line in lines for test in contexts.get(line, ()) if test}
        found = found or {test for tests in contexts.values() for test in tests if test}
        parts = set(path.removesuffix(".py").split("/"))

        def rank(test: str) -> tuple[int, float]:
            words = set(test.split("::")[0].removesuffix(".py").replace("test_", "").split("/"))
            return -len(parts & words), self.seconds[test]

        return sorted((test for test in found if test in self.seconds), key=rank)

    def executes(self, path: str, lines: range) -> bool:
        """Whether any test executes one of the lines."""
        return not set(lines).isdisjoint(self.data.lines(str(ROOT / path)) or ())


def make(paths: Sequence[str]) -> None:
    """Runs the fast tests once, under coverage.py."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("coverage*"):
        old.unlink()
    _CONFIG_FILE.write_text(_CONFIG)
    run = [
        sys.executable,
        "-m",
        "coverage",
        "run",
        f"--rcfile={_CONFIG_FILE}",
        "-m",
        "pytest",
        "-p",
        "tests.mutants.coverage_map",
    ]
    environment = {**os.environ, _TIMES: str(FOLDER / "seconds.json")}
    subprocess.run([*run, "-m", FAST, *paths], cwd=ROOT, env=environment, check=False)
    subprocess.run(
        [sys.executable, "-m", "coverage", "combine", f"--rcfile={_CONFIG_FILE}", "-q"], cwd=ROOT, check=True
    )


def load() -> Map:
    """What `make` found."""
    data = coverage.CoverageData(str(FOLDER / "coverage"))
    data.read()
    return Map(data, json.loads((FOLDER / "seconds.json").read_text()))


def pytest_configure() -> None:
    """Has the processes that tests start measured as well, each for the test that starts it: they read the name of that
    from their environment."""
    os.environ["COVERAGE_PROCESS_START"] = str(_CONFIG_FILE)


_seconds: defaultdict[str, float] = defaultdict(float)
_failed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What runs from here on is of this test."""
    measured = coverage.Coverage.current()
    test = os.environ[_TEST] = item.nodeid.split("[")[0]
    if measured is not None:
        measured.switch_context(test)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds up the time of all parameters, with their setup."""
    test = report.nodeid.split("[")[0]
    _seconds[test] += report.duration
    if report.outcome != "passed":
        _failed.add(test)


def pytest_sessionfinish(session: Any) -> None:
    """Leaves the times where they were asked for."""
    if _TIMES in os.environ:
        passed = {test: round(seconds, 3) for test, seconds in _seconds.items() if test not in _failed}
        Path(os.environ[_TIMES]).write_text(json.dumps(passed))
