"""Inputs that change while they are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters import pipeline
from nibblecast.converters.batches.records import REPORT, read_report
from nibblecast.converters.errors import ChangedFile
from nibblecast.converters.storage import MappedFile, truncated_file
from tests.formats.encodings.checkpoints import write_file

pytestmark = pytest.mark.slow

#: Cuts off the file that argument 1 names when the first piece of it has been read, then goes on as the command line.
TRUNCATING = """
import os, sys
from nibblecast.converters import storage
from nibblecast.converters.cli import main
path, *arguments = sys.argv[1:]
read = storage.FileRange.read
def cut_off(self, start, stop):
    if str(self.file.path) == path:
        os.truncate(path, 4096)
    return read(self, start, stop)
storage.FileRange.read = cut_off
sys.argv = ["nibblecast", *arguments]
main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    weights = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    return write_file(tmp_path / "in" / "m.safetensors", {"w": weights})


@pytest.mark.parametrize(
    "arguments",
    [
        ("{out}/m.gguf",),
        ("{out}/m.onnx",),
        ("{out}/m.h",),
        ("{out}/m.safetensors", "--dequantize", "float16"),
        ("{out}/m.safetensors", "--quantize", "int4,block=32"),
        ("{out}/folder", "--to", "safetensors"),
    ],
    ids=["gguf", "onnx", "C", "float16", "quantized", "folder"],
)
def test_a_truncated_input_is_one_line_and_an_exit_code(
    arguments: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", TRUNCATING, str(model), "convert", str(model)]
    done = subprocess.run(
        [*command, *(each.format(out=out) for each in arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 8, done.stderr
    assert done.stderr.startswith(f"nibblecast: {model}: ")
    assert done.stderr.count("\n") == 1
    assert not [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert not list(out.glob(".*.????????????????.nibblecast-part"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "m.safetensors: changed while it was read"),
        (("--quantize", "int4,block=32"), "m.safetensors: it or a file beside it was cut off while it was read"),
    ],
    ids=["in a system call", "in an instruction"],
)
def test_a_batch_says_so_of_the_model(options: tuple[str, ...], message: str, model: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\nfrom nibblecast.converters import storage\nread = storage.FileRange.read\n"
        "def cut_off(self, start, stop):\n    os.truncate(self.file.path, 4096)\n    return read(self, start, stop)\n"
        "storage.FileRange.read = cut_off\n"
    )
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "nibblecast", "batch", str(model.parent), str(tmp_path / "out"), "--to", "gguf"]
    done = subprocess.run(
        [*command, *options], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    (record,) = read_report(tmp_path / "out" / REPORT).values()
    assert record.failure is not None
    assert (record.failure.exit_code, record.failure.transient) == (8, True)
    assert message in record.failure.message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".nibblecast-lock", REPORT]


def test_what_was_written_to_meanwhile_is_refused(model: Path, tmp_path: Path) -> None:
    """Half of the values could be those of before, and half those of now."""
    (planned,) = pipeline.plan(
        nibblecast.load(model),
        [pipeline.Target(tmp_path / "out.gguf", nibblecast.converters.plugins.format_named("gguf"))],
    )
    with model.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    os.utime(model, ns=(0, 0))
    with pytest.raises(ChangedFile, match=r"m\.safetensors: changed while it was read"):
        pipeline.run([planned])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_what_is_mapped_stays_when_its_name_goes(change: str, model: Path, tmp_path: Path) -> None:
    loaded = nibblecast.load(model)
    expected = loaded["w"].numpy()
    model.unlink()
    if change == "replaced":
        model.write_bytes(b"another")
    nibblecast.save(loaded, tmp_path / "out.safetensors")
    np.testing.assert_array_equal(nibblecast.load(tmp_path / "out.safetensors")["w"].numpy(), expected)


def test_the_truncated_file_is_found_among_all(model: Path, tmp_path: Path) -> None:
    others = []
    for number in range(3):
        (tmp_path / f"{number}").write_bytes(bytes(5000))
        others.append(MappedFile.open(tmp_path / f"{number}"))
    assert truncated_file() is None
    os.truncate(others[1].path, 100)
    assert truncated_file() is others[1]
