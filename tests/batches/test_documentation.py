"""What docs/batch.md shows is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibblecast.converters.batches.records import REPORT, Record, read_report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "batch.md").read_text()
NAMES = ("cnn_int4_per_channel.tflite", "mlp_float32.tflite")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with models, and `nibblecast` on the path."""
    (tmp_path / "models").mkdir()
    for name in NAMES:
        shutil.copy(ROOT / "fixtures" / "tflite" / name, tmp_path / "models")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "nibblecast"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nibblecast "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": path}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)


def test_the_python_call(project: Path) -> None:
    (project / "convert.py").write_text(block("python"))
    done = run(project, sys.executable, "convert.py")
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == list(NAMES)
    assert all(record.verified for record in read_report(project / "out" / REPORT).values())


def test_the_makefile(project: Path) -> None:
    (project / "Makefile").write_text(block("make"))
    run(project, "make", "models")
    assert (project / "build" / "models" / "mlp_float32.h").exists()


def test_the_step_of_the_workflow(project: Path) -> None:
    (step,) = re.findall(r"- run: (nibblecast .*)", block("yaml"))
    for _ in range(2):
        done = run(project, "sh", "-c", step)
    assert "2 of 2 models converted (2 of them in an earlier run)" in done.stdout


def test_every_field_of_the_report_is_explained() -> None:
    table = PAGE[PAGE.index("## The report") : PAGE.index("## Limits")]
    assert set(json.loads(Record("source", "", "").line())) <= set(re.findall(r"`(\w+)`", table))
