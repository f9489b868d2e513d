"""Every command on every hostile file: an exit code that is documented, one line at most, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fixtures.hostile import make
from tests.hostile.commands import ROOT, Ended, commands_for, more_commands_for, wrong_with
from tests.hostile.runner import results_in

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
