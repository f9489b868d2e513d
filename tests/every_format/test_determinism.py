"""The same conversion gives the same bytes: in another folder, another process, another order of hashes, and by another
version of the code. The table has what was written when somebody last said that outputs change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.every_format.digests import SOURCES, TABLE, TARGETS, digests, write

ROOT = Path(__file__).parents[2]
HELD = json.loads(TABLE.read_text())


def test_conversions_write_the_bytes_that_the_table_holds(tmp_path: Path) -> None:
    write(tmp_path)
    found = digests(tmp_path)
    assert {key.partition("/")[0] for key in found} == {f"{a} to {b}" for a in SOURCES for b in TARGETS}
    changed = sorted(key for key in found.keys() | HELD.keys() if found.get(key) != HELD.get(key))
    assert not changed, "are they meant to change? then run: python -m tests.every_format.digests"


@pytest.mark.slow
def test_the_command_gives_the_same_in_another_process(tmp_path: Path) -> None:
    write(tmp_path)
    for seed, name in (("1", "first"), ("2", "second")):
        targets = [tmp_path / name / target for target in TARGETS]
        targets[0].parent.mkdir()
        command = [sys.executable, "-m", "nibblecast", "convert", tmp_path / "sources" / "model.tflite", *targets]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "TZ": f"UTC{seed}"}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        for target in targets:
            assert target.read_bytes() == (tmp_path / f"model.tflite to {target.name}" / target.name).read_bytes()
