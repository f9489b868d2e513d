"""What a batch leaves alone: outputs of others, links, what is no file; and where its own outputs go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.batches.scratch import scratch_folder
from nibblecast.converters.errors import UsageError

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
MODEL = FIXTURES / "mlp_int4_blockwise.tflite"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary folders are made in."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["nibblecast-out", "nibblecast-scratch-out", "nibblecast-scratch-0123456789abcdef"])
def test_a_batch_from_a_url_leaves_the_outputs_of_earlier_batches(name: str, temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(MODEL, tmp_path / "in")
    nibblecast.batch(tmp_path / "in", temporary / name, "safetensors")
    before = contents(temporary / name)
    assert len(before) >= 2
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put_file(str(MODEL), "/in/m.tflite")
    result = nibblecast.batch("memory://in", "memory://out", "safetensors")
    assert not result.failed
    assert contents(temporary / name) == before
    assert [path.name for path in temporary.iterdir()] == [name]


def test_scratch_that_is_a_link_or_of_another_maker_stays(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (temporary / "nibblecast-scratch-link").symlink_to(tmp_path / "victim")
    (temporary / "nibblecast-scratch-mine").mkdir()
    for folder in (tmp_path / "victim", temporary / "nibblecast-scratch-mine"):
        for name in (".nibblecast-lock", ".nibblecast-mark", "thesis.tex"):
            (folder / name).touch()
    with scratch_folder() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list((tmp_path / "victim").iterdir())) == 3
    assert len(list((temporary / "nibblecast-scratch-mine").iterdir())) == 3
    assert not folder.exists()


@pytest.mark.parametrize(
    "lines",
    [
        ("in/a.tflite", "../other/b.tflite"),
        ("in/a.tflite", "in/../../other/b.tflite"),
        ("../other/b.tflite", "../here/in/a.tflite"),
        ("link/../b.tflite", "in/a.tflite"),
    ],
)
def test_a_list_with_steps_up_writes_below_the_target(
    lines: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "in").mkdir(parents=True)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "other" / "deep")
    shutil.copy(MODEL, tmp_path / "here" / "in" / "a.tflite")
    shutil.copy(MODEL, tmp_path / "other" / "b.tflite")
    monkeypatch.chdir(tmp_path / "here")
    Path("list").write_text("\n".join(lines))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    result = nibblecast.batch("list", "../out/target", "safetensors")
    assert not result.failed
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(tmp_path / "out" / "target") for path in made)
    names = sorted(record.source for record in result.records)
    assert names == ["here/in/a.tflite", "other/b.tflite"]


def test_one_file_by_two_ways_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(MODEL, tmp_path / "in" / "a.tflite")
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("in/a.tflite\nin/../in/a.tflite\n./in/a.tflite")
    assert [record.source for record in nibblecast.batch("list", "out", "safetensors").records] == ["a.tflite"]


def test_a_url_with_steps_up_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name in ("/in/a.tflite", "/in/../b.tflite"):
        store.store[name] = type(store.open("/x", "wb"))(store, name, MODEL.read_bytes())
    (tmp_path / "list").write_text("memory://in/a.tflite\nmemory://in/../b.tflite")
    with pytest.raises(UsageError, match="outside of it|does not exist"):
        nibblecast.batch(tmp_path / "list", tmp_path / "out" / "target", "safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipe", "pipe.tflite", "pipe.bin", "config.json"])
def test_a_fifo_holds_up_no_batch(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(MODEL, tmp_path / "in" / "a.tflite")
    os.mkfifo(tmp_path / "in" / name)
    command = [sys.executable, "-m", "nibblecast", "batch", str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([*command, "--to", "safetensors"], capture_output=True, timeout=60, check=False)
    assert done.returncode == (7 if name == "pipe.tflite" else 0)
    assert (tmp_path / "out" / "a.safetensors").exists()


def test_a_list_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list")
    with pytest.raises(UsageError, match="cannot be read: not a regular file"):
        nibblecast.batch(tmp_path / "list", tmp_path / "out", "safetensors")


@pytest.mark.parametrize("name", [".nibblecast-lock", REPORT])
def test_links_in_the_target_are_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(MODEL, tmp_path / "in" / "a.tflite")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out" / name).symlink_to(tmp_path / "victim")
    if name == REPORT:
        nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors")
    else:
        with pytest.raises(UsageError, match="cannot be written"):
            nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_report_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(MODEL, tmp_path / "in" / "a.tflite")
    os.mkfifo(tmp_path / "out" / REPORT)
    with pytest.raises(UsageError, match="is a FIFO"):
        nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors", settings=BatchSettings(resume=True))


@pytest.mark.parametrize("step", ["begin", "line"])
def test_a_report_that_does_not_fit_on_the_disk_is_one_line(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibblecast.converters.batches import run

    (tmp_path / "in").mkdir()
    shutil.copy(MODEL, tmp_path / "in" / "a.tflite")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, {"begin": "write_report", "line": "flush"}[step], full)
    with pytest.raises(UsageError, match=r"nibblecast-report\.jsonl: cannot be written: No space left on device"):
        nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors")
