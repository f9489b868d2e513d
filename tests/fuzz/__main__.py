"""Fuzzes the readers: python -m tests.fuzz --minutes 5 (make fuzz MINUTES=5).

What is found is made small, and kept below fixtures/hostile/, where the tests pick it up. Exit code 1 where there is
anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz import preparation

if TYPE_CHECKING:
    from tests.fuzz.campaign import Tally

_ENGINES = ("atheris", "plain")
_MINIMIZING = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Its exit code."""
    given = _parser().parse_args(arguments)
    engine, why = _engine(given.engine, is_seeded=given.seed is not None)
    preparation.prepare(guided=engine == "atheris")  # before anything below imports the project
    from tests.fuzz.campaign import Campaign, kept
    from tests.fuzz.findings import ROOT
    from tests.fuzz.readers import READERS

    unknown = [name for name in given.reader if name not in READERS]
    if unknown:
        print(f"unknown reader '{unknown[0]}'; known formats: {', '.join(READERS)}", file=sys.stderr)
        return 2
    readers = [READERS[name] for name in given.reader or READERS]
    jobs = min(given.jobs, len(readers))
    seed = given.seed if given.seed is not None else int.from_bytes(os.urandom(3))
    print(f"engine: {engine} ({why}); seed {seed}; {len(readers)} readers, {jobs} at a time", file=sys.stderr)
    seconds = given.minutes * 60 * jobs / len(readers)
    campaign = Campaign(
        readers,
        seconds,
        seed,
        jobs,
        engine == "atheris",
        lambda found: print(f"found: {found}", file=sys.stderr),
        executions=given.executions,
    )
    tallies = campaign.run()
    findings = []
    for finding, path in kept(tallies, given.keep or ROOT / "fixtures" / "hostile", campaign.limits, _MINIMIZING):
        print(f"kept: {path} ({len(finding.blob)} bytes): {finding}", file=sys.stderr)
        findings.append(
            {"reader": finding.reader, "kind": finding.kind, "where": finding.where, "detail": finding.detail}
            | {"file": str(path), "bytes": len(finding.blob)}
        )
    if given.json:
        rows = [tally.document() for tally in tallies]
        document = {"engine": engine, "seed": seed, "minutes": given.minutes, "readers": rows, "findings": findings}
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        _print(tallies)
    return 1 if findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all readers together")
    parser.add_argument("--seed", type=int, help="the same inputs each time: without atheris")
    parser.add_argument("--executions", type=int, help="at most as many of each reader: without atheris")
    parser.add_argument("--reader", action="append", default=[], help="only this one; several times for several")
    parser.add_argument("--engine", choices=_ENGINES, help="atheris where it is installed and no --seed is given")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="workers at a time")
    parser.add_argument("--keep", type=Path, help="where to keep what is found; fixtures/hostile without it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _engine(wanted: str | None, *, is_seeded: bool) -> tuple[str, str]:
    """Which engine, and why."""
    if wanted is not None:
        return wanted, "asked for"
    if is_seeded:
        return "plain", "--seed is for the same inputs each time"
    if preparation.has_atheris():
        return "atheris", "it is installed"
    return "plain", "atheris is not installed: pip install 'nibblecast[fuzz]'"


def _print(tallies: list[Tally]) -> None:
    rows = [tally.document() for tally in tallies]
    columns = [key for key in rows[0] if key != "seconds"]
    total = {key: sum(int(row[key]) for row in rows) if key in _SUMMED else "" for key in columns}  # type: ignore[call-overload]
    table = [columns, *([str(row[key]) for key in columns] for row in (*rows, total | {"reader": "all"}))]
    widths = [max(len(line[at]) for line in table) for at in range(len(columns))]
    for line in table:
        rest = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print(line[0].ljust(widths[0]), *rest)


_SUMMED = ("executions", "accepted", "restarts", "findings")

if __name__ == "__main__":
    sys.exit(main())
