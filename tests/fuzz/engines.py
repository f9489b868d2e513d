"""Where inputs come from: coverage-guided ones from atheris, or mutations of seeds, the same for a seed number.

atheris (libFuzzer for Python) keeps what reaches new code, and goes on from there: it finds more, but never the same
twice. Both use the same mutators.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from tests.fuzz.limits import MOST_BYTES
from tests.fuzz.readers import Reader
from tests.fuzz.worker import Runner, Work

_SIGNALS = "abrt bus fpe ill int segv term usr1 usr2 xfsz".split()


def plain(blobs: Sequence[bytes], seed: int, seconds: float, most: int | None = None) -> Work:
    """Mutations of these inputs, `most` of them if that is given. The n-th one depends on them, on `seed`, on the
    reader and on n alone."""

    def work(runner: Runner, pipe: Connection) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and (most is None or runner.number < most):
            runner.tell(nth(runner.reader, blobs, seed, runner.number), pipe)

    return work


def nth(reader: Reader, blobs: Sequence[bytes], seed: int, number: int) -> bytes:
    """The input of that number."""
    random = Random(f"{seed} {reader.name} {number}")
    return reader.mutated(random.choice(blobs), blobs, random)


def guided(blobs: Sequence[bytes], seed: int, seconds: float, corpus: Path) -> Work:
    """Inputs by coverage; what reaches new code is kept in the folder `corpus`."""
    for number, blob in enumerate(blobs):
        (corpus / f"seed-{number}").write_bytes(blob)

    def work(runner: Runner, pipe: Connection) -> None:
        import atheris

        def mutate(blob: bytes, _: int, number: int) -> bytes:
            return runner.reader.mutated(blob, blobs, Random(number))

        def cross(blob: bytes, other: bytes, _: int, number: int) -> bytes:
            return runner.reader.mutated(blob, [other], Random(number))

        options = [f"-handle_{name}=0" for name in _SIGNALS]  # time, memory and signals are limited by the runner
        options += ["-timeout=0", "-rss_limit_mb=0", "-detect_leaks=0", f"-max_len={MOST_BYTES}", "-len_control=0"]
        options += [f"-seed={seed + runner.number + 1}", f"-max_total_time={max(1, round(seconds))}"]
        os.chdir(tempfile.gettempdir())
        atheris.Setup(
            ["fuzz", *options, str(corpus)],
            lambda blob: runner.tell(blob, pipe),
            custom_mutator=mutate,
            custom_crossover=cross,
        )
        atheris.Fuzz()

    return work
