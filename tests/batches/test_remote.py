"""Models that are not on this machine, in fsspec's store in memory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches import remote
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.batches.scratch import scratch_folder
from nibblecast.converters.errors import UsageError
from tests.batches.places import EXTERNAL, FIXTURES, GOOD, NO_MODELS, objects_of, outputs_of, write_models

pytestmark = pytest.mark.slow


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_models(tmp_path / "models")


def test_in_memory(models: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in models.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"/in/{path.relative_to(models)}")
    options = {"exclude": NO_MODELS, "verify": True}
    expected = nibblecast.batch(models, tmp_path / "out", ["safetensors", "cheader"], **options)
    result = nibblecast.batch("memory://in", "memory://out", ["safetensors", "cheader"], **options)
    assert [r.outputs for r in result.records] == [r.outputs for r in expected.records]
    assert objects_of(store, "/out") == outputs_of(tmp_path / "out")
    again = nibblecast.batch(
        "memory://in", "memory://out", ["safetensors", "cheader"], settings=BatchSettings(resume=True), **options
    )
    assert {record.source for record in again.records if not record.kept} == {"broken.tflite"}
    with pytest.raises(UsageError, match="can be read by this process only"):
        nibblecast.batch("memory://in", "memory://out", "safetensors", settings=BatchSettings(timeout=9))


@pytest.mark.parametrize(
    ("name", "options"),
    [("model.onnx", {"external_data": 1}), ("model.h", {}), ("model.h", {"style": "incbin"})],
    ids=["ONNX with external data", "C in two files", "C with a payload"],
)
def test_a_file_comes_with_those_that_it_refers_to(name: str, options: dict[str, object], tmp_path: Path) -> None:
    source = tmp_path / "in" / name
    source.parent.mkdir()
    files = nibblecast.convert(FIXTURES / "tflite" / "mlp_int4_per_tensor.tflite", source, **options).files
    assert len(files) > 1
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in source.parent.iterdir():
        store.put_file(str(path), f"/in/{path.name}")
    expected = nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors", include=[name])
    result = nibblecast.batch("memory://in", "memory://out", "safetensors", include=[name])
    assert not result.failed
    assert [record.outputs for record in result.records] == [record.outputs for record in expected.records]


def test_a_file_that_is_missing_there_too_is_that_models_failure(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put_file(str(EXTERNAL), f"/in/{EXTERNAL.name}")
    (record,) = nibblecast.batch("memory://in", tmp_path / "out", "safetensors").failed
    assert record.failure is not None
    assert record.failure.exit_code == 3
    assert record.failure.message.startswith("memory://in/external_buffer.weights.bin: ")
    assert record.failure.message.endswith("does not exist")


def test_what_breaks_off_in_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a store has a file before it is complete."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe_file("/in/model.tflite", GOOD[0].read_bytes())

    def broken(path: str, url: str) -> None:
        with store.open(url, "wb") as file:
            file.write(Path(path).read_bytes()[:9])
            if not path.endswith(REPORT):
                raise OSError("the disk is gone")

    monkeypatch.setattr(type(store), "put_file", staticmethod(broken))
    (record,) = nibblecast.batch("memory://in", "memory://out", "safetensors").failed
    assert record.failure is not None
    assert record.failure.transient
    assert record.failure.message == "memory://out/model.safetensors cannot be reached: the disk is gone"
    assert objects_of(store, "/out") == {}


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys\nfrom nibblecast.converters.batches.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n    (folder / 'model').touch()\n    print(folder, flush=True)\n"
        "    sys.stdin.read()"
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders, processes = [], []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        folders.append(Path(process.stdout.readline().strip()))
    processes[0].kill()
    processes[0].communicate()
    with scratch_folder() as own:
        assert set(tmp_path.iterdir()) == {own, folders[1]}
        assert (folders[1] / "model").exists()
    processes[1].communicate("")
    assert list(tmp_path.iterdir()) == []


def test_names_that_lead_out_of_the_folder_are_no_models(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pipe_file("/in/good.tflite", GOOD[0].read_bytes())
    store.pipe_file("/in/x/../../bad.tflite", GOOD[0].read_bytes())
    assert set(remote.files_below("memory://in")) == {"good.tflite"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing", "memory://nothing: is neither a folder nor a list of paths"),
        ("memory://in/good.tflite", "memory://in/good.tflite: is a file: give its folder"),
        ("nosuch://x/y", "nosuch://x/y cannot be reached: Protocol not known: nosuch"),
    ],
)
def test_urls_that_are_none(url: str, message: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/in/good.tflite", GOOD[0].read_bytes())
    with pytest.raises(UsageError, match=message):
        nibblecast.batch(url, tmp_path / "out", "safetensors")


def test_a_store_whose_package_is_missing(tmp_path: Path) -> None:
    program = "import sys\nsys.modules['s3fs'] = None\nfrom nibblecast.converters.cli import main\nmain()"
    arguments = ["batch", "s3://models/in", str(tmp_path), "--to", "safetensors"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.endswith("pip install 'nibblecast[remote]'\n")
    assert len(done.stderr.splitlines()) == 1
