"""Bytes of flash and of RAM: exact numbers, the budget, and that TFLite Micro wants as much of its arena."""

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
from nibblecast.converters.errors import ExitCode, RefusedLoss
from nibblecast.converters.interfaces import Size
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.device.flash import FlashReport, tensor_flash
from tests.formats.cheader.c_harness import compile_objects, model_of, plan_of, write
from tests.formats.cheader.c_zoo import weight

FIXTURES = Path(__file__).parents[4] / "fixtures" / "tflite"
INT8 = FIXTURES / "cnn_int8_full.tflite"


def flash(tensor, nbytes=100, aligned=112, parameters=16):
    return tensor_flash(tensor, nbytes, aligned, parameters)


def test_int4():
    tensor = flash(weight(zero_points=[0]), 108 + 32, 112 + 32, 32)  # 216 codes, 4 scales and 4 zero points
    assert (tensor.nbytes, tensor.aligned, tensor.int8, tensor.float32) == (140, 144, 216 + 32, 216 * 4)


@pytest.mark.parametrize(
    ("dtype", "float32"),
    [(np.float16, 24), (np.float64, 24), (np.float32, 24), (np.int32, 100), (np.bool_, 100), (np.uint8, 100)],
)
def test_plain_values(dtype, float32):
    tensor = flash(Tensor.from_array("b", np.zeros((2, 3), dtype)))
    assert (tensor.nbytes, tensor.aligned, tensor.int8, tensor.float32, tensor.scratch) == (100, 112, 100, float32, 0)


@pytest.mark.parametrize(
    ("tensor", "scratch"),
    [
        (weight(), 216),
        (weight(channels=12), 216),
        (weight("FULLY_CONNECTED", per_channel=False), 24),
        (weight("FULLY_CONNECTED"), 0),
        (weight(activations=None), 0),
        (weight(dtype=np.int8), 0),
        (replace(weight(), uses=()), 0),
    ],
    ids=["fits", "reference kernels", "fully connected", "no kernel", "floats", "int8", "no use"],
)
def test_scratch(tensor, scratch):
    assert flash(tensor).scratch == scratch


def report(*sizes):
    tensors = [weight(name=f"t{index}") for index in range(len(sizes))]
    return FlashReport([flash(tensor, size, -(-size // 16) * 16) for tensor, size in zip(tensors, sizes, strict=True)])


def test_lines():
    assert report(10, 70, 3, 40, 40, 5).lines() == (
        "flash: 168 bytes, at most 224 with alignment (as int8 1392, as float32 5184)",
        "  70  t1",
        "  40  t3",
        "  40  t4",
        "  10  t0",
        "   5  t5",
        "  1 more",
        "RAM for int4: 216 bytes of arena with TFLite Micro's reference kernels, 0 with CMSIS-NN",
    )
    assert [line.split()[0] for line in report(10).lines()] == ["flash:", "RAM"]
    assert FlashReport([]).lines() == ("flash: 0 bytes, at most 0 with alignment (as int8 0, as float32 0)",)


def test_comment():
    assert report(10, 20).comment(["a_b", "c"]).split("\n") == [
        " *        bytes      at most      as int8   as float32",
        " *           10           16          232          864  a_b",
        " *           20           32          232          864  c",
        " *           30           48          464         1728  in all",
        " *",
        " * RAM for int4: 216 bytes of arena with TFLite Micro's reference kernels, 0 with CMSIS-NN",
    ]


def test_budget():
    found = report(10, 70, 3, 40, 41, 5)
    found.refuse_above(None)
    found.refuse_above(Size(found.total.aligned))
    with pytest.raises(RefusedLoss) as caught:
        found.refuse_above(Size(found.total.aligned - 1))
    message = str(caught.value)
    assert "takes up to 224 bytes of flash, and the budget is 223" in message
    assert re.findall(r"'(t\d)' (\d+)", message) == [
        ("t1", "70"),
        ("t4", "41"),
        ("t3", "40"),
        ("t0", "10"),
        ("t5", "5"),
    ]
    assert "\n" not in message
    assert caught.value.exit_code == ExitCode.REFUSED_LOSS == 5


def test_what_is_written_is_what_is_reported(tmp_path):
    model = nibblecast.load(INT8)
    conversion = nibblecast.save(model, tmp_path / "w.h")
    found = plan_of(model, tmp_path / "w.h").shards[0].document.flash
    assert conversion.report == found.lines()
    assert [tensor.name for tensor in found.tensors] == list(model)
    assert found.total.nbytes == 876
    text = (tmp_path / "w.h").read_text()
    assert "#define w_FLASH_BYTES 876u" in text
    assert (
        found.comment([tensor.base for tensor in plan_of(model, tmp_path / "w.h").shards[0].document.entries]) in text
    )


def test_the_report_is_what_the_compiler_says(tmp_path):
    model = nibblecast.load(INT8)
    files = write(model, tmp_path / "w.h", fixed_point=True)
    (compiled,) = compile_objects("gcc c99", files[1:2], "-fdata-sections")
    listed = subprocess.run(["size", "-A", compiled], capture_output=True, text=True, check=True).stdout
    sections = dict(re.findall(r"\.rodata\.(\w+) +(\d+)", listed))
    for entry in plan_of(model, tmp_path / "w.h", fixed_point=True).shards[0].document.entries:
        placed = [int(sections[f"{entry.base}_{array.role}"]) for array in entry.arrays]
        assert (sum(placed), sum(-(-size // 16) * 16 for size in placed)) == (entry.cost.nbytes, entry.cost.aligned)


def run(*arguments):
    command = [sys.executable, "-m", "nibblecast", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_the_report(tmp_path):
    done = run(INT8, tmp_path / "w.h", "--opt", "budget=2K")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[3].startswith("flash: 876 bytes, at most ")
    assert lines[4:] == list(plan_of(nibblecast.load(INT8), tmp_path / "w.h").report[1:])
    assert json.loads(run(INT8, tmp_path / "w.h", "--json").stdout)["report"] == lines[3:]


@pytest.mark.parametrize("arguments", [["--opt", "budget=0.5K"], ["--dry-run", "--opt", "budget=512"]])
def test_above_the_budget_nothing_is_written(tmp_path, arguments):
    done = run(INT8, tmp_path / "w.h", tmp_path / "w.safetensors", *arguments)
    assert done.returncode == 5
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(r"w\.h: takes up to \d+ bytes of flash, and the budget is 512; the largest: 'cnn_1/", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_wants_a_target_that_has_one(tmp_path):
    done = run(INT8, tmp_path / "w.safetensors", "--opt", "budget=1M")
    assert done.returncode == 2
    assert "no target has an option 'budget'" in done.stderr
    assert run(INT8, tmp_path / "w.h", "--opt", "budget=much").returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_ram_is_in_the_header(tmp_path):
    header = write(model_of(weight()), tmp_path / "w.h")[0].read_text()
    assert " * RAM for int4: 216 bytes of arena with TFLite Micro's reference kernels, 0 with CMSIS-NN\n" in header


@pytest.mark.peers
@pytest.mark.parametrize("operator", ["FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"])
def test_tflite_micro_wants_as_much_ram(tmp_path, capfd, operator):
    from tests.formats.cheader import tflm_oracle

    case = tflm_oracle.random_case(operator, 4, np.random.default_rng(0), per_tensor=True)
    last = 300 * case.weight.shape[-1]
    wide = replace(
        case,
        data=np.resize(case.data, (*case.data.shape[:-1], 300 * case.data.shape[-1])),
        weight=np.resize(case.weight, (*case.weight.shape[:-1], last)),
    )
    if operator == "DEPTHWISE_CONV_2D":
        wide = replace(wide, bias=np.resize(case.bias, last), output_shape=(*case.output_shape[:3], last))
    heads = []
    for bits in (4, 8):  # the int8 kernels read the weight where it lies
        tflm_oracle.print_allocations(tflm_oracle.model_bytes(replace(wide, bits=bits)))
        heads.append(int(re.search(r"head (\d+) bytes", capfd.readouterr().err)[1]))
    scratch = flash(tflm_oracle.read_weight(tflm_oracle.model_bytes(wide), tmp_path)).scratch
    assert scratch == wide.weight.size
    assert 0 <= heads[0] - heads[1] - scratch < 64  # their own alignment
