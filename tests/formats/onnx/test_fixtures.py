"""Weights of every operator and every place: codes and values are those of the operators' documentation, bit for bit,
which onnxruntime's kernels agreed with when the files were made (fixtures/onnx/make.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.metadata import Use

FIXTURES = Path(__file__).parents[3] / "fixtures" / "onnx"
CASES = sorted(path.stem for path in FIXTURES.glob("*.onnx"))


def test_there_are_fixtures():
    assert len(CASES) == 10


@pytest.mark.parametrize("case", CASES)
def test_codes_and_values(case):
    model, truth = nibblecast.load(FIXTURES / f"{case}.onnx"), np.load(FIXTURES / f"{case}.npz")
    names = {key.split("/", 1)[1] for key in truth}
    assert {name for name, tensor in model.items() if tensor.quantization is not None} == names
    for name in names:
        tensor = model[name]
        np.testing.assert_array_equal(tensor.codes(), truth[f"codes/{name}"], err_msg=name)
        values = tensor.dequantize(np.float32)
        assert values.shape == truth[f"values/{name}"].shape
        np.testing.assert_array_equal(values.view(np.uint32), truth[f"values/{name}"].view(np.uint32), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_pieces_put_together(case):
    """Padding, packed zero points and swapped nibbles are undone piece by piece."""
    for tensor in nibblecast.load(FIXTURES / f"{case}.onnx").values():
        pieces = [part.packed() for part in tensor.parts(16)]
        assert np.concatenate(pieces).tobytes() == tensor.packed().tobytes()
        if tensor.quantization is not None:
            values = [part.dequantize(np.float32).reshape(-1) for part in tensor.parts(16)]
            np.testing.assert_array_equal(np.concatenate(values), tensor.dequantize(np.float32).reshape(-1))


@pytest.mark.parametrize("case", CASES)
def test_an_empty_range_of_bytes(case):
    for tensor in nibblecast.load(FIXTURES / f"{case}.onnx").values():
        for stored in (tensor, *(p for _, p in (tensor.quantization.parameters() if tensor.quantization else ()))):
            assert not stored.data.read(stored.nbytes, stored.nbytes).size


@settings(max_examples=50)
@given(st.data())
def test_any_range_of_bytes(data):
    model = nibblecast.load(FIXTURES / f"{data.draw(st.sampled_from(CASES))}.onnx")
    tensor = model[data.draw(st.sampled_from(list(model)))]
    for stored in (tensor, *(p for _, p in (tensor.quantization.parameters() if tensor.quantization else ()))):
        start = data.draw(st.integers(0, stored.nbytes))
        stop = data.draw(st.integers(start, stored.nbytes))
        assert stored.data.read(start, stop).tobytes() == stored.packed()[start:stop].tobytes()


@pytest.mark.parametrize(
    ("case", "name", "uses"),
    [
        ("matmul_nbits", "b4", (Use("MatMulNBits", 1, 0),)),
        ("gather_block_quantized", "int4", (Use("GatherBlockQuantized", 0),)),
        ("matmul_bnb4", "nf4", (Use("MatMulBnb4", 1, 0),)),
        ("qmoe", "b4_fc1", (Use("QMoE", 2, 1),)),
        ("qmoe", "b4_fc2", (Use("QMoE", 5, 1),)),
        ("where_weights_are", "constant", (Use("MatMul", 1, 1, sum_axes=(0,)),)),
        ("where_weights_are", "loop", (Use("MatMul", 1, 1, sum_axes=(0,)),)),
        ("where_weights_are", "to_function", (Use("MatMul", 1, 1, sum_axes=(0,)),)),
        ("where_weights_are", "transposed", (Use("MatMul", 1, 0, sum_axes=(1,)),)),
        ("quantize_dynamic", "M_quantized", (Use("MatMulInteger", 1, 1),)),
        ("quantize_dynamic", "C_quantized", (Use("ConvInteger", 1, 0),)),
        ("quantize_dynamic", "embedding_quantized", (Use("Gather", 0, sum_axes=()),)),
        ("quantize_dynamic", "R_quantized", (Use("DynamicQuantizeLSTM", 2),)),
        ("quantize_static", "C_quantized", (Use("Conv", 1, 0, sum_axes=(1, 2, 3)),)),
    ],
)
def test_uses(case, name, uses):
    assert nibblecast.load(FIXTURES / f"{case}.onnx")[name].uses == uses


def test_the_whole_model():
    metadata = nibblecast.load(FIXTURES / "where_weights_are.onnx").metadata
    assert [(port.name, port.dtype, port.shape) for port in metadata.inputs] == [
        ("x", "float32", (2, 4)),
        ("condition", "bool", ()),
    ]
    assert [port.name for port in metadata.outputs] == ["y"]
    assert metadata.opsets == {"": 21, "com.microsoft": 1, "fixture": 1}
    assert metadata.operators["DequantizeLinear"] == 8
