"""Changes code at random and counts what the tests notice: `make mutants`, with COUNT of them and a SEED.

Tools that mutate everything (mutmut, cosmic-ray) take days for a suite of minutes. A sample answers the question: of
each kind of change as many, at most one in a function, each run against the fast tests that execute the line, the
nearest first. What no test notices is printed: it needs a test, or is the same program written in another way.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants import coverage_map
from tests.mutants.coverage_map import ROOT, Map
from tests.mutants.mutations import Mutant, mutants, raised

_MOST_TESTS = 30
_MOST_SECONDS = 40.0
_MEMORY = 8 << 30
_COPIED = ("converters", "docs", "fixtures", "formats", "nibblecast", "tests")


def sources(below: str) -> Iterator[tuple[str, bytes]]:
    """The files whose path begins so."""
    for package in ("converters", "formats"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name.startswith(below):
                yield name, path.read_bytes()


def refusals(known: Map, below: str) -> Iterator[str]:
    """The errors that no test raises."""
    for path, source in sources(below):
        for lines, text in raised(source):
            if not known.executes(path, lines):
                yield f"never raised: {path}:{lines.start}: {text:.120}"


def drawn(count: int, seed: int, below: str) -> list[Mutant]:
    """As many of each kind."""
    generator = random.Random(seed)  # not for secrets
    kinds: defaultdict[str, list[Mutant]] = defaultdict(list)
    for path, source in sources(below):
        for mutant in mutants(path, source):
            kinds[mutant.kind].append(mutant)
    for found in kinds.values():
        generator.shuffle(found)
    taken: dict[tuple[str, str], Mutant] = {}
    while len(taken) < count and any(kinds.values()):
        for found in kinds.values():
            while found and (mutant := found.pop()) and len(taken) < count:
                if taken.setdefault((mutant.path, mutant.function), mutant) is mutant:
                    break
    return list(taken.values())


def chosen(known: Map, mutant: Mutant) -> list[str]:
    """The tests to run, and no more than take a while."""
    tests: list[str] = []
    seconds = 0.0
    for test in known.tests(mutant.path, range(mutant.line, mutant.last_line + 1)):
        if len(tests) < _MOST_TESTS and seconds + known.seconds[test] <= _MOST_SECONDS:
            tests.append(test)
            seconds += known.seconds[test]
    return tests


def outcome(copy: Path, mutant: Mutant, tests: Sequence[str], seconds: float) -> str:
    """ "killed", "survived", "ran away" for what did not end, or "no test"."""
    if not tests:
        return "no test"
    path = copy / mutant.path
    source = path.read_bytes()
    path.write_bytes(mutant.applied(source))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", coverage_map.FAST, *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=60 + 10 * seconds, check=False,
            preexec_fn=_limited,  # nothing else of this process is in the child
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "ran away"
    finally:
        path.write_bytes(source)
    if done.returncode == 5:  # none of them was collected
        return "no test"
    return "survived" if done.returncode == 0 else "killed"


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))


def outcomes(known: Map, sample: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """What becomes of each, in copies of the project."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy = Path(folder) / str(number)
            for name in _COPIED:
                shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            for file in ROOT.glob("*.*"):
                if file.is_file():
                    shutil.copy(file, copy)
            copies.put(copy)

        def run(mutant: Mutant) -> str:
            tests, copy = chosen(known, mutant), copies.get()
            try:
                return outcome(copy, mutant, tests, sum(known.seconds[test] for test in tests))
            finally:
                copies.put(copy)

        yield from zip(sample, pool.map(run, sample), strict=True)


def main() -> None:
    """Prints each mutant that no test notices, and the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--below", default="", help="only in files whose path begins so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep-map", action="store_true", help="use the coverage that was measured last time")
    parser.add_argument("--refusals", action="store_true", help="list the errors that no fast test raises, and end")
    parsed = parser.parse_args()
    if not parsed.keep_map:
        coverage_map.make(())
    known, sample = coverage_map.load(), drawn(parsed.count, parsed.seed, parsed.below)
    if parsed.refusals:
        print(*refusals(known, parsed.below), sep="\n")
        return
    counted: defaultdict[str, int] = defaultdict(int)
    for number, (mutant, found) in enumerate(outcomes(known, sample, parsed.jobs), 1):
        counted[found] += 1
        noticed = found in ("killed", "ran away")
        if not noticed:
            print(f"{found}: {mutant.shown((ROOT / mutant.path).read_bytes())}", flush=True)
        elif sys.stderr.isatty():
            print(f"{number} of {len(sample)}", end="\r", file=sys.stderr, flush=True)
    noticed_count = counted["killed"] + counted["ran away"]
    print(f"{noticed_count} of {len(sample)} noticed ({noticed_count / max(1, len(sample)):.0%}), seed {parsed.seed}")


if __name__ == "__main__":
    main()
