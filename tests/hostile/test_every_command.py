"""Every command on every hostile file: an exit code that is documented, one line at most, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.hostile import make
from tests.hostile.commands import ROOT, Ended, commands_for, more_commands_for, wrong_with
from tests.hostile.runner import results_in

pytestmark = pytest.mark.slow

KINDS = sorted(path.name for path in make.HERE.iterdir() if path.is_dir() and path.name != "__pycache__")
#: Kinds of which a batch converts all files.
BATCHES = [kind for kind in KINDS if kind not in ("npz", "report")]
FILES = [path for kind in KINDS for path in sorted((make.HERE / kind).iterdir())]
LARGE = sorted(make.large_files())
MOST_SECONDS = 600

Results = Mapping[str, list[Ended]]


#: What is tested: the kind of its commands, and its name.
NAMES = [
    ("plain", "plain"),
    *((path.parent.name, str(path.relative_to(make.HERE))) for path in FILES),
    *((path.partition("/")[0], f"large {path}") for path in LARGE),
    *(("batch", f"batch {kind}") for kind in BATCHES),
]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """How the commands ended on each of the files that are asked for, by name."""
    folder = tmp_path_factory.mktemp("hostile")
    make.write(make.large_files(), folder / "large")
    asked = {item.callspec.params["name"] for item in request.session.items if "ended_well" in item.name}
    tasks = [(kind, name) for kind, name in NAMES if name in asked]
    task = {
        "folder": str(folder / "work"),
        "jobs": len(os.sched_getaffinity(0)),
        "tasks": [(kind, str(_source(name, folder / "large"))) for kind, name in tasks],
    }
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "tests.hostile.runner", str(folder / "task.json")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=MOST_SECONDS)
    return {name: results_in(folder / "work" / str(number)) for number, (_, name) in enumerate(tasks)}


def _source(name: str, large: Path) -> Path:
    what, _, rest = name.partition(" ")
    if what == "large":
        return large / rest
    return make.HERE / (rest or name) if name != "plain" else ROOT / "README.md"


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_command_ended_well(kind: str, name: str, results: Results) -> None:
    commands = [ended.command for ended in results[name]]
    assert commands == commands_for(kind) + more_commands_for(kind, results[name][0])
    wrong = [f"nibblecast {ended.command}: {why}" for ended in results[name] for why in wrong_with(ended)]
    assert not wrong, "\n".join(wrong)


def test_the_fixtures_are_what_the_script_makes() -> None:
    made = make.files()
    kept = {path.relative_to(make.HERE).as_posix(): path for path in make.HERE.glob("*/**/*") if path.is_file()}
    kept = {name: path for name, path in kept.items() if "__pycache__" not in name}
    assert {name for name in kept if make.FOUND not in name} == set(made)
    assert not [name for name, content in made.items() if kept[name].read_bytes() != content]
    assert sum(path.stat().st_size for path in kept.values()) < 1 << 20


DONE = Ended("convert {input} {out}/m.h", 0, err="note: a hint\nnot kept: w: dropped\n", outputs=["m.h", "m.c"])
REFUSED = Ended("inspect {input}", 3, err="nibblecast: m.h: is damaged\n")


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (DONE, None),
        (REFUSED, None),
        (replace(DONE, outputs=[]), "not written: m.h"),
        (replace(DONE, outputs=["m.h", ".m.nibblecast-part"]), "left behind: .m.nibblecast-part"),
        (replace(DONE, strays=["executed"]), "files that nobody asked for: executed"),
        (replace(DONE, err="RuntimeWarning: overflow\n"), "1 lines on stderr"),
        (replace(DONE, command="convert {input} {out}/m.h --quiet"), "2 lines on stderr"),
        (replace(DONE, seconds=11.0), "it took 11.0 s"),
        (replace(REFUSED, code=1), "exit code 1"),
        (replace(REFUSED, code=-11), "exit code -11"),
        (replace(REFUSED, code=7), "exit code 7"),
        (replace(REFUSED, err=""), "0 lines on stderr"),
        (replace(REFUSED, err="nibblecast: a\nnibblecast: b\n"), "2 lines on stderr"),
        (replace(REFUSED, err="m.h: is damaged\n"), "1 lines on stderr"),
        (replace(REFUSED, err=f"nibblecast: {'x' * 20_000}\n"), "a line of 20012 characters"),
        (replace(REFUSED, err="nibblecast: \x1b[31m\n"), "a line that is not printable"),
        (replace(REFUSED, err="nibblecast: out of memory\n"), "it took all memory"),
        (replace(REFUSED, out="Traceback (most recent call last):"), "a traceback"),
        (replace(REFUSED, outputs=["m.h"]), "left behind: m.h"),
        (Ended("inspect {input} --json", 0, out="{"), "no JSON on stdout"),
        (Ended("inspect {input} --json", 0, out='{"a": NaN}'), "no JSON on stdout: NaN"),
        (Ended("verify {input} {good}", 6), None),
        (Ended("batch {folder} {out}/b --to onnx", 7, err="1/1 failed: m.h: is damaged\n", outputs=["b/r"]), None),
    ],
)
def test_what_is_wrong_with_a_command_is_seen(ended: Ended, why: str | None) -> None:
    found = wrong_with(ended)
    assert found == [] if why is None else any(each.startswith(why) for each in found), found


@pytest.mark.parametrize(
    ("exit_code", "transient", "is_wrong"), [(3, False, False), (1, False, True), (2, True, True), (7, False, True)]
)
def test_what_is_wrong_with_a_model_of_a_batch_is_seen(exit_code: int, transient: bool, is_wrong: bool) -> None:
    failure = {"exit_code": exit_code, "message": "m: is damaged", "transient": transient}
    out = json.dumps({"records": [{"source": "m", "failure": failure}]})
    assert bool(wrong_with(Ended("batch {folder} {out}/b --json", 7, out))) == is_wrong
