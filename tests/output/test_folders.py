"""Folders that appear whole or not at all, and what a killed run leaves for the next one."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters import pipeline
from nibblecast.converters.conversion import write_shard
from nibblecast.converters.errors import Error, UsageError
from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.output.private_folder import MARK
from nibblecast.converters.storage import Computed
from nibblecast.formats.safetensors.file_layout import FileLayout
from tests.formats.encodings.checkpoints import write_folder

pytestmark = pytest.mark.slow

SHARDS = 6
TENSORS = {f"layers.{n}.weight": np.full((64, 64), n, np.float32) for n in range(SHARDS)}
ONE_EACH = {"shard_size": "17K"}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", TENSORS, config={"model_type": "llama"})


def converted(source: Path, target: Path, **options: Any) -> nibblecast.Conversion:
    return nibblecast.convert(source, target, to="safetensors", **(ONE_EACH | options))


def test_a_dry_run_knows_every_file_and_size(source: Path, tmp_path: Path) -> None:
    planned = converted(source, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    written = converted(source, tmp_path / "out")
    assert planned.files == written.files
    assert {str(file.path) for file in written.files} == {str(path) for path in (tmp_path / "out").iterdir()}
    assert listing(tmp_path) == ["out", "source"]


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        converted(source, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_and_a_file_in_one_run(source: Path, tmp_path: Path) -> None:
    done = nibblecast.convert(
        source, tmp_path / "out", tmp_path / "x.safetensors", to="safetensors", verify=True, **ONE_EACH
    )
    assert all(comparison is not None and comparison.equal for comparison in done.verified.values())
    assert len(done.verified) == 2


KILLED = """
import os, signal, sys
import nibblecast
from nibblecast.formats.safetensors import file_layout
write, done = file_layout.FileLayout.write, 0
def killed_at(self, stream, wrote):
    global done
    if done == int(sys.argv[3]):
        stream.write(self.beginning)
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    write(self, stream, wrote)
file_layout.FileLayout.write = killed_at
nibblecast.convert(sys.argv[1], sys.argv[2], to="safetensors", resume=True, shard_size="17K")
"""


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_killed_run_is_resumed_from_the_last_whole_shard(
    after: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target), str(after)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    written: list[str] = []
    write = FileLayout.write

    def counted(self: FileLayout, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        written.append(self.file.path.name)
        write(self, stream, wrote)

    monkeypatch.setattr(FileLayout, "write", counted)
    told: list[tuple[int, int]] = []
    converted(source, target, resume=True, progress=lambda done, total: told.append((done, total)))
    assert len(written) == SHARDS - after
    assert told[-1][0] == told[-1][1]
    monkeypatch.undo()
    converted(source, tmp_path / "whole")
    assert contents(target) == contents(tmp_path / "whole")
    assert listing(tmp_path) == ["out", "source", "whole"]


@pytest.mark.parametrize("change", ["nothing but --resume", "options", "source"])
def test_what_another_run_left_is_not_mixed_in(change: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target), "4"], check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(listing(tmp_path)) > len(["source"])  # what it has left
    if change == "source":
        shard = next(source.glob("*.safetensors"))
        changed = {name: array + 1 for name, array in TENSORS.items()}
        time = shard.stat().st_mtime_ns
        write_folder(source, changed, config={"model_type": "llama"})
        os.utime(shard, ns=(time + 1, time + 1))
    options: dict[str, Any] = {"dequantize": np.float32} if change == "options" else {}
    converted(source, target, resume=change != "nothing but --resume", **options)
    converted(source, tmp_path / "whole", **options)
    assert contents(target) == contents(tmp_path / "whole")


def failing(error: BaseException, target: Path) -> list[pipeline.PlannedOutput]:
    """Two tensors, the second of which cannot be read."""

    def fail(start: int, stop: int) -> np.ndarray:
        raise error

    tensors = {
        "good": Tensor.from_array("good", np.zeros(1000, np.float32)),
        "bad": Tensor("bad", (1000,), np.dtype(np.float32), Computed(4000, fail)),
    }
    format = nibblecast.converters.plugins.format_named("safetensors")
    return pipeline.plan(Model(tensors), [pipeline.Target(target, format, {"shard_size": "4K"})])


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(nibblecast.Error, match="damaged"):
        pipeline.run(failing(nibblecast.converters.errors.CorruptFile("is damaged"), tmp_path / "out"))
    assert listing(tmp_path) == []


def test_a_full_disk_says_that_shards_are_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No space left on device; complete shards are kept: continue with --resume"):
        pipeline.run(failing(OSError(28, "No space left on device"), tmp_path / "out"))
    assert listing(tmp_path) == [".out.nibblecast-part"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_keeps_whole_shards_only(interruption: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(interruption)):
        pipeline.run(failing(interruption, tmp_path / "out"))
    kept = sorted(path.name for path in (tmp_path / ".out.nibblecast-part" / "out").glob("*"))
    assert "model-00001-of-00002.safetensors" in kept
    assert "model-00002-of-00002.safetensors" not in kept


def test_a_folder_of_ours_is_replaced(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out")
    converted(source, tmp_path / "out", shard_size="1G")
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert listing(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("name", ["thesis.tex", "mine.safetensors", "other.safetensors.index.json"])
def test_a_folder_with_other_files_is_not(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds '{name}', which would be deleted"):
        converted(source, tmp_path / "out")
    assert listing(tmp_path / "out") == [name]


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    converted(source, tmp_path / "out", verify=True)


def test_the_source_is_not_a_target(source: Path) -> None:
    before = contents(source)
    with pytest.raises(UsageError, match="is both the input and"):
        converted(source, source)
    assert contents(source) == before


def test_a_target_within_the_source_is_not_copied_into_itself(source: Path) -> None:
    converted(source, source / "out")
    converted(source, source / "out")
    assert not (source / "out" / "out").exists()


def test_a_missing_folder_around_it_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        converted(source, tmp_path / "missing" / "out")


def test_two_runs_do_not_write_one_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(failing(KeyboardInterrupt(), tmp_path / "out"))
    with (tmp_path / ".out.nibblecast-part" / MARK).open("r+") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being written by another run"):
            converted(source, tmp_path / "out")
    converted(source, tmp_path / "out")
    assert listing(tmp_path) == ["out", "source"]


def test_parts_are_of_one_intent(source: Path, tmp_path: Path) -> None:
    def part(number: int, **options: Any) -> int:
        return write_shard(source, tmp_path / "out", number=number, to=["safetensors"], **(ONE_EACH | options))

    with pytest.raises(UsageError, match="out: was not started"):
        part(1)
    assert listing(tmp_path) == ["source"]
    assert part(0) == SHARDS
    with pytest.raises(UsageError, match="was started for another source, or with other options"):
        part(1, only=["layers.0.*"])
    assert part(2) == SHARDS
    staged = tmp_path / ".out.nibblecast-part" / "out"
    before = (staged / f"model-00002-of-{SHARDS:05d}.safetensors").stat()
    converted(source, tmp_path / "out", resume=True)
    after = (tmp_path / "out" / f"model-00002-of-{SHARDS:05d}.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    converted(source, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_layout_that_needs_a_folder_says_so(tmp_path: Path) -> None:
    model = Model({"w": Tensor.from_array("w", np.zeros(3, np.float32))})
    with pytest.raises(UsageError, match=r"name a folder, not a file \(.*out, say\)"):
        nibblecast.save(model, tmp_path / "out.safetensors", layout="gptq")


def test_a_plain_int4_tensor_is_refused_by_other_layouts(tmp_path: Path) -> None:
    plain = Tensor.from_array("w", np.zeros((2, 3), ml_dtypes.int4))
    with pytest.raises(Error, match="only the layout packed can hold"):
        nibblecast.save(
            Model({"w": replace(plain, quantization=None)}), tmp_path / "out", to="safetensors", layout="mlx"
        )


def test_a_staging_folder_that_is_a_link_is_not_followed(source: Path, tmp_path: Path) -> None:
    """As a repository or an archive may hold one."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.tex").write_text("mine")
    (tmp_path / ".out.nibblecast-part").symlink_to("victim")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"'\.out\.nibblecast-part' beside it is in the way"):
            converted(source, tmp_path / "out", resume=resume)
    assert listing(tmp_path / "victim") == ["thesis.tex"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [".out.nibblecast-part", ".out.nibblecast-former"])
def test_folders_of_such_names_that_are_not_ours_stay(name: str, source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out")
    (tmp_path / name).mkdir()
    for inside in ("thesis.tex", MARK, ".nibblecast-intent", "model.safetensors"):
        (tmp_path / name / inside).write_text("mine")
    with suppress(UsageError):
        converted(source, tmp_path / "out")
    assert len(listing(tmp_path / name)) == 4


@pytest.mark.parametrize("name", ["out/model-00001-of-00006.safetensors", "out/config.json", ".nibblecast-intent"])
def test_links_in_a_staging_folder_are_not_written_through(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(failing(KeyboardInterrupt(), tmp_path / "out"))
    for each in (name, f"{name}.incomplete"):
        (tmp_path / ".out.nibblecast-part" / each).unlink(missing_ok=True)
        (tmp_path / ".out.nibblecast-part" / each).symlink_to(tmp_path / "victim")
    converted(source, tmp_path / "out", resume=True)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_a_target_that_is_a_link_to_a_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(UsageError, match="is a link; a folder is put in its place whole"):
        converted(source, tmp_path / "out")
    assert listing(tmp_path / "real") == []


def test_the_permissions_of_the_folder_before_are_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    converted(source, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_what_fails_verification_is_not_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    write = FileLayout.write

    def damaged(self: FileLayout, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        whole = io.BytesIO()
        write(self, whole, wrote)
        stream.write(whole.getvalue()[:-4] + b"\1\2\3\4")

    monkeypatch.setattr(FileLayout, "write", damaged)
    with pytest.raises(nibblecast.Error, match="out: is not written, because reading it back"):
        converted(source, tmp_path / "out", verify=True)
    assert contents(tmp_path / "out") == before
    assert listing(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("resume", [False, True])
def test_a_crash_amid_the_last_steps_is_followed_by_a_run_that_leaves_nothing(
    step: int, resume: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staging folder gets its name; the folder that is there is moved into it; the new one to its place."""
    converted(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    renamed, rename = 0, Path.rename

    def crashing(self: Path, target: Path) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == step:
            os._exit(9)
        rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crashing)
        child = os.fork()
        if not child:
            converted(source, tmp_path / "out")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    converted(source, tmp_path / "out", resume=resume)
    assert contents(tmp_path / "out") == before
    assert listing(tmp_path) == ["out", "source"]
