"""Which kernels fit which weights: every rule, the fixtures, and what TFLite Micro says to it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.ir import Tensor, blocked, per_axis
from nibblecast.converters.metadata import Use
from nibblecast.formats.cheader.device.kernels import RULES, advice, notes
from nibblecast.formats.cheader.packings import Packing
from tests.formats.cheader.c_harness import model_of, write
from tests.formats.cheader.c_zoo import weight

FIXTURES = Path(__file__).parents[4] / "fixtures" / "tflite"


FITTING = {
    "arm_convolve_wrapper_s4": weight(),
    "arm_depthwise_conv_wrapper_s4": weight("DEPTHWISE_CONV_2D"),
    "arm_fully_connected_s4": weight("FULLY_CONNECTED", per_channel=False),
    "arm_convolve_wrapper_s8": weight(dtype=np.int8),
    "arm_depthwise_conv_wrapper_s8": weight("DEPTHWISE_CONV_2D", np.int8),
    "arm_fully_connected_wrapper_s8": weight("FULLY_CONNECTED", np.int8),
    "arm_transpose_conv_wrapper_s8": weight("TRANSPOSE_CONV", np.int8),
    "arm_convolve_wrapper_s16": weight(dtype=np.int8, activations=np.int16),
    "arm_depthwise_conv_wrapper_s16": weight("DEPTHWISE_CONV_2D", np.int8, activations=np.int16),
    "arm_fully_connected_s16": weight("FULLY_CONNECTED", np.int8, activations=np.int16, per_channel=False),
}


@pytest.mark.parametrize("function", FITTING)
def test_weights_that_fit(function):
    found = advice(FITTING[function])
    assert found.rule is None
    assert found.line().startswith(f"fits: TFLite Micro, {function} (CMSIS-NN)")
    assert ("muRISCV-NN" in found.kernels) == function.endswith("_s4")


@pytest.mark.parametrize(
    "tensor",
    [
        weight(per_channel=False),
        weight(zero_points=[0]),
        weight("DEPTHWISE_CONV_2D", shape=(1, 3, 3, 5), channels=5),
        weight("DEPTHWISE_CONV_2D", shape=(1, 3, 3, 12)),
        weight("DEPTHWISE_CONV_2D", np.int8, shape=(1, 3, 3, 10), channels=5),
        weight("FULLY_CONNECTED", shape=(1, 6)),
        weight(dtype=np.int8, channels=12),
    ],
    ids=["one scale", "zeros", "odd, multiplier 1", "even, multiplier 2", "int8", "one output", "int8 groups"],
)
def test_weights_that_fit_too(tensor):
    assert advice(tensor).rule is None


RULE_CASES = {
    "2 bits are for storage": weight(dtype=ml_dtypes.int2),
    "int4 and int8 only": weight(dtype=ml_dtypes.uint4),
    "nothing blockwise": weight("FULLY_CONNECTED", block_shape=blocked((4, 6), 1, 3)),
    "activations are floats": weight(activations=None),
    "zero points of 0 only": weight(zero_points=[0, 0, 1, 0]),
    "int8 and int16 only": weight(activations=np.uint8),
    "int4 weights with int16": weight(activations=np.int16),
    "TRANSPOSE_CONV has no kernel": weight("TRANSPOSE_CONV"),
    "per-channel int4 FULLY_CONNECTED": weight("FULLY_CONNECTED"),
    "per-channel FULLY_CONNECTED with int16": weight("FULLY_CONNECTED", np.int8, activations=np.int16),
    "odd input channels": weight("DEPTHWISE_CONV_2D", shape=(1, 3, 3, 10), channels=5),
    "knows no groups": weight(channels=12),
}


@pytest.mark.parametrize("problem", RULE_CASES)
def test_rules(problem):
    found = advice(RULE_CASES[problem])
    assert problem in found.rule.problem
    assert found.line() == f"fits {f'only {found.kernels}' if found.kernels else 'no kernel'}: {found.rule.problem}"
    (note,) = notes([RULE_CASES[problem]])
    assert note.startswith("'w': ")
    assert problem in note
    assert note.endswith(found.rule.way_out)


def test_every_rule_has_a_case():
    assert {advice(tensor).rule for tensor in RULE_CASES.values()} == set(RULES[1:])
    assert advice(weight(), Packing(high_first=True)).rule is RULES[0]


PACKED_OTHERWISE = {
    "high first": (weight(), Packing(high_first=True)),
    "rows": (weight(shape=(4, 3, 3, 5), channels=5), Packing(rows_padded=True)),
    "rows, high first": (weight(), Packing(high_first=True, rows_padded=True)),
}


@pytest.mark.parametrize("case", PACKED_OTHERWISE)
def test_no_kernel_reads_other_packings(case):
    tensor, packing = PACKED_OTHERWISE[case]
    assert "first in the lowest bits and no padding" in advice(tensor, packing).rule.problem
    (note,) = notes([tensor], packing)
    assert note.endswith("leave out --opt nibble-order and --opt packing=rows")


def test_rows_of_whole_bytes_are_dense():
    assert advice(weight(), Packing(rows_padded=True)) == advice(weight())
    assert notes([weight()], Packing(rows_padded=True)) == ()


@pytest.mark.parametrize("operator", ["CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"])
@pytest.mark.parametrize("dtype", [ml_dtypes.int2, ml_dtypes.int4])
def test_unpacked_codes_are_int8(operator, dtype):
    assert advice(weight(operator, dtype), Packing(unpacked=True)) == advice(weight(operator, np.int8))


def test_packings_are_for_narrow_codes():
    assert notes([weight(dtype=np.int8)], Packing(high_first=True)) == ()


def test_text_is_fit_for_comments():
    for tensor in (*FITTING.values(), *RULE_CASES.values()):
        line = advice(tensor).line()
        assert line.isascii()
        assert line.isprintable()
        assert "*/" not in line
        assert len(line) < 120


@pytest.mark.parametrize(
    "parts",
    [
        {"offset": Tensor.from_array("o", np.ones((4, 1, 1, 1), np.float32))},
        {"block_shape": per_axis((4, 3, 3, 6), 3)},
        {"block_shape": (2, 3, 3, 6)},
    ],
    ids=["offset", "another axis", "two channels at a time"],
)
def test_scales_that_kernels_do_not_know(parts):
    assert "one for each output channel" in advice(weight(**parts)).rule.problem


def test_no_advice():
    assert advice(replace(weight(), uses=())) is None
    assert advice(replace(weight(), uses=(Use("GATHER", 0, 0),))) is None
    assert advice(replace(weight(), uses=(replace(weight().uses[0], channel_axis=None),))) is None
    assert advice(replace(weight(), uses=(replace(weight().uses[0], channel_axis=4),))) is None
    assert advice(Tensor.from_array("floats", np.zeros((2, 2), np.float32))) is None


def test_of_several_uses_the_one_with_a_problem_counts():
    uses = (*weight().uses, *weight(channels=12).uses)
    assert "groups" in advice(replace(weight(), uses=uses)).line()
    assert "groups" in advice(replace(weight(), uses=uses[::-1])).line()


def test_a_result_that_is_not_quantized_is_float():
    use = replace(weight().uses[0], result=None)
    assert "activations are floats" in advice(replace(weight(), uses=(use,))).line()


def test_one_note_for_each_rule():
    tensors = [weight("FULLY_CONNECTED", name=name) for name in "abc"] + [
        weight(name="d"),
        weight(dtype=ml_dtypes.int2),
    ]
    first, second = notes(tensors)
    assert first.startswith("'w': codes of 2 bits")
    assert second.startswith("'a' and 2 more: per-channel int4 FULLY_CONNECTED")


@pytest.mark.parametrize(
    ("fixture", "lines"),
    [
        (
            "cnn_int8_full",
            {"arm_convolve_wrapper_s8", "arm_depthwise_conv_wrapper_s8", "arm_fully_connected_wrapper_s8"},
        ),
        ("mlp_w4a8", {"no kernel: per-channel int4"}),
        ("mlp_int16x8", {"only reference kernels: per-channel FULLY_CONNECTED with int16"}),
        ("mlp_int4_blockwise", {"no kernel: kernels take one scale", "no kernel: its activations are floats"}),
        ("mlp_int2_per_channel", {"no kernel: codes of 2 bits"}),
        ("uint4_weights", {"no kernel: kernels take codes of int4"}),
        ("mlp_int4_per_tensor", {"no kernel: its activations are floats"}),
        ("mlp_float32", set()),
    ],
)
def test_fixtures(fixture, lines):
    model = nibblecast.load(FIXTURES / f"{fixture}.tflite")
    found = {each.line() for tensor in model.values() if (each := advice(tensor)) is not None}
    assert len(found) == len(lines)
    assert all(any(expected in line for line in found) for expected in lines)


def test_the_header_says_what_fits(tmp_path):
    tensors = [weight(), weight("FULLY_CONNECTED", name="dense"), replace(weight(name="unknown"), uses=())]
    header = write(model_of(*tensors), tmp_path / "m.h")[0].read_text()
    comments = re.findall(r'/\* "(\w+)".*\n(/\* fits.*\n)?', header)
    expected = [f"/* {advice(tensor).line()} */\n" for tensor in tensors[:2]]
    assert comments == [("w", expected[0]), ("dense", expected[1]), ("unknown", "")]


def test_notes_reach_the_user(tmp_path):
    source = FIXTURES / "mlp_w4a8.tflite"
    conversion = nibblecast.convert(source, tmp_path / "w.h", tmp_path / "w.onnx")
    (note,) = conversion.notes
    assert note.startswith("'mlp_1/dense_2_1/MatMul' and 1 more: per-channel int4 FULLY_CONNECTED")
    command = [sys.executable, "-m", "nibblecast", "convert", str(source), str(tmp_path / "w.h")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"note: {note}\n"


@pytest.mark.peers
def test_tflite_micro_refuses_what_the_rules_say(tmp_path):
    from tests.formats.cheader import tflm_oracle

    rng = np.random.default_rng(0)
    dense = tflm_oracle.random_case("FULLY_CONNECTED", 4, rng, per_tensor=False)
    wide = tflm_oracle.random_case("CONV_2D", 4, rng, per_tensor=False, wide=True)
    narrow = tflm_oracle.random_case("CONV_2D", 4, rng, per_tensor=False)
    floats = replace(narrow, data=narrow.data.astype(np.float32), bias=narrow.bias.astype(np.float32))
    for case, problem in [(dense, "per-channel int4"), (wide, "with int16"), (floats, "activations are floats")]:
        model = tflm_oracle.model_bytes(case)
        with pytest.raises(RuntimeError):
            tflm_oracle.run_in_tflm(model, case.data)
        assert problem in advice(tflm_oracle.read_weight(model, tmp_path)).rule.problem


@pytest.mark.peers
def test_the_reference_kernels_of_tflite_micro_run_what_the_rules_say(tmp_path):
    from tests.formats.cheader import tflm_oracle

    rng = np.random.default_rng(0)
    plain = tflm_oracle.random_case("CONV_2D", 4, rng, per_tensor=False)
    outputs = 2 * plain.weight.shape[0]
    grouped = replace(
        plain,
        data=np.concatenate([plain.data, ~plain.data], axis=3),
        weight=np.concatenate([plain.weight, plain.weight[::-1]]),
        bias=np.resize(plain.bias, outputs),
        weight_scales=np.resize(plain.weight_scales, outputs),
        output_shape=(*plain.output_shape[:3], outputs),
    )
    odd = tflm_oracle.random_case("DEPTHWISE_CONV_2D", 4, rng, per_tensor=False)
    while odd.data.shape[-1] % 2 == 0 or odd.depth_multiplier == 1:
        odd = tflm_oracle.random_case("DEPTHWISE_CONV_2D", 4, rng, per_tensor=False)
    wide = tflm_oracle.random_case("FULLY_CONNECTED", 8, rng, per_tensor=False, wide=True)
    for case, problem in [(grouped, "no groups"), (odd, "odd input channels"), (wide, "int16 activations")]:
        model = tflm_oracle.model_bytes(case)
        tensor = tflm_oracle.read_weight(model, tmp_path)
        found = advice(tensor)
        assert problem in found.rule.problem
        assert found.kernels == "reference kernels"
        expected = tflm_oracle.run_in_tflm(model, case.data)
        assert np.array_equal(tflm_oracle.run_in_numpy(case, tensor), expected)
