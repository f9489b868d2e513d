"""The fuzzer notices each kind of fault, makes inputs small, does the same for a seed, and gets past the first byte."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, VerificationFailed
from tests.fuzz import case as cases
from tests.fuzz.campaign import Campaign, keep, kept
from tests.fuzz.engines import nth
from tests.fuzz.exercise import Exercise, _watched, refusable
from tests.fuzz.findings import ROOT, Finding
from tests.fuzz.limits import MOST_BYTES, Limits
from tests.fuzz.minimize import minimized, smaller
from tests.fuzz.readers import READERS, Reader

LIMITS = Limits(processor=1.0, clock=10.0, memory=64 << 20)
#: What a fake reader stumbles over: in each of its seeds, and in most of what becomes of them.
NEEDLE = b"\xbe\xef"

pytestmark = [pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"), pytest.mark.slow]


def fake(exercise: Exercise) -> Reader:
    seed = {"model.bin": b"x" * 40 + NEEDLE + b"y" * 40}
    return Reader("fake", "model.bin", lambda: [seed], {}, exercise)


def found_by(exercise: Exercise) -> set[str]:
    """The kinds of faults that are found in a moment."""
    tallies = Campaign([fake(exercise)], 0.3, 1, 1, False, lambda _: None, LIMITS).run()
    assert tallies[0].executions
    return {kind for kind, _ in tallies[0].findings}


def stumbling(over: Callable[[Path, Path], object]) -> Exercise:
    """A reader that does this with inputs that have the needle in them."""

    def exercise(path: Path, outputs: Path, _: int) -> bool:
        if NEEDLE in path.read_bytes():
            over(path, outputs)
        return True

    return exercise


def test_an_exception_that_is_no_error_of_ours_is_found() -> None:
    assert found_by(stumbling(lambda *_: len(3))) == {"exception TypeError"}  # type: ignore[arg-type]


def test_what_ends_the_interpreter_is_found() -> None:
    assert found_by(stumbling(lambda *_: exit(3))) == {"exception SystemExit"}
    assert found_by(stumbling(lambda *_: os._exit(0))) == {"exit"}


def test_a_hang_is_found_at_the_processor_and_at_the_clock() -> None:
    def busy(*_: Path) -> None:
        while True:
            pass

    assert found_by(stumbling(busy)) == {"hang"}
    sleeping = Limits(processor=5.0, clock=0.5)
    reader = fake(stumbling(lambda *_: time.sleep(60)))
    tallies = Campaign([reader], 0.3, 1, 1, False, lambda _: None, sleeping).run()
    assert {kind for kind, _ in tallies[0].findings} == {"hang"}


def test_too_much_memory_is_found() -> None:
    assert found_by(stumbling(lambda *_: np.ones(1 << 27))) == {"memory"}


def test_a_crash_is_found() -> None:
    assert found_by(stumbling(lambda *_: ctypes.string_at(1))) == {"crash SIGSEGV"}


def test_what_is_left_behind_is_found() -> None:
    def leave(_: Path, outputs: Path) -> None:
        (outputs / ".m.nibblecast-part").write_bytes(b"x")

    def refuse(path: Path, outputs: Path) -> None:
        with refusable(outputs):
            (outputs / "m.h").write_bytes(b"x")
            raise CorruptFile("is damaged", path=path)

    assert found_by(stumbling(leave)) == {"left behind"}
    assert found_by(stumbling(refuse)) == {"left behind"}
    beside = stumbling(lambda path, _: (path.parent / "more").write_bytes(b"x"))
    assert found_by(beside) == {"left beside the input"}


def test_a_warning_is_found() -> None:
    assert found_by(stumbling(lambda *_: np.float32(1) / np.float32(0))) == {"warning"}
    assert found_by(stumbling(lambda *_: warnings.warn("x", stacklevel=1))) == {"warning"}


def test_a_message_that_is_no_line_is_found() -> None:
    class Odd(nibblecast.Error):
        def __str__(self) -> str:
            return self.message

    for text in ("two\nlines", "long " * 5000, "\x1b[31m", "", "\ud800"):

        def refuse(_: Path, outputs: Path, text: str = text) -> None:
            with refusable(outputs):
                raise Odd(text)

        assert found_by(stumbling(refuse)) == {"message"}, text


def test_what_runs_or_is_opened_while_a_file_is_read_is_found() -> None:
    def watched(run: Callable[[], object]) -> Exercise:
        def over(path: Path, _: Path) -> None:
            with _watched(path):
                run()

        return stumbling(over)

    for run in (
        lambda: os.system("true"),
        lambda: eval("1 + 1"),
        lambda: Path("/etc/passwd").read_bytes(),
        lambda: __import__("this"),
        lambda: ctypes.CDLL("libm.so.6"),
    ):
        assert found_by(watched(run)) == {"execution"}
    assert found_by(watched(lambda: None)) == set()


def test_a_refusal_is_no_finding_and_a_written_file_that_differs_is_one() -> None:
    def refuse(path: Path, outputs: Path) -> None:
        with refusable(outputs):
            raise CorruptFile("is damaged", path=path)

    def differ(path: Path, outputs: Path) -> None:
        with refusable(outputs):
            raise VerificationFailed("differs", path=path)

    assert found_by(stumbling(refuse)) == set()
    assert found_by(stumbling(differ)) == {"verification"}


def test_findings_are_made_small_and_kept_as_fixtures(tmp_path: Path) -> None:
    reader = fake(stumbling(lambda *_: len(3)))  # type: ignore[arg-type]
    tallies = Campaign([reader], 0.3, 1, 1, False, lambda _: None, LIMITS).run()
    ((finding, path),) = kept(tallies, tmp_path, LIMITS, 30)
    assert finding.blob == NEEDLE
    assert path.read_bytes() == NEEDLE
    assert path.parent == tmp_path / "fake"
    assert path.name.startswith("found-exception-typeerror-")


def test_a_crash_is_made_small_across_several_processes() -> None:
    reader = fake(stumbling(lambda *_: ctypes.string_at(1)))
    found = Finding("fake", "crash SIGSEGV", "", "", b"a" * 20 + NEEDLE + b"b" * 20)
    assert minimized(reader, found, LIMITS, 60).blob == NEEDLE


def test_what_cannot_be_seen_again_stays_as_it_was_found() -> None:
    reader = fake(lambda *_: True)
    found = Finding("fake", "hang", "", "", b"a" * 20)
    assert minimized(reader, found, LIMITS, 30) == found


def test_parts_that_are_not_needed_are_left_out_and_others_made_plain() -> None:
    small = smaller(b"abcdefgh" * 20, lambda content: b"cd" in content and len(content) >= 10)
    assert len(small) == 10
    assert small.strip(b"\0") == b"cd"


def test_several_files_are_made_small_and_kept_in_a_folder(tmp_path: Path) -> None:
    def exercise(path: Path, *_: object) -> bool:
        names = {file.name: file.read_bytes() for file in path.parent.iterdir()}
        if NEEDLE in names.get("a.bin", b"") and b"1" in names.get("b.bin", b""):
            raise KeyError
        return True

    reader = Reader("fake", "a.bin", list, {}, exercise)
    blob = cases.joined({"a.bin": b"xx" + NEEDLE, "b.bin": b"0123", "c.bin": b"x"})
    small = minimized(reader, Finding("fake", "exception KeyError", "", "", blob), LIMITS, 30)
    assert cases.divided(small.blob, "a.bin") == {"a.bin": NEEDLE, "b.bin": b"1"}
    assert {file.name for file in keep(reader, small, tmp_path).iterdir()} == {"a.bin", "b.bin"}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_the_same_seed_gives_the_same_inputs(reader: Reader) -> None:
    blobs = [cases.joined(case) for case in reader.seeds()]
    made = [nth(reader, blobs, 15, number) for number in range(60)]
    assert made == [nth(reader, blobs, 15, number) for number in range(60)]
    assert made != [nth(reader, blobs, 16, number) for number in range(60)]
    assert len(set(made)) > 40
    assert max(map(len, made)) <= MOST_BYTES


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_a_good_share_of_what_is_changed_can_still_be_read(reader: Reader, tmp_path: Path) -> None:
    """Of what was made of files that can be read: else only the first check of a reader would be tried."""
    blobs = [cases.joined(case) for case in reader.seeds()]
    good = [blob for blob in blobs[:40] if _is_read(reader, blob, tmp_path)]
    assert good
    changed = [reader.mutated(good[number % len(good)], good, Random(number)) for number in range(100)]
    accepted = sum(_is_read(reader, blob, tmp_path) for blob in changed)
    assert 5 <= accepted < 100, accepted


def _is_read(reader: Reader, blob: bytes, folder: Path) -> bool:
    cases.write(cases.divided(blob, reader.file_name), folder / "in")
    path = folder / "in" / reader.main
    try:
        if reader.name == "report":
            nibblecast.report(path)
        else:
            nibblecast.load(path)
    except Exception:  # what is wrong with it is for the fuzzer to find
        return False
    return True


def test_cases_are_bytes_and_back() -> None:
    several = {"config.json": b"{}", "model.safetensors": b"\0" * 9}
    assert cases.divided(cases.joined(several), "x") == several
    assert cases.joined({"x": b"123"}) == b"123"
    assert cases.divided(b"123", "x") == {"x": b"123"}
    hostile = cases.joined({"../x": b"1", "y": b"2"})
    assert cases.divided(hostile, "x") == {"y": b"2"}
    for end in range(len(hostile)):
        assert cases.divided(hostile[:end], "x")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, for what it sets up is for the whole process."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_command_tells_what_it_did(tmp_path: Path) -> None:
    usual = "--minutes", "1", "--reader", "pytorch-legacy", "--keep", str(tmp_path), "--json"
    done = run(*usual, "--seed", "3", "--executions", "40")
    document = json.loads(done.stdout)
    assert document["engine"] == "plain"
    assert document["readers"][0]["executions"] == 40
    assert done.returncode == bool(document["findings"])
    assert done.stderr.startswith("engine: plain (--seed is for the same inputs each time); seed 3")
    assert run("--reader", "strange").returncode == 2
