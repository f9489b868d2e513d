"""What consumes a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.metadata import Activation, Use
from nibblecast.formats.tflite import schema
from tests.formats.tflite.models import (
    FIXTURES,
    Fields,
    Load,
    constant,
    model,
    operator,
    serialize,
    subgraph,
    table,
    tensor,
)


@pytest.mark.parametrize(
    ("fixture", "tensor", "use"),
    [
        (
            "cnn_int4_per_channel",
            "cnn_1/conv_1/convolution",
            Use("CONV_2D", 1, 0, sum_axes=(3, 1, 2)),
        ),  # behind DEQUANTIZE
        ("cnn_int4_per_channel", "cnn_1/depthwise_1/depthwise", Use("DEPTHWISE_CONV_2D", 1, 3, sum_axes=(2, 1))),
        ("cnn_int4_per_channel", "cnn_1/dense_1/MatMul", Use("FULLY_CONNECTED", 1, 0, sum_axes=(1,))),
        ("cnn_int4_per_channel", "cnn_1/dense_1/BiasAdd", Use("FULLY_CONNECTED", 2, None)),
        (
            "sparse_float16",
            "mlp_1/dense_1_1/MatMul1",
            Use("FULLY_CONNECTED", 1, 0, sum_axes=(1,)),
        ),  # DENSIFY and DEQUANTIZE
    ],
)
def test_uses_are_the_operators_behind_the_storage(fixture: str, tensor: str, use: Use) -> None:
    assert nibblecast.load(FIXTURES / f"{fixture}.tflite")[tensor].uses == (use,)


def test_quantized_activations_are_kept_with_the_weights_and_biases_that_they_meet() -> None:
    model = nibblecast.load(FIXTURES / "mlp_w4a8.tflite")
    int8 = np.dtype(np.int8)
    activation = Activation(int8, (1, 16), 0.011228088289499283, 4)
    result = Activation(int8, (1, 24), 0.010302474722266197, -128)
    assert model["mlp_1/dense_1_1/MatMul"].uses == (Use("FULLY_CONNECTED", 1, 0, activation, result, (1,)),)
    (bias,) = [t for t in model.values() if t.uses and t.uses[0].input == 2 and t.shape == (24,)]
    assert bias.uses == (Use("FULLY_CONNECTED", 2, None, activation, result),)
    # the bias' own scale is the product of the weights' and the activation's
    weight = model["mlp_1/dense_1_1/MatMul"].quantization
    assert weight is not None
    assert bias.quantization is not None
    product = weight.scale.numpy().reshape(-1) * np.float32(activation.scale)
    np.testing.assert_allclose(bias.quantization.scale.numpy().reshape(-1), product, rtol=1e-6)


def test_operators_without_all_their_inputs_have_no_activation(load: Load) -> None:
    for codes in (["TRANSPOSE_CONV"], ["FULLY_CONNECTED"]):
        (use,) = used(load, [operator(0, [-1, 0], [])], codes, (2, 2))
        assert (use.activation, use.result) == (None, None)


def test_blockwise_scales_have_no_use_of_their_own() -> None:
    assert nibblecast.load(FIXTURES / "mlp_int4_blockwise.tflite")["mlp_1/dense_1_1/MatMul_scales"].uses == ()


def used(load: Load, operators: Sequence[Fields], codes: Sequence[str], shape: Sequence[int] = (4,)) -> Sequence[Use]:
    weight = constant("w", "INT8", shape, bytes(int(np.prod(shape))))
    return load(model([weight, *[tensor(f"t{i}", "FLOAT32", shape) for i in range(1, 5)]], operators, codes))["w"].uses


def test_uses_come_in_the_order_of_execution(load: Load) -> None:
    operators = [operator(0, [0], [1]), operator(1, [2, 1], [3]), operator(2, [1, 0], [4])]
    assert used(load, operators, ["DEQUANTIZE", "FULLY_CONNECTED", "MUL"], (2, 2)) == (
        Use("FULLY_CONNECTED", 1, 0, sum_axes=(1,)),
        Use("MUL", 0),
        Use("MUL", 1),
    )


def test_a_tensor_only_dequantized_is_used_by_that(load: Load) -> None:
    assert used(load, [operator(0, [0], [1])], ["DEQUANTIZE"]) == (Use("DEQUANTIZE", 0),)


@pytest.mark.parametrize(("adj_y", "axis"), [(False, 2), (True, 1)])
def test_the_channels_of_a_batch_matmul_depend_on_its_transposition(load: Load, adj_y: bool, axis: int) -> None:
    options = table(schema.BatchMatMulOptions, adj_y=np.bool_(adj_y))
    matmul = operator(
        0, [1, 0], [2], builtin_options_type=np.uint8(schema.BatchMatMulOptions.TYPE), batch_matmul_options=options
    )
    assert used(load, [matmul], ["BATCH_MATMUL"], (1, 2, 3)) == (Use("BATCH_MATMUL", 1, axis, sum_axes=(3 - axis,)),)
    assert used(load, [operator(0, [1, 0], [2])], ["BATCH_MATMUL"], (2, 2)) == (
        Use("BATCH_MATMUL", 1, 1, sum_axes=(0,)),
    )


@pytest.mark.parametrize("shape", [(), (4,), (2, 2)])
def test_a_tensor_of_too_few_dimensions_has_no_channel_axis(load: Load, shape: tuple[int, ...]) -> None:
    (use,) = used(load, [operator(0, [1, 0], [2])], ["DEPTHWISE_CONV_2D"], shape)
    assert use.channel_axis is None
    assert use.sum_axes == ((1,) if len(shape) > 1 else ())


def test_absent_inputs_are_skipped(load: Load) -> None:
    assert used(load, [operator(0, [1, 0, -1], [2])], ["FULLY_CONNECTED"], (2, 2)) == (
        Use("FULLY_CONNECTED", 1, 0, sum_axes=(1,)),
    )


def test_custom_operators_are_known_by_name(load: Load) -> None:
    custom = table(schema.OperatorCode, builtin_code=np.int32(schema.CUSTOM), custom_code="my op")
    unknown = table(schema.OperatorCode, builtin_code=np.int32(5000))
    old = table(schema.OperatorCode, deprecated_builtin_code=np.int8(3))
    operators = [operator(i, [0], [1]) for i in range(3)]
    content = serialize(
        table(
            schema.Model,
            version=np.uint32(3),
            subgraphs=[subgraph([tensor("w", "INT8", (1,)), tensor("y", "INT8", (1,))], operators)],
            buffers=[table(schema.Buffer, data=np.zeros(1, np.uint8))],
            operator_codes=[custom, unknown, old],
        )
    )
    assert load(content).metadata.operators == {"CUSTOM:my op": 1, "BUILTIN:5000": 1, "CONV_2D": 1}
