"""Bytes of flash and of RAM: exact numbers, the budget, and that TFLite Micro wants as much of its arena."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from converters.errors import ExitCode, RefusedLoss
from converters.interfaces import Size
from converters.ir import GroupIndex, Quantization, Tensor
from formats.cheader.flash import FlashReport, tensor_flash
from tests.formats.cheader.test_cheader_kernels import weight


def flash(tensor, nbytes=100, aligned=112):
    return tensor_flash(tensor, nbytes, aligned)


def test_int4():
    tensor = weight(zero_points=[0])  # 216 codes, 4 scales and 4 zero points
    assert flash(tensor, 108 + 32, 112 + 32).int8 == 216 + 32
    assert flash(tensor).float32 == 216 * 4
    assert flash(tensor).scratch == 216


def test_every_parameter_counts():
    index = GroupIndex(1, Tensor.from_array("g", np.zeros(5, np.int32)))
    parameter = Tensor.from_array("p", np.ones((3, 2), np.float32))
    codebook = Tensor.from_array("c", np.zeros(16, np.float32))
    quantization = Quantization(parameter, (1, 1), None, parameter, codebook, index)
    tensor = Tensor.from_array("w", np.zeros((3, 5), ml_dtypes.uint4), quantization)
    assert flash(tensor).int8 == 15 + 4 * (6 + 6 + 16) + 2 * 5


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
        "  1 smaller ones",
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
