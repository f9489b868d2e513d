"""Integer LSTMs with layer normalization: what saturates on the way saturates where LiteRT's kernel does."""

from __future__ import annotations

import numpy as np
import pytest

import nibblecast

pytestmark = pytest.mark.peers
one_operator = pytest.importorskip("tests.formats.tflite.to_onnx.one_operator", reason="needs ai-edge-litert")

TIME, INPUTS, UNITS = 3, 5, 4
NORMALIZED = 2.0**-15


def normalized_lstm(gate_scale: float) -> bytes:
    """A UNIDIRECTIONAL_SEQUENCE_LSTM of int8 weights whose gates are held by that scale before normalization."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as official

    rng = np.random.default_rng(3)
    buffers, tensors = [official.BufferT()], []

    def tensor(name, shape, dtype, scale, zero_point=0, values=None, variable=False):
        made = official.TensorT()
        made.name, made.shape, made.type = name, list(shape), one_operator.TYPES[np.dtype(dtype)]
        made.quantization = official.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [scale], [zero_point]
        made.isVariable = variable
        if values is not None:
            buffer = official.BufferT()
            buffer.data = np.frombuffer(values.astype(dtype).tobytes(), np.uint8)
            made.buffer = len(buffers)
            buffers.append(buffer)
        tensors.append(made)
        return len(tensors) - 1

    def weight(name, shape):
        return tensor(name, shape, np.int8, 0.02, values=rng.integers(-127, 128, shape))

    x = tensor("input_0", (1, TIME, INPUTS), np.int8, 0.05, 2)
    of_x = [weight(f"x{k}", (UNITS, INPUTS)) for k in range(4)]
    of_h = [weight(f"h{k}", (UNITS, UNITS)) for k in range(4)]
    norms = [tensor(f"n{k}", (UNITS,), np.int16, NORMALIZED, values=rng.integers(9000, 30000, UNITS)) for k in range(4)]
    biases = [
        tensor(f"b{k}", (UNITS,), np.int32, NORMALIZED * 2.0**-10, values=rng.integers(-(1 << 24), 1 << 24, UNITS))
        for k in range(4)
    ]
    hidden = tensor("hidden", (1, UNITS), np.int8, 1 / 128, 0, variable=True)
    cell = tensor("cell", (1, UNITS), np.int16, 2.0**-11, variable=True)
    result = tensor("result_0", (1, TIME, UNITS), np.int8, 1 / 128)
    between = [tensor(f"i{k}", (), np.int16, gate_scale) for k in range(4)] + [tensor("i4", (), np.int8, 1 / 128)]
    operator, code = official.OperatorT(), official.OperatorCodeT()
    operator.inputs = [x, *of_x, *of_h, -1, -1, -1, *biases, -1, -1, hidden, cell, *norms]
    operator.outputs, operator.intermediates = [result], between
    operator.builtinOptions = official.UnidirectionalSequenceLSTMOptionsT()
    operator.builtinOptions.fusedActivationFunction = 4
    operator.builtinOptionsType = official.BuiltinOptions.UnidirectionalSequenceLSTMOptions
    code.builtinCode = code.deprecatedBuiltinCode = official.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_LSTM
    code.version = 3
    graph, made = official.SubGraphT(), official.ModelT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, [operator], [x], [result]
    made.version, made.subgraphs, made.buffers, made.operatorCodes = 3, [graph], buffers, [code]
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize("gate_scale", [2.0**-10, 2.0**-13], ids=["fits", "saturates"])
def test_gates_that_are_normalized_saturate_after_each_part(gate_scale, tmp_path):
    (tmp_path / "m.tflite").write_bytes(normalized_lstm(gate_scale))
    nibblecast.convert(tmp_path / "m.tflite", tmp_path / "m.onnx")
    for seed in range(5):
        (found,) = nibblecast.compare_outputs(tmp_path / "m.tflite", tmp_path / "m.onnx", seed=seed)
        assert found.steps is not None
        assert found.steps <= 3
