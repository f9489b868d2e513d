"""Paths that nothing can have, files that may not be read, and inputs that are none: an Error with its exit code from
every function, and one line from every command."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.compare import running
from nibblecast.converters.errors import Error, ExitCode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
ONNX = ROOT / "fixtures" / "onnx" / "matmul_nbits_quantizer.onnx"

LONG = "n" * 300
READING: dict[str, Callable[[Any], object]] = {
    "load": nibblecast.load,
    "load with options": lambda path: nibblecast.load(path, graph=False),
    "convert": lambda path: nibblecast.convert(path, "/nowhere/out.h"),
    "convert with options": lambda path: nibblecast.convert(path, "/nowhere/out.h", layout="header"),
    "verify": lambda path: nibblecast.verify(path, INT4),
    "verify the other": lambda path: nibblecast.verify(INT4, path),
    "verify with options": lambda path: nibblecast.verify(INT4, path, graph=False),
    "compare_outputs": lambda path: nibblecast.compare_outputs(path, ONNX),
    "inputs": lambda path: nibblecast.compare_outputs(ONNX, ONNX, inputs=path),
    "report": nibblecast.report,
    "reference": lambda path: nibblecast.report(INT4, reference=path),
    "batch": lambda path: nibblecast.batch(path, "/nowhere/out", "safetensors"),
}
WRITING: dict[str, Callable[[Any], object]] = {
    "save": lambda path: nibblecast.save(nibblecast.load(INT4), path, to="safetensors"),
    "convert": lambda path: nibblecast.convert(INT4, path, to="safetensors"),
    "convert to C": lambda path: nibblecast.convert(INT4, path, to="cheader", layout="header"),
    "convert to ONNX": lambda path: nibblecast.convert(INT4, path, to="onnx"),
    "report": lambda path: nibblecast.report(INT4, f"{path}.html" if path and "\0" not in path else path),
    "batch": lambda path: nibblecast.batch(ROOT / "fixtures" / "onnx", path, "safetensors"),
}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Paths that no file is at, and that the system refuses in different ways."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "empty": "",
        "zero byte": "a\0b",
        "lone surrogate": "a\ud800b",
        "long name": str(tmp_path / LONG),
        "long path": str(tmp_path) + "/d" * 3_000,
        "below a file": str(tmp_path / "file" / "x.tflite"),
        "loop": str(tmp_path / "loop"),
    }


KINDS = ["empty", "zero byte", "lone surrogate", "long name", "long path", "below a file", "loop"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", READING)
def test_what_cannot_be_read(what: str, kind: str, paths: dict[str, str]) -> None:
    with pytest.raises(Error) as caught:
        READING[what](paths[kind])
    assert caught.value.exit_code == ExitCode.UNREADABLE
    assert len(str(caught.value)) < 2_500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loop"])
@pytest.mark.parametrize("what", WRITING)
def test_what_cannot_be_written(what: str, kind: str, paths: dict[str, str]) -> None:
    with pytest.raises(Error) as caught:
        WRITING[what](paths[kind])
    assert caught.value.exit_code == ExitCode.USAGE
    assert str(caught.value).isprintable()


#: Runs commands, each in a fork, in which all is imported already.
EACH = """
import json, os, sys, tempfile
from nibblecast.converters.cli import commands, main
for arguments in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["nibblecast", *arguments]
            main()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)
"""


def run_each(
    commands: Sequence[Sequence[object]], before: str = ""
) -> list[tuple[Sequence[object], int, list[str], list[str]]]:
    """Each command with its exit code and its lines on standard output and standard error; `before` is Python."""
    given = json.dumps([list(map(str, command)) for command in commands])
    program = [sys.executable, "-c", before + EACH, given]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        (command, code, out.splitlines(), err.splitlines())
        for command, (code, out, err) in zip(commands, answers, strict=True)
    ]


#: A process of root may read everything; one without its capabilities, and with SECBIT_NOROOT, may not.
WITHOUT_CAPABILITIES = (
    "import ctypes\n"
    "libc = ctypes.CDLL(None)\n"
    "libc.prctl(28, 1, 0, 0, 0)\n"
    "assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0\n"
)


def commands(path: Path, target: Path) -> list[list[object]]:
    return [
        ["inspect", path],
        ["inspect", path, "--opt", "graph=false"],
        ["convert", path, target / "a.h"],
        ["verify", path, INT4],
        ["verify", INT4, path],
        ["verify", "--run", ONNX, path],
        ["verify", "--run", ONNX, ONNX, "--input", path],
        ["report", path, "--json"],
        ["report", INT4, "--json", "--reference", path],
        ["batch", path, target / "out", "--to", "safetensors"],
    ]


@pytest.mark.parametrize("what", ["file", "folder", "in a folder", "long name", "report"])
def test_each_command_says_so_in_one_line(what: str, tmp_path: Path) -> None:
    """No box of lines by Typer, and no usage error: it is the file that is wrong."""
    folder = tmp_path / "closed"
    folder.mkdir()
    path = folder / ("r.jsonl" if what == "report" else "m.tflite")
    path.write_bytes(INT4.read_bytes())
    if what in ("file", "report"):
        path.chmod(0)
    elif what in ("folder", "in a folder"):
        folder.chmod(0)
        path = folder if what == "folder" else path
    else:
        path = tmp_path / LONG
    try:
        for command, code, _, lines in run_each(commands(path, tmp_path), before=WITHOUT_CAPABILITIES):
            assert (code, len(lines)) == (3, 1), (command, lines)
            assert what == "folder" or "cannot be read" in lines[0]
    finally:
        folder.chmod(0o700)
    assert not list(tmp_path.glob("out*"))


def test_a_source_of_a_batch_that_may_not_be_read_is_its_own_failure(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.tflite"
    path.write_bytes(INT4.read_bytes())
    path.chmod(0)
    command = ["batch", tmp_path / "in", tmp_path / "out", "--to", "safetensors", "--json", "--retries", "2"]
    ((_, code, out, _),) = run_each([command], before=WITHOUT_CAPABILITIES)
    (record,) = json.loads("\n".join(out))["records"]
    assert (code, record["failure"]["exit_code"], record["attempts"]) == (7, 3, 1)
    assert record["failure"]["message"].endswith("m.tflite: cannot be read: Permission denied")


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path) -> None:
    reading = [["inspect", ""], ["convert", "", tmp_path / "a.h"], ["batch", "", tmp_path / "out", "--to", "onnx"]]
    writing = [["convert", INT4, ""], ["report", INT4, "-o", ""], ["batch", tmp_path, "", "--to", "onnx"]]
    for command, code, _, lines in run_each(reading + writing):
        assert code == (3 if command in reading else 2)
        assert lines == ["nibblecast: the path is empty: name a file"]


def test_paths_are_not_checked_by_typer() -> None:
    """What it checks, it tells in a box, as an error of usage."""
    import typer

    from nibblecast.converters.cli import app

    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        for parameter in command.params:
            assert type(parameter.type).__name__ not in ("Path", "File", "TyperPath"), (command.name, parameter.name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_report_that_the_system_refuses_is_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(nibblecast.Error, match=f"report.html: cannot be written: {os.strerror(number)}") as caught:
        nibblecast.report(INT4, tmp_path / "report.html")
    assert caught.value.exit_code == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


def test_a_batch_whose_report_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(nibblecast.Error, match="No space left on device") as caught:
        nibblecast.batch(ROOT / "fixtures" / "onnx", tmp_path / "out", "safetensors")
    assert caught.value.exit_code == ExitCode.USAGE


def npz(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return stream.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    encoded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + data


def damaged(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


FLOATS = np.zeros((48, 48), np.float32)
DEFLATED = npz({"x.npy": npy(np.arange(1000.0))}, zipfile.ZIP_DEFLATED)
ENCRYPTED = DEFLATED.replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01").replace(
    b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
)
NOT_ARRAYS = {
    "empty": b"",
    "text": b"hello",
    "cut": DEFLATED[:-30],
    "a directory that lies": damaged(DEFLATED, len(DEFLATED) - 6, b"\xff\xff\xff\x7f"),
    "bad deflate": damaged(DEFLATED, 60, b"\xff" * 40),
    "bad checksum": damaged(npz({"x.npy": npy(np.arange(9.0))}), 180, b"\xff"),
    "unknown method": DEFLATED.replace(b"\x08\x00", b"\x63\x00"),
    "encrypted": ENCRYPTED,
    "no arrays": npz({}),
    "members that are none": npz({"x": b"no array", "y.txt": b""}),
    "a cut member": npz({"x.npy": npy(np.arange(9.0))[:100]}),
    "only a magic": npz({"x.npy": b"\x93NUMPY"}),
    "an unknown version": npz({"x.npy": b"\x93NUMPY\x09\x09" + bytes(80)}),
    "objects": npz({"x.npy": header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04N.")}),
    "a header that lies": npz({"x.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,), }")}),
    "a larger lie": npz(
        {"x.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }", bytes(8))}
    ),
    "beyond integers": npz(
        {"x.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 400 + ",), }", bytes(8))}
    ),
    "negative": npz({"x.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (-5,), }", bytes(8))}),
    "a header that nests": npz({"x.npy": header("(" * 5_000)}),
    "an unknown dtype": npz({"x.npy": header("{'descr': 'zz', 'fortran_order': False, 'shape': (1,), }", bytes(8))}),
    "an array alone": npy(np.arange(9.0)),
    "a pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x.",
}


@pytest.mark.parametrize("what", NOT_ARRAYS)
def test_inputs_that_are_no_arrays(what: str, tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    path.write_bytes(NOT_ARRAYS[what])
    with pytest.raises(Error) as caught:
        running.read_inputs(path)
    assert caught.value.exit_code == ExitCode.UNREADABLE
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 2_500


def test_inputs_that_are_no_arrays_are_one_line_of_verify(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    command = ["verify", "--run", ONNX, ONNX, "--input", path]
    for content, expected in ((NOT_ARRAYS["bad deflate"], (3, 1)), (npz({"x.npy": npy(FLOATS)}), (0, 0))):
        path.write_bytes(content)
        ((_, code, _, lines),) = run_each([command])
        assert (code, len(lines)) == expected, lines
