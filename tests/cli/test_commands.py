"""The command line as a user sees it: output, one-line errors, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.cli.arguments import human_bytes, progress_bar, with_default_dequantize
from nibblecast.converters.version import __version__
from tests import zoo

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
INT4 = str(FIXTURES / "cnn_int4_per_channel.tflite")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibblecast", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, pattern: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(pattern, done.stderr), done.stderr


def test_the_main_job_in_one_call(tmp_path: Path) -> None:
    done = run("convert", INT4, tmp_path / "w.h", tmp_path / "w.safetensors", tmp_path / "w.onnx", "--verify")
    assert done.returncode == 0, done.stderr
    for name in ("w.h", "w.c", "w.safetensors", "w.onnx"):
        assert (tmp_path / name).exists()
        assert f"{name} (" in done.stdout
    assert (
        f"verified {tmp_path / 'w.safetensors'}: 7 tensors, 471 elements, 3 of the tensors code for code" in done.stdout
    )
    assert f"verified {tmp_path / 'w.onnx'}" in done.stdout
    assert f"verified {tmp_path / 'w.h'}: 7 tensors, 471 elements, 3 of the tensors code for code" in done.stdout


def test_inspect_shows_a_table_and_json() -> None:
    done = run("inspect", INT4)
    assert done.returncode == 0
    assert re.search(r"cnn_1/conv_1/convolution +8×3×3×3 +int4 +per-axis 0", done.stdout)
    assert "7 tensors, 3 quantized, 471 elements" in done.stdout
    assert "CONV_2D 1" in done.stdout
    document = json.loads(run("inspect", INT4, "--json").stdout)
    tensor = next(t for t in document["tensors"] if t["name"] == "cnn_1/conv_1/convolution")
    assert tensor["quantization"]["block_shape"] == [1, 3, 3, 3]
    assert tensor["quantization"]["scale"] == {"shape": [8, 1, 1, 1], "dtype": "float32"}
    assert tensor["uses"] == [{"operator": "CONV_2D", "input": 1, "channel_axis": 0, "sum_axes": [3, 1, 2]}]


def test_inspect_shows_a_graph() -> None:
    model = FIXTURES.parent / "onnx" / "matmul_nbits_quantizer.onnx"
    done = run("inspect", model)
    assert re.search(r"W_Q4 +10×48 +uint4 +blockwise \(1, 32\) .* MatMulNBits", done.stdout)
    for line in ("inputs: x float32 48×48", "outputs: y float32 48×10", "operators: MatMulNBits 1"):
        assert line in done.stdout.splitlines()
    assert "operator sets: ai.onnx 21, com.microsoft 1" in done.stdout
    assert "bits per quantized weight" in done.stdout
    document = json.loads(run("inspect", model, "--json").stdout)
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": [48, 48]}]
    assert document["outputs"] == [{"name": "y", "dtype": "float32", "shape": [48, 10]}]
    assert document["opsets"] == {"": 21, "com.microsoft": 1}
    # ten rows of 48 codes in four bits, and for each of 20 blocks a float32 scale and a zero point that takes a byte
    assert document["bits_per_quantized_weight"] == 8 * (240 + 20 * 5) / 480


@pytest.mark.slow
def test_inspect_of_every_fixture_succeeds() -> None:
    paths = [path for path in sorted(FIXTURES.glob("*.t*")) if path.suffix in (".tflite", ".task")]
    assert len(paths) >= 20
    for path in paths:
        done = run("inspect", path)
        assert done.returncode == 0, done.stderr


def test_formats_lists_and_describes() -> None:
    listed = run("formats").stdout
    for name in ("cheader", "onnx", "safetensors", "tflite"):
        assert re.search(rf"^{name} ", listed, re.MULTILINE)
    assert "layout" in run("formats", "safetensors").stdout
    documents = json.loads(run("formats", "--json").stdout)
    assert {d["name"]: (d["reads"], d["writes"]) for d in documents}["tflite"] == (True, False)
    assert json.loads(run("formats", "safetensors", "--json").stdout)["options"][0]["name"] == "layout"


def test_verify_says_equal_or_shows_the_differences(tmp_path: Path) -> None:
    run("convert", INT4, tmp_path / "a.safetensors")
    done = run("verify", INT4, tmp_path / "a.safetensors")
    assert done.returncode == 0
    assert done.stdout.startswith("equal: 7 tensors")
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[-1] ^= 0x10
    (tmp_path / "b.safetensors").write_bytes(content)
    done = run("verify", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.returncode == 6
    assert "against" in done.stdout
    document = json.loads(run("verify", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json").stdout)
    assert document["equal"] is False
    assert document["differences"]


def test_dequantize_takes_a_dtype_or_none(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    for extra, dtype in ((["--dequantize"], np.float32), (["--dequantize", "float16"], np.float16)):
        done = run("convert", *extra, INT4, tmp_path / "a.safetensors", "--verify")
        assert done.returncode == 0, done.stderr
        assert load_file(tmp_path / "a.safetensors")["cnn_1/dense_1/MatMul"].dtype == dtype
    assert with_default_dequantize(["--dequantize", "a.tflite"]) == ["--dequantize", "float32", "a.tflite"]
    assert with_default_dequantize(["--dequantize", "bfloat16"]) == ["--dequantize", "bfloat16"]
    assert_one_line_error(run("convert", "--dequantize=int8", INT4, tmp_path / "b.safetensors"), 2, "float32, float16")


def test_quiet_and_dry_run(tmp_path: Path) -> None:
    done = run("convert", INT4, tmp_path / "a.safetensors", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    done = run("convert", INT4, tmp_path / "b.safetensors", "--dry-run")
    assert "would write" in done.stdout
    assert not (tmp_path / "b.safetensors").exists()


def test_an_exact_change_of_form_is_a_note_and_no_loss(tmp_path: Path) -> None:
    done = run("convert", FIXTURES / "sparse_float32.tflite", tmp_path / "a.safetensors", "--fail-on-loss")
    assert done.returncode == 0
    assert re.fullmatch(r"note: \S+: its sparse values are written out with the zeros between them\n", done.stderr)
    done = run("inspect", FIXTURES / "sparse_float32.tflite")
    assert "\nnote: " in done.stdout
    document = json.loads(run("inspect", FIXTURES / "sparse_float32.tflite", "--json").stdout)
    assert (document["losses"], len(document["notes"])) == ([], 1)
    document = json.loads(
        run("convert", FIXTURES / "sparse_float32.tflite", tmp_path / "b.safetensors", "--json").stdout
    )
    assert (document["losses"], len(document["notes"])) == ([], 1)


def test_what_is_not_kept_or_changed_is_listed_and_refused_on_request(tmp_path: Path) -> None:
    source, target = FIXTURES.parent / "gguf" / "types.gguf", tmp_path / "a.safetensors"
    done = run("convert", source, target)
    assert done.returncode == 0
    assert done.stderr.startswith("not kept: the model: ")
    done = run("convert", INT4, target, "--quantize", "int8,requantize")
    assert "\nchanged: " in f"\n{done.stderr}"
    target.unlink()
    done = run("convert", source, target, "--fail-on-loss")
    assert_one_line_error(done, 5, "refused by --fail-on-loss: not kept: the model: ")
    assert not target.exists()


def test_of_many_losses_and_notes_the_first_are_shown(tmp_path: Path) -> None:
    weights = [zoo.quantized(f"w{i}", (4, 8), (1, 8)) for i in range(12)]
    weights = [replace(w, quantization=replace(w.quantization, factor=0.3)) for w in weights]
    nibblecast.save(zoo.model(weights), tmp_path / "a.safetensors")
    done = run("convert", tmp_path / "a.safetensors", tmp_path / "a.onnx", "--opt", "opset=13")
    lines = done.stderr.splitlines()
    assert lines[10:11] == ["note: 2 more; --json lists all"]
    assert lines[21:] == ["not kept or changed: 2 more; --json lists all"]


@pytest.mark.parametrize(
    ("content", "code", "pattern"),
    [
        (b"\x1c\x00\x00\x00TFL9" + bytes(64), 3, "identifier b'TFL9'"),
        (b"", 3, "is empty"),
        (b"\x1c\x00\x00\x00TFL3", 3, "truncated or damaged"),
    ],
    ids=["identifier", "empty", "truncated"],
)
def test_bad_input_is_exit_3_and_nothing_is_written(content: bytes, code: int, pattern: str, tmp_path: Path) -> None:
    source, target = tmp_path / "bad.tflite", tmp_path / "out.safetensors"
    source.write_bytes(content)
    target.write_bytes(b"old")
    done = run("convert", source, target)
    assert_one_line_error(done, code, rf"^nibblecast: {re.escape(str(source))}: .*({pattern})")
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tflite", "out.safetensors"]


def test_usage_errors_are_exit_2(tmp_path: Path) -> None:
    assert_one_line_error(run("convert", INT4, tmp_path / "a.xyz"), 2, r"extension '.xyz'")
    assert_one_line_error(run("convert", INT4, tmp_path / "a.h", "--opt", "nonsense"), 2, "must be key=value")
    assert_one_line_error(run("convert", INT4, tmp_path / "a.h", "--opt", "no=1"), 2, "no target has an option 'no'")
    assert_one_line_error(run("convert", INT4, tmp_path / "a.h", "--to", "tf"), 2, "unknown format 'tf'")
    assert run("convert", INT4).returncode == 2
    assert run("nonsense").returncode == 2


def test_missing_input_is_exit_3(tmp_path: Path) -> None:
    assert_one_line_error(
        run("inspect", tmp_path / "missing.tflite"), 3, "missing.tflite: cannot be read: No such file"
    )


def test_hostile_names_stay_on_their_line_and_out_of_the_terminal() -> None:
    done = run("inspect", FIXTURES / "odd_names.tflite")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\\n" in done.stdout


def test_a_bar_shows_on_a_terminal_when_there_is_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("convert", quiet=True) as progress:
        assert progress is None
    with progress_bar("convert", quiet=False) as progress:
        assert progress is not None
        progress(1, 2)  # too little to show
        progress(1 << 29, 1 << 30)
        progress(1 << 30, 1 << 30)


def test_terminated_it_cleans_up_and_says_so_in_its_exit_code(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from nibblecast.converters.cli import main\n"
        "from nibblecast.formats.safetensors import file_layout\n"
        "file_layout.FileLayout.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['nibblecast', 'convert', {INT4!r}, {str(tmp_path / 'a.safetensors')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + 15
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes_for_people() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"nibblecast {__version__}\n"


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("convert", "inspect", "verify", "formats"):
        assert command in done.stdout
