"""The shards of one large checkpoint as jobs of their own: the same folder, whatever becomes of one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.batches.records import REPORT, read_report
from tests.batches.places import outputs_of
from tests.formats.encodings.checkpoints import write_folder
from tests.waiting import until

pytestmark = pytest.mark.slow

SHARDS = 6
TENSORS = {f"layers.{n}.weight": np.full((64, 64), n, np.float32) for n in range(SHARDS)}

#: Runs at the start of every process: any folder is large; who writes which shard is noted; one is never written.
NOTED = """
import os, signal, time
from pathlib import Path
from nibblecast.converters.batches import shares
from nibblecast.formats.safetensors import file_layout

shares._LARGE_BYTES = 0
write = file_layout.FileLayout.write

def noted(self, stream, wrote):
    number = int(self.file.path.name.split("-")[1])
    Path(os.environ["NOTES"], f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if os.environ.get("DIES") == str(number) and len(list(Path(os.environ["NOTES"]).glob(f"{number}-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while len({path.name.split("-")[1] for path in Path(os.environ["NOTES"]).iterdir()}) < 2:
        time.sleep(0.01)  # until the other worker has begun
    while os.environ.get("HOLDS") == str(number):
        time.sleep(0.01)
    time.sleep(0.2)
    write(self, stream, wrote)

file_layout.FileLayout.write = noted
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTED)
    (tmp_path / "notes").mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "NOTES": str(tmp_path / "notes")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write_folder(tmp_path / "models" / "llama", TENSORS, config={"model_type": "llama"})


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    nibblecast.convert(source, tmp_path / "expected", to="safetensors", shard_size="17K")
    return outputs_of(tmp_path / "expected")


def command(folder: Path, *options: str) -> list[str]:
    to = ["--to", "safetensors", "--opt", "shard_size=17K", "--verify", "--jobs", "2"]
    return [sys.executable, "-m", "nibblecast", "batch", str(folder / "models"), str(folder / "out"), *to, *options]


def notes(folder: Path) -> list[tuple[int, int]]:
    """The shard and the process of each writing, in their order."""
    entries = sorted((path.name.split("-") for path in (folder / "notes").iterdir()), key=lambda entry: int(entry[2]))
    return [(int(shard), int(process)) for shard, process, _ in entries]


def test_workers_share_in_one_checkpoint(environment: dict[str, str], expected, tmp_path: Path) -> None:
    subprocess.run(command(tmp_path), env=environment, check=True, capture_output=True)
    assert outputs_of(tmp_path / "out" / "llama") == expected
    assert sorted(shard for shard, _ in notes(tmp_path)) == list(range(1, SHARDS + 1))
    assert len({process for _, process in notes(tmp_path)}) == 2
    (record,) = read_report(tmp_path / "out" / REPORT).values()
    assert record.verified
    assert record.seconds >= 0.2 * SHARDS
    assert {output.path for output in record.outputs} == {f"llama/{name}" for name in expected}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".nibblecast-lock", "llama", REPORT]


def test_a_shard_whose_process_dies_is_written_in_the_end(
    environment: dict[str, str], expected, tmp_path: Path
) -> None:
    subprocess.run(command(tmp_path), env={**environment, "DIES": "3"}, check=True, capture_output=True)
    assert outputs_of(tmp_path / "out" / "llama") == expected
    assert sorted(shard for shard, _ in notes(tmp_path)) == [1, 2, 3, 3, 4, 5, 6]
    assert notes(tmp_path)[-1][0] == 3


def test_a_killed_batch_keeps_the_shards_that_are_complete(
    environment: dict[str, str], expected, tmp_path: Path
) -> None:
    holding = {**environment, "HOLDS": "5"}
    with subprocess.Popen(command(tmp_path), env=holding, start_new_session=True) as process:
        until(lambda: any(shard == 5 for shard, _ in notes(tmp_path)))
        os.killpg(process.pid, signal.SIGKILL)
    begun = len(notes(tmp_path))
    subprocess.run(command(tmp_path, "--resume"), env=environment, check=True, capture_output=True)
    assert outputs_of(tmp_path / "out" / "llama") == expected
    assert begun < SHARDS + 1
    assert len(notes(tmp_path)) < begun + SHARDS


def test_a_checkpoint_that_cannot_be_written_is_one_failure(
    environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = subprocess.run(command(tmp_path), env=environment, check=False, capture_output=True)
    assert done.returncode == 7
    (record,) = read_report(tmp_path / "out" / REPORT).values()
    assert record.failure is not None
    assert record.failure.exit_code == 3
    assert shard.name in record.failure.message
