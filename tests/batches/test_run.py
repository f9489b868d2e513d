"""Many models: each is converted on its own, the report says what became of it, and a killed run is resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches.job import Job, Request
from nibblecast.converters.batches.records import REPORT, Record, read_report
from nibblecast.converters.batches.stores import LocalFolder
from nibblecast.converters.errors import UsageError
from nibblecast.converters.output.private_folder import hidden_name, make_temporary
from tests.formats.encodings.checkpoints import write_folder

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOOD = [path for path in sorted((FIXTURES / "tflite").glob("*.tflite")) if not path.name.startswith("external_")]
BROKEN = {
    "empty.tflite": b"",
    "cut.tflite": GOOD[0].read_bytes()[:300],
    "text.onnx": b"hello",
    "st.safetensors": b"x" * 9,
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Good and broken files in folders, a checkpoint's folder, and files that are no models."""
    folder = tmp_path / "models"
    for number, path in enumerate(GOOD):
        (folder / f"part{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"part{number % 3}")
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
    weights = {f"layers.{n}.weight": np.full((8, 8), n, np.float32) for n in range(3)}
    write_folder(folder / "part1" / "llama", weights, shards=3, config={"model_type": "llama"})
    (folder / "README.md").write_text("no model")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nibblecast", "batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def outputs_of(folder: Path) -> dict[str, bytes]:
    """Every file but the report and what is hidden."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != REPORT}


def without_measures(record: Record) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(record.line())
    for key in ("seconds", "peak_memory", "attempts"):
        del document[key]
    return document


def test_good_ones_are_converted_and_broken_ones_reported(models: Path, tmp_path: Path) -> None:
    done = run(models, tmp_path / "out", "--to", "safetensors", "--verify", "--jobs", 2)
    assert done.returncode == 7, done.stderr
    assert f"{len(GOOD) + 1} of {len(GOOD) + 1 + len(BROKEN)} models converted" in done.stdout
    records = read_report(tmp_path / "out" / REPORT)
    assert list(records) == sorted(records)
    assert {name for name, record in records.items() if not record.done} == set(BROKEN)
    for name, record in records.items():
        if record.failure is not None:
            assert record.failure.exit_code == 3
            assert name in record.failure.message
            continue
        assert record.verified is True
        assert len(record.sha256) == 64
        for output in record.outputs:
            assert (tmp_path / "out" / output.path).stat().st_size == output.bytes
    assert set(records["part1/llama"].outputs[0].path.split("/")[:2]) == {"part1", "llama"}
    assert sum(len(record.outputs) for record in records.values()) == len(outputs_of(tmp_path / "out"))


def test_json_is_the_whole_answer(models: Path, tmp_path: Path) -> None:
    done = run(models, tmp_path / "out", "--to", "safetensors", "--json")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert document["models"] == len(GOOD) + 1 + len(BROKEN)
    assert document["exit_codes"] == {"3": len(BROKEN)}
    assert {record["status"] for record in document["records"]} == {"done", "failed"}


def test_several_formats_at_once(models: Path, tmp_path: Path) -> None:
    result = nibblecast.batch(models / "part0", tmp_path / "out", ["safetensors", "cheader"], exclude=["types_zoo*"])
    assert not result.failed
    suffixes = {Path(output.path).suffix for record in result.records for output in record.outputs}
    assert suffixes == {".safetensors", ".h", ".c"}


def test_of_several_formats_all_or_none_are_written(models: Path, tmp_path: Path) -> None:
    result = nibblecast.batch(models, tmp_path / "out", ["safetensors", "cheader"], include=["*types_zoo*"])
    (record,) = result.failed
    assert record.failure is not None
    assert "format 'cheader' cannot hold complex64" in record.failure.message
    assert outputs_of(tmp_path / "out") == {}


def test_a_list_of_paths(models: Path, tmp_path: Path) -> None:
    chosen = [*sorted((models / "part0").iterdir())[:3], models / "part1" / "llama"]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in chosen))
    result = nibblecast.batch(tmp_path / "list.txt", tmp_path / "out", "safetensors")
    assert [record.source for record in result.records] == [str(path.relative_to(models)) for path in chosen]
    command = [sys.executable, "-m", "nibblecast", "batch", "-", str(tmp_path / "again"), "--to", "safetensors"]
    subprocess.run(command, input=(tmp_path / "list.txt").read_text(), text=True, check=True, capture_output=True)
    assert outputs_of(tmp_path / "again") == outputs_of(tmp_path / "out")


def test_patterns_choose_sources(models: Path, tmp_path: Path) -> None:
    result = nibblecast.batch(models, tmp_path / "out", "safetensors", include=["part0/*"], exclude=[GOOD[0].name])
    assert {record.source for record in result.records} == {
        f"part0/{path.name}" for number, path in enumerate(GOOD) if number % 3 == 0 and number
    }


def test_weights_beside_a_model_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("external_buffer.tflite", "external_buffer.weights.bin"):
        shutil.copy(FIXTURES / "tflite" / name, tmp_path / "models")
    result = nibblecast.batch(tmp_path / "models", tmp_path / "out", "safetensors")
    assert [record.source for record in result.records] == ["external_buffer.tflite"]
    assert not result.failed


def test_names_that_clash_are_an_error_before_the_start(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "part0" / GOOD[0].name, models / "part0" / f"{GOOD[0].stem}.litertlm")
    with pytest.raises(UsageError, match="would be written for .* and for .*: leave one of them out with --exclude"):
        nibblecast.batch(models, tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "neither a folder nor a list"),
        ("nothing", "contains no model"),
        ("list.txt", "does not exist"),
        ("binary", "not a list of paths"),
        ("empty", "is an empty list"),
    ],
)
def test_sources_that_are_none(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "list.txt").write_text("not/there.tflite\n")
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(UsageError, match=message):
        nibblecast.batch(tmp_path / source, tmp_path / "out", "safetensors")


def test_a_dry_run_prices_the_job_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    planned = nibblecast.batch(models, tmp_path / "out", "safetensors", settings=BatchSettings(dry_run=True))
    assert not (tmp_path / "out").exists()
    done = nibblecast.batch(models, tmp_path / "out", "safetensors")
    sizes = [[(o.path, o.bytes) for o in record.outputs] for record in planned.records]
    assert sizes == [[(o.path, o.bytes) for o in record.outputs] for record in done.records]
    assert [record.done for record in planned.records] == [record.done for record in done.records]


def test_resume_skips_what_is_done_and_unchanged(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nibblecast.batch(models, out, "safetensors")
    changed, gone, again = (f"part0/{GOOD[number].name}" for number in (0, 3, 6))
    shutil.copy(GOOD[1], models / changed)
    (out / gone).with_suffix(".safetensors").unlink()
    (out / again).with_suffix(".safetensors").write_bytes(b"")
    (models / "empty.tflite").write_bytes(GOOD[2].read_bytes())
    result = nibblecast.batch(models, out, "safetensors", settings=BatchSettings(resume=True))
    redone = {record.source for record in result.records if not record.kept}
    assert redone == {changed, gone, again, *BROKEN}
    assert {record.source for record in result.failed} == set(BROKEN) - {"empty.tflite"}
    nibblecast.batch(models, tmp_path / "whole", "safetensors")
    assert outputs_of(out) == outputs_of(tmp_path / "whole")


def test_other_options_are_done_again(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nibblecast.batch(models / "part0", out, "safetensors")
    result = nibblecast.batch(
        models / "part0", out, "safetensors", dequantize="float16", settings=BatchSettings(resume=True)
    )
    assert not any(record.kept for record in result.records)


def test_a_report_with_a_torn_line_is_read(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nibblecast.batch(models / "part0", out, "safetensors")
    report = out / REPORT
    whole = report.read_bytes()
    report.write_bytes(whole[:-40] + b'{"status": "done", "sour\xff')
    result = nibblecast.batch(models / "part0", out, "safetensors", settings=BatchSettings(resume=True))
    assert sum(not record.kept for record in result.records) == 1
    assert len(read_report(report)) == len(result.records)


def test_the_first_failure_ends_a_batch_that_wants_it(models: Path, tmp_path: Path) -> None:
    result = nibblecast.batch(models, tmp_path / "out", "safetensors", settings=BatchSettings(fail_fast=True, jobs=1))
    assert len(result.failed) == 1
    assert len(result.records) < len(GOOD)


def test_what_an_ended_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """What other workers are writing stays, and what has such a name by chance."""
    ended, running = (make_temporary(tmp_path, hidden_name("a.h"), ".nibblecast-part") for _ in range(2))
    longer = make_temporary(tmp_path, hidden_name("a.h.b"), ".nibblecast-part")
    for left in (ended, longer):
        (left.path / "a.h").touch()
        left.close()
    (tmp_path / ".a.nibblecast-part").mkdir()
    chance = tmp_path / f".a.h.{'0' * 16}.nibblecast-part"
    chance.mkdir()
    targets = (("cheader", tmp_path / "a.h"),)
    LocalFolder(tmp_path).tidy(Job(tmp_path / "a.tflite", "a.tflite", tmp_path, targets, Request()))
    kept = [".a.nibblecast-part", chance.name, longer.path.name, running.path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    running.remove()


def test_as_many_formats_as_targets_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 targets, but 1 formats"):
        nibblecast.convert(GOOD[0], tmp_path / "a.h", tmp_path / "b.h", to=["cheader"])


def test_two_batches_do_not_write_one_folder(models: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)",
    ]
    (tmp_path / "out").mkdir()
    with subprocess.Popen([*command, str(tmp_path / "out" / ".nibblecast-lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UsageError, match="is being written by another batch"):
            nibblecast.batch(models, tmp_path / "out", "safetensors")
        holder.kill()


def test_a_killed_tree_is_resumed_to_the_same_outcome(models: Path, tmp_path: Path) -> None:
    """The whole tree is killed at ten moments; what is resumed in the end is what one run gives."""
    out, one, moments = tmp_path / "out", tmp_path / "one", random.Random(0)
    began = time.monotonic()
    assert run(models, out, "--to", "safetensors", "--to", "cheader", "--jobs", 2).returncode == 7
    seconds = time.monotonic() - began
    out.rename(one)
    arguments = ["batch", str(models), str(out), "--to", "safetensors", "--to", "cheader", "--jobs", "2", "--resume"]
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-m", "nibblecast", *arguments],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(moments.uniform(0.1, 1) * seconds)
            os.killpg(process.pid, signal.SIGKILL)
    final = run(*arguments[1:])
    assert final.returncode == 7, final.stderr
    assert outputs_of(out) == outputs_of(one)
    lines = (out / REPORT).read_text().splitlines()
    records = read_report(out / REPORT)
    assert len(lines) == len(records) == len(GOOD) + 1 + len(BROKEN)
    expected = read_report(one / REPORT)
    assert [without_measures(records[name]) for name in records] == [without_measures(expected[n]) for n in expected]
    assert not list(out.rglob("*nibblecast-part*"))
