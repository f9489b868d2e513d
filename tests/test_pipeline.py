"""Planning, writing all or nothing, and what a conversion reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters import plugins
from nibblecast.converters.conversion import convert_model
from nibblecast.converters.errors import RefusedLoss, Unsupported, UsageError
from nibblecast.converters.interfaces import Capabilities
from nibblecast.converters.ir import Loss, Model, Quantization, Tensor
from nibblecast.converters.metadata import LossKind, Metadata
from nibblecast.converters.output.atomic import atomic_outputs
from nibblecast.converters.pipeline import Target, fit
from nibblecast.converters.storage import Computed
from tests import zoo

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tflite"
INT4 = FIXTURES / "cnn_int4_per_channel.tflite"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_read_feeds_several_writers(tmp_path: Path) -> None:
    done = nibblecast.convert(INT4, tmp_path / "a.safetensors", tmp_path / "b.safetensors", verify=True)
    assert [file.path.name for file in done.files] == ["a.safetensors", "b.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(comparison is not None and comparison.equal for comparison in done.verified.values())


def test_a_computed_tensor_is_computed_once_for_all_writers(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def compute(start: int, stop: int) -> np.ndarray:
        calls.append((start, stop))
        return np.arange(start, stop, dtype=np.uint8)

    model = Model({"x": Tensor("x", (16,), np.dtype(np.uint8), Computed(16, compute))})
    convert_model(model, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], options={})
    assert calls == [(0, 16)]


def test_a_dry_run_writes_nothing_and_knows_the_sizes(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    planned = nibblecast.convert(INT4, target, dry_run=True)
    assert not target.exists()
    written = nibblecast.convert(INT4, target)
    assert planned.files == written.files


def test_planning_reads_no_payload(tmp_path: Path) -> None:
    def compute(start: int, stop: int) -> np.ndarray:
        raise AssertionError("payload was read")

    model = Model({"x": Tensor("x", (1 << 40,), np.dtype(np.float32), Computed(1 << 42, compute))})
    done = convert_model(model, [tmp_path / "a.safetensors"], dry_run=True, options={})
    assert done.files[0].nbytes is not None
    assert done.files[0].nbytes > 1 << 42


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        nibblecast.convert(INT4, tmp_path / name / "w.safetensors", tmp_path / name / "w.onnx", tmp_path / name / "w.h")
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_only_and_skip_choose_by_pattern(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "a.safetensors", only=["*MatMul", "*BiasAdd"], skip=["*dense*MatMul"])
    assert list(nibblecast.load(tmp_path / "a.safetensors")) == ["cnn_1/dense_1/BiasAdd"]
    with pytest.raises(UsageError, match="no tensor matches"):
        nibblecast.convert(INT4, tmp_path / "a.safetensors", only=["nothing"])


def test_parameters_that_are_tensors_go_with_their_owner(tmp_path: Path) -> None:
    source = FIXTURES / "mlp_int4_blockwise.tflite"
    model = nibblecast.load(source)
    owner = next(t.parameter_of for t in model.values() if t.parameter_of)
    nibblecast.convert(source, tmp_path / "a.safetensors", only=[owner])
    assert sorted(nibblecast.load(tmp_path / "a.safetensors")) == sorted(
        [owner, *(name for name, t in model.items() if t.parameter_of == owner)]
    )


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    nibblecast.convert(INT4, source)
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for target in (source, tmp_path / "link.safetensors", tmp_path / "." / "a.safetensors"):
        with pytest.raises(UsageError, match="is both the input and an output"):
            nibblecast.convert(source, target)
    assert source.read_bytes() == before


@pytest.mark.parametrize("dequantize", [None, "float32"])
def test_an_output_that_holds_data_of_the_input_is_refused(tmp_path: Path, dequantize: str | None) -> None:
    for name in ("external_buffer.tflite", "external_buffer.weights.bin"):
        shutil.copy(FIXTURES / name, tmp_path / name)
    target = tmp_path / "external_buffer.weights.bin"
    before = target.read_bytes()
    with pytest.raises(UsageError, match="is both the input and an output"):
        nibblecast.convert(tmp_path / "external_buffer.tflite", target, to="safetensors", dequantize=dequantize)
    assert target.read_bytes() == before


def test_two_outputs_on_one_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would be written twice"):
        nibblecast.convert(INT4, tmp_path / "a.safetensors", tmp_path / "." / "a.safetensors")
    assert listing(tmp_path) == []


def test_two_c_outputs_in_one_folder_share_the_runtime_header(tmp_path: Path) -> None:
    done = nibblecast.convert(INT4, tmp_path / "a.h", tmp_path / "b.h")
    assert listing(tmp_path) == ["a.c", "a.h", "b.c", "b.h", "nibblecast.h"]
    assert sorted(file.path.name for file in done.files) == listing(tmp_path)


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for target, reason in (
        (tmp_path / "missing" / "a.safetensors", "No such file"),
        (tmp_path / "folder.safetensors", "is a folder"),
    ):
        with pytest.raises(UsageError, match=reason):
            nibblecast.convert(INT4, tmp_path / "ok.safetensors", target)
    assert listing(tmp_path) == ["folder.safetensors"]
    with pytest.raises(UsageError, match="no target given"):
        nibblecast.convert(INT4)


def test_a_failure_leaves_the_old_output_and_nothing_else(tmp_path: Path) -> None:
    def compute(start: int, stop: int) -> np.ndarray:
        raise nibblecast.Error("the data turned out to be damaged", tensor="x")

    target = tmp_path / "a.safetensors"
    target.write_bytes(b"what was there before")
    model = Model({"x": Tensor("x", (4,), np.dtype(np.uint8), Computed(4, compute))})
    with pytest.raises(nibblecast.Error, match="turned out to be damaged"):
        nibblecast.save(model, target)
    assert target.read_bytes() == b"what was there before"
    assert listing(tmp_path) == ["a.safetensors"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(nibblecast.Error, match="a.safetensors.*No space left on device"):
        nibblecast.convert(INT4, tmp_path / "a.safetensors")
    assert listing(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import nibblecast
from nibblecast.converters.output import atomic
count = int(sys.argv[1])
def counted(function):
    def wrapper(*args, **kwargs):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
os.fsync = counted(os.fsync)
Path.replace = counted(Path.replace)
Path.unlink = counted(Path.unlink)
nibblecast.convert(sys.argv[2], *sys.argv[3:])
"""


@pytest.mark.parametrize("step", range(1, 9))
def test_killed_at_any_step_there_is_the_old_output_or_the_new_or_none(step: int, tmp_path: Path) -> None:
    names = ["w.safetensors", "w.h", "w.c", "nibblecast.h"]
    targets = [str(tmp_path / "w.safetensors"), str(tmp_path / "w.h")]
    nibblecast.convert(FIXTURES / "mlp_int4_per_tensor.tflite", *targets)
    old = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / "fresh").mkdir()
    nibblecast.convert(INT4, tmp_path / "fresh" / "w.safetensors", tmp_path / "fresh" / "w.h")
    new = {name: (tmp_path / "fresh" / name).read_bytes() for name in names}
    done = subprocess.run([sys.executable, "-c", KILLED, str(step), str(INT4), *targets], check=False)
    assert done.returncode == -signal.SIGKILL
    found = {name: (tmp_path / name).read_bytes() for name in names if (tmp_path / name).exists()}
    assert found["w.safetensors"] in (old["w.safetensors"], new["w.safetensors"])
    if "w.h" in found:  # whoever finds the header finds the source that belongs to it
        generation = old if found["w.h"] == old["w.h"] else new
        assert found["w.h"] == generation["w.h"]
        assert found["w.c"] == generation["w.c"]


def test_atomic_outputs_replace_the_main_file_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(Path(target).name), replace(self, target)))
    with atomic_outputs([tmp_path / "main", tmp_path / "side"]) as staged:
        for stream in staged.streams:
            stream.write(b"x")
    assert order == ["side", "main"]


def test_fail_on_loss_refuses_and_says_what(tmp_path: Path) -> None:
    with pytest.raises(RefusedLoss, match=r"refused by --fail-on-loss: changed: .*requantized.*without the option"):
        nibblecast.convert(INT4, tmp_path / "a.safetensors", quantize="int8,requantize", fail_on_loss=True)
    assert listing(tmp_path) == []
    done = nibblecast.convert(INT4, tmp_path / "a.safetensors", quantize="int8,requantize")
    assert {loss.kind for loss in done.losses} == {"requantized"}
    assert nibblecast.convert(INT4, tmp_path / "b.safetensors", fail_on_loss=True).losses == ()


def test_fail_on_loss_lets_exact_changes_of_form_pass(tmp_path: Path) -> None:
    source = FIXTURES / "sparse_float32.tflite"
    done = nibblecast.convert(source, tmp_path / "a.safetensors", fail_on_loss=True, verify=True)
    assert done.losses == ()
    assert [note for note in done.notes if "zeros between" in note]
    weight = zoo.quantized("w", (4, 8), (1, 8), dtype=ml_dtypes.int2)
    done = nibblecast.save(zoo.model([weight]), tmp_path / "a.onnx", opset=21)
    assert (done.losses, done.notes) == ((), ("w: each int2 code takes a byte, because opset 21 has no int2",))
    assert nibblecast.load(tmp_path / "a.onnx")["w"].dequantize().tobytes() == weight.dequantize().tobytes()


def test_each_kind_of_loss_has_its_word() -> None:
    words = {kind: Loss("w", kind, "this happens").word for kind in get_args(LossKind)}
    assert words == {
        "dropped": "not kept",
        "rounded": "changed",
        "requantized": "changed",
        "reinterpreted": "changed",
        "widened": "note",
        "expanded": "note",
        "renamed": "note",
    }
    assert str(Loss("w", "rounded", "this happens")) == "changed: w: this happens"
    assert str(Loss("", "dropped", "its graph")) == "not kept: the model: its graph"
    assert not Loss("w", "rounded", "").is_exact
    assert Loss("w", "widened", "").is_exact


def test_a_model_without_constant_weights_is_said_to_have_none(tmp_path: Path) -> None:
    done = nibblecast.save(Model({}), tmp_path / "empty.safetensors")
    assert [loss.detail for loss in done.losses] == ["it has no constant weights, so the output holds no tensors"]
    assert dict(nibblecast.load(tmp_path / "empty.safetensors")) == {}


def test_what_a_writer_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Model({"z": Tensor.from_array("z", np.zeros(2, np.complex64))}, Metadata("test"))
    with pytest.raises(
        Unsupported, match="tensor 'z': format 'cheader' cannot hold complex64 values: leave the tensor out"
    ):
        nibblecast.save(model, tmp_path / "z.h")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [("codebook of uint4", "a codebook"), ("offset", "an offset"), ("group index", "a group index")],
)
def test_a_scheme_that_a_writer_cannot_hold_is_refused_with_the_way_out(name: str, what: str, tmp_path: Path) -> None:
    tensor = zoo.schemes()[name]
    limited = Capabilities(frozenset({tensor.dtype}), codebook=False, offset=False, group_index=False)
    target = Target(tmp_path / "w.h", plugins.format_named("cheader"))
    with pytest.raises(Unsupported, match=f"tensor '{name}': format 'cheader' cannot hold {what} of quantization: add"):
        fit(Model({name: tensor}), limited, target)
    model = Model({name: tensor.dequantized()})
    fitted = fit(model, replace(limited, dtypes=frozenset({np.dtype(np.float32)})), target)
    np.testing.assert_array_equal(fitted[name].numpy(), tensor.dequantize(np.float32))


def test_second_level_scales_are_flattened_for_writers_without_them(tmp_path: Path) -> None:
    outer = Quantization(Tensor.from_array("s2", np.array([[0.37]], np.float32)), (2, 2))
    inner = Tensor.from_array("s1", np.ones((2, 2), ml_dtypes.float8_e4m3fn), outer)
    codes = np.arange(16).reshape(2, 8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    model = Model({"w": Tensor.from_array("w", codes, Quantization(inner, (1, 4)))})
    assert nibblecast.save(model, tmp_path / "a.safetensors").losses == ()
    done = nibblecast.save(model, tmp_path / "a.onnx")
    assert (done.losses, done.notes) == ((), ("w: the second-level scale of its scale is multiplied out to float32",))
    assert nibblecast.verify(tmp_path / "a.safetensors", tmp_path / "a.onnx").equal


def test_dequantized_floats_open_in_the_official_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    nibblecast.convert(INT4, tmp_path / "a.safetensors", dequantize="float32", verify=True)
    model = nibblecast.load(INT4)
    loaded = load_file(tmp_path / "a.safetensors")
    assert sorted(loaded) == sorted(model)
    for name, tensor in model.items():
        expected = tensor.codes() if tensor.quantization is None else tensor.dequantize(np.float32)
        np.testing.assert_array_equal(loaded[name], expected)


def test_options_go_to_the_writers_that_have_them(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "a.h", tmp_path / "a.safetensors", prefix="net")
    assert "net_TENSOR_COUNT" in (tmp_path / "a.h").read_text()
    with pytest.raises(UsageError, match="no target has an option 'color'"):
        nibblecast.convert(INT4, tmp_path / "a.h", color="red")
    nibblecast.convert(INT4, tmp_path / "b.h", tmp_path / "b.safetensors", **{"cheader.layout": "header"})
    assert not (tmp_path / "b.c").exists()


MEASURED = """
import re, sys
from pathlib import Path
import nibblecast
nibblecast.convert(sys.argv[1], sys.argv[2], dequantize=sys.argv[3] or None)
# not getrusage, which counts what the process was before exec, too
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("dequantize", ["", "float32"])
def test_memory_does_not_grow_with_the_model(dequantize: str, tmp_path: Path) -> None:
    nbytes = 1 << 26 if dequantize else 1 << 28
    name = "large.safetensors"
    quantization = Quantization(Tensor.from_array("s", np.ones((1, 1), np.float32)), (4096, nbytes // 2048))
    zeros = Computed(nbytes, lambda start, stop: np.zeros(stop - start, np.uint8))
    tensor = Tensor("w", (4096, nbytes // 2048), np.dtype(ml_dtypes.int4), zeros, quantization)
    nibblecast.save(Model({"w": tensor}), tmp_path / name)
    program = [sys.executable, "-c", MEASURED, str(tmp_path / name), str(tmp_path / f"out-{name}"), dequantize]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160  # megabytes, of which the interpreter and NumPy take a quarter


def test_progress_counts_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    nibblecast.convert(INT4, tmp_path / "a.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_json_of_a_conversion_is_json(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nibblecast",
            "convert",
            str(INT4),
            str(tmp_path / "a.safetensors"),
            "--json",
            "--verify",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["files"][0]["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert document["verified"][0]["code_for_code"] == 3
