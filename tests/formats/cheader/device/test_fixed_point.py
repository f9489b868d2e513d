"""Multipliers and shifts: TFLite Micro's own results with them, and the rules of `QuantizeMultiplier` one by one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Quantization, Tensor, blocked, per_axis, per_tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.converters.storage import Computed
from nibblecast.formats.cheader.device.fixed_point import fixed_point, obstacle, quantize_multiplier
from tests.formats.cheader.c_harness import MODES, compile_objects, model_of, plan_of, run, write

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[4] / "fixtures" / "tflite"
INT8 = Activation(np.dtype(np.int8), (1, 4, 4, 6), 0.5, -3)
RESULT = Activation(np.dtype(np.int8), (1, 4, 4, 4), 0.25, 7)


def weight(operator="CONV_2D", shape=(4, 3, 3, 6), axis=0, scales=(0.1, 0.2, 0.3, 0.4), dtype=ml_dtypes.int4, **use):
    grid = [1] * len(shape)
    if len(scales) > 1:
        grid[axis] = len(scales)
    scale = Tensor.from_array("scale", np.array(scales, np.float32).reshape(grid))
    block_shape = per_axis(shape, axis) if len(scales) > 1 else per_tensor(shape)
    codes = np.zeros(shape, np.int8).astype(dtype)
    tensor = Tensor.from_array("w", codes, Quantization(scale, block_shape))
    return replace(tensor, uses=(Use(operator, 1, axis, **({"activation": INT8, "result": RESULT} | use)),))


@pytest.mark.parametrize(
    ("real", "multiplier", "shift"),
    [
        (0.0, 0, 0),
        (0.5, 1 << 30, 0),
        (1.0, 1 << 30, 1),
        (0.25, 1 << 30, -1),
        (0.75, 3 << 29, 0),
        (1 - 2.0**-40, 1 << 30, 1),  # rounds up to 2 ** 31: halved, one shift more
        (0.5 + 2.0**-32, (1 << 30) + 1, 0),  # half a unit: away from zero
        (2.0**-32, 1 << 30, -31),
        (2.0**-33, 0, 0),  # all bits shifted out
        ((1 - 2.0**-40) * 2.0**-32, 1 << 30, -31),  # rounding brings it back into range
        (2.0**31, 1 << 30, 32),  # rounding twice, TFLite Micro does not saturate
        (-0.5, -(1 << 30), 0),
    ],
)
def test_quantize_multiplier(real, multiplier, shift):
    multipliers, shifts = quantize_multiplier(np.array([real]))
    assert (multipliers.tolist(), shifts.tolist()) == ([multiplier], [shift])
    assert multipliers.dtype == shifts.dtype == np.int32


def test_convolution():
    found = fixed_point(weight())
    assert (found.count, found.input_offset, found.output_offset) == (4, 3, 7)
    real = found.multipliers() * 2.0 ** (found.shifts() - 31)
    assert np.allclose(real, np.array([0.1, 0.2, 0.3, 0.4]) * 0.5 / 0.25, rtol=1e-7)


def test_convolutions_want_a_multiplier_for_each_channel():
    found = fixed_point(weight(scales=(0.1,)))
    assert found.count == 4
    assert len(set(found.multipliers().tolist())) == 1
    assert found.multipliers().shape == found.shifts().shape == (4,)
    depthwise = fixed_point(weight("DEPTHWISE_CONV_2D", (1, 3, 3, 8), 3, (0.1,)))
    assert depthwise.count == 8


def test_fully_connected():
    dense = weight("FULLY_CONNECTED", (4, 6), scales=(0.7,))
    expected = quantize_multiplier(np.array([0.5 * float(np.float32(0.7)) / 0.25]))
    assert fixed_point(dense).count == 1
    assert (fixed_point(dense).multipliers(), fixed_point(dense).shifts()) == expected
    assert fixed_point(weight("FULLY_CONNECTED", (4, 6))).count == 4


def blockwise():
    scale = Tensor.from_array("scale", np.ones((4, 2), np.float32))
    tensor = Tensor.from_array("w", np.zeros((4, 8), np.int8), Quantization(scale, blocked((4, 8), 1, 4)))
    return replace(tensor, uses=(Use("FULLY_CONNECTED", 1, 0, INT8, RESULT),))


def twice(**other):
    tensor = weight()
    return replace(tensor, uses=(*tensor.uses, replace(tensor.uses[0], **other)))


OBSTACLES = {
    "activations that are not quantized": weight(activation=None),
    "neither one for all nor one for each output channel": blockwise(),
    "no symmetric": weight(dtype=np.int16),
    "int16 and int8": weight(activation=replace(INT8, dtype=np.dtype(np.int16))),
    "activations of uint8": weight(activation=replace(INT8, dtype=np.dtype(np.uint8))),
    "scale is not positive": weight(result=replace(RESULT, scale=0.0)),
    "different scales": twice(activation=replace(INT8, scale=0.125)),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_obstacles(reason):
    assert reason in obstacle(OBSTACLES[reason])
    assert fixed_point(OBSTACLES[reason]) is None


def test_axis_other_than_the_channels():
    assert "each output channel" in obstacle(replace(weight("FULLY_CONNECTED", (6, 4), 1), uses=blockwise().uses))


NO_WEIGHTS = {
    "used by nothing": replace(weight(), uses=()),
    "another operator": weight("GATHER"),
    "bias": replace(weight(), uses=(Use("CONV_2D", 2, None, INT8, RESULT),)),
    "floats": replace(weight(), dtype=np.dtype(np.float32), data=weight(dtype=np.float32).data, quantization=None),
    "fewer axes than the operator needs": replace(weight(), uses=(Use("CONV_3D", 1, 4, INT8, RESULT),)),
    "rank 1": weight("DEPTHWISE_CONV_2D", (6,), 3, (0.1,)),
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_is_no_weight_of_such_a_kernel(what):
    assert fixed_point(NO_WEIGHTS[what]) is None
    assert obstacle(NO_WEIGHTS[what]) is None


def test_one_weight_in_two_places_with_the_same_scales():
    assert fixed_point(twice()).count == 4


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_scales_that_are_no_numbers(value):
    with pytest.raises(CorruptFile, match=r"'w'.*(inf|nan).*fixed-point.*--skip"):
        fixed_point(weight(scales=(0.1, value, 0.3, 0.4))).multipliers()


def test_fixtures():
    model = nibblecast.load(FIXTURES / "cnn_int8_full.tflite")
    counts = {name: found.count for name, tensor in model.items() if (found := fixed_point(tensor)) is not None}
    assert counts == {"cnn_1/conv_1/convolution": 8, "cnn_1/depthwise_1/depthwise": 8, "cnn_1/dense_1/MatMul": 5}
    weights_only = nibblecast.load(FIXTURES / "cnn_int4_per_channel.tflite")
    assert all(fixed_point(tensor) is None for tensor in weights_only.values())
    reasons = {obstacle(tensor) for tensor in weights_only.values()} - {None}
    assert reasons == {"activations that are not quantized"}


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("mode", MODES)
def test_arrays_in_c(tmp_path, mode, layout):
    tensors = [
        weight(),
        replace(weight("FULLY_CONNECTED", (4, 6), scales=(0.7,)), name="dense"),
        replace(weight(activation=None), name="floats"),
    ]
    write(model_of(*tensors), tmp_path / "m.h", fixed_point=True, layout=layout)
    loops = "".join(
        f'for (i = 0; i < m_{name}_MULTIPLIER_COUNT; i++) printf("%ld %ld ", '
        f"NIBBLECAST_CAST(long, m_{name}_multiplier[i]), NIBBLECAST_CAST(long, m_{name}_shift[i]));\n"
        f'printf("%d %d\\n", m_{name}_INPUT_OFFSET, m_{name}_OUTPUT_OFFSET);\n'
        for name in ("w", "dense")
    )
    program = tmp_path / "main.c"
    program.write_text(
        '#include "m.h"\n#include <stdio.h>\n#if m_floats_MULTIPLIER_COUNT != 0\n#error floats\n#endif\n'
        f"int main(void) {{ size_t i;\n{loops}return 0; }}\n"
    )
    sources = [program] if layout == "header" else [program, tmp_path / "m.c"]
    lines = run(mode, compile_objects(mode, sources)).split("\n")
    for line, tensor in zip(lines, tensors[:2], strict=False):
        found = fixed_point(tensor)
        pairs = np.stack([found.multipliers(), found.shifts()], axis=1).reshape(-1)
        assert [int(word) for word in line.split()] == [*pairs, 3, 7]
    assert "m_floats_multiplier" not in (tmp_path / "m.h").read_text()


def test_only_when_asked_for(tmp_path):
    header, code, _ = write(model_of(weight()), tmp_path / "m.h")
    assert not re.search("multiplier|OFFSET \\(", header.read_text() + code.read_text(), re.IGNORECASE)


def test_notes_say_why_there_are_none(tmp_path):
    tensors = [replace(weight(activation=None), name=name) for name in "abc"] + [weight()]
    plan = plan_of(model_of(*tensors), tmp_path / "m.h", fixed_point=True)
    expected = "fixed-point: no multipliers for 'a' and 2 more because of activations that are not quantized"
    assert plan.notes[-1] == expected
    assert expected not in plan_of(model_of(*tensors), tmp_path / "m.h").notes
    assert plan_of(model_of(weight()), tmp_path / "m.h", fixed_point=True).notes == ()
    (note,) = plan_of(model_of(replace(weight(), uses=())), tmp_path / "m.h", fixed_point=True).notes
    assert "no tensor is known to be a weight" in note


def test_no_scale_is_read_for_a_plan(tmp_path):
    def compute(start, stop):
        raise AssertionError("read")

    tensor = weight()
    scale = replace(tensor.quantization.scale, data=Computed(16, compute))
    lazy = replace(tensor, quantization=replace(tensor.quantization, scale=scale))
    plan_of(model_of(lazy), tmp_path / "m.h", fixed_point=True)


TFLM_CASES = [
    ("FULLY_CONNECTED", 4, True),
    ("FULLY_CONNECTED", 8, True),
    ("FULLY_CONNECTED", 8, False),  # 4 bits per channel: there is no kernel, see test_kernels.py
    *(
        (operator, bits, one)
        for operator in ("CONV_2D", "DEPTHWISE_CONV_2D")
        for bits in (4, 8)
        for one in (True, False)
    ),
]


@pytest.mark.peers
@pytest.mark.parametrize(("operator", "bits", "per_tensor"), TFLM_CASES)
def test_tflite_micro_computes_the_same(tmp_path, operator, bits, per_tensor):
    inside = assert_tflite_micro_agrees(tmp_path, operator, bits, per_tensor=per_tensor)
    assert inside > 0.5


@pytest.mark.peers
@pytest.mark.parametrize("operator", ["FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"])
def test_tflite_micro_computes_the_same_with_int16_activations(tmp_path, operator):
    inside = assert_tflite_micro_agrees(tmp_path, operator, 8, per_tensor=False, wide=True)
    assert inside > 0.5


@pytest.mark.peers
@pytest.mark.parametrize("above", [True, False], ids=["one less would do less", "one more would do more"])
@pytest.mark.parametrize("per_tensor", [True, False], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize("operator", ["FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"])
def test_each_bit_of_a_multiplier_is_that_of_tflite_micro(tmp_path, operator, per_tensor, above):
    from tests.formats.cheader import tflm_oracle

    rng = np.random.default_rng([len(operator), per_tensor, above])
    for _ in range(20):
        case = tflm_oracle.edge_case(operator, rng, tmp_path, per_tensor=per_tensor, above=above)
        model = tflm_oracle.model_bytes(case)
        expected = tflm_oracle.run_in_tflm(model, case.data)
        tensor = tflm_oracle.read_weight(model, tmp_path)
        assert np.array_equal(tflm_oracle.run_in_numpy(case, tensor), expected)
        other = tflm_oracle.run_in_numpy(case, tensor, -1 if above else 1)
        assert np.mean(other != expected) > 0.9


def assert_tflite_micro_agrees(folder, operator, bits, **kind):
    """How much of the outputs, which all have to be equal, lies between the limits of their type."""
    from tests.formats.cheader import tflm_oracle

    rng = np.random.default_rng([bits, len(operator), *kind.values()])
    outputs = []
    for _ in range(60):
        case = tflm_oracle.random_case(operator, bits, rng, **kind)
        model = tflm_oracle.model_bytes(case)
        expected = tflm_oracle.run_in_tflm(model, case.data)
        computed = tflm_oracle.run_in_numpy(case, tflm_oracle.read_weight(model, folder))
        assert np.array_equal(computed, expected), case
        outputs.append(expected.reshape(-1))
    values = np.concatenate(outputs)
    limits = np.iinfo(values.dtype)
    return np.mean((values > limits.min) & (values < limits.max))


def test_negative_scales_are_refused_with_the_way_out():
    """Quantizing to the full range of codes makes them where the largest value is positive."""
    found = fixed_point(weight(scales=(0.1, -0.2, 0.3, 0.4)))
    with pytest.raises(Unsupported, match=r"tensor 'w': scale -0\.2\S* is negative, .*: quantize with `narrow`"):
        found.multipliers()
