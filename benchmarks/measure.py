"""Timing by turns: the machine's speed drifts, so things are compared only within one run, one after the other."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: what was measured, ours and the peer's figure, their ratio, and what is wanted of it."""

    what: str
    ours: str
    peer: str
    ratio: str
    wanted: str = ""


def by_turns(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The median seconds of both, called in turn after one call each that does not count."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, times in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def processes_by_turns(commands: Sequence[Sequence[str]], rounds: int) -> list[tuple[float, int]]:
    """The median seconds and the most bytes of memory of each process, run in turn after one run each that does not
    count."""
    for arguments in commands:
        seconds_and_peak(arguments)
    runs = [[seconds_and_peak(arguments) for arguments in commands] for _ in range(rounds)]
    each = [list(zip(*of_one, strict=True)) for of_one in zip(*runs, strict=True)]
    return [(statistics.median(seconds), max(peaks)) for seconds, peaks in each]


def command(arguments: Sequence[str]) -> Callable[[], None]:
    """A call that runs a whole process and fails when it fails."""

    def run() -> None:
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return run


#: A process of its own starts the command: one that is forked from this one would begin with this one's memory.
_LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def seconds_and_peak(arguments: Sequence[str]) -> tuple[float, int]:
    """How long a process takes, and how many bytes of memory at most; fails when it fails."""
    command = [sys.executable, "-c", _LAUNCHER, *arguments]
    seconds, kilobytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(kilobytes) * 1024


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | nibblecast | peer | ratio | wanted |", "|---|---|---|---|---|"]
    lines += [f"| {row.what} | {row.ours} | {row.peer} | {row.ratio} | {row.wanted} |" for row in rows]
    return "\n".join(lines)
