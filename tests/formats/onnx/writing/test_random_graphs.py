"""Random small graphs with quantized weights: read, written in every way, read again, and computed by onnxruntime."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import nibblecast
from tests.formats.onnx.onnx_models import linear, raw
from tests.formats.onnx.writing.onnx_graphs import info, node, positive, random, run, save, x

pytestmark = pytest.mark.slow

CODES = (ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8)
WAYS = (
    {},
    {"external_data": "1"},
    {"dequantize": "float32"},
    {"dequantize": "float16"},
    {"layout": "matmulnbits"},
    {"layout": "qdq"},
    {"layout": "matmulnbits", "external_data": "64"},
)
WIDTH = 32
EACH = ((ml_dtypes.int4, False), (np.uint8, True))


@dataclass(frozen=True)
class Layer:
    """A matrix product by a decoded weight of (WIDTH, WIDTH), or of its transposed."""

    dtype: object
    granularity: str
    zero_point: bool
    product: str
    constant: bool
    in_entries: bool
    also_an_output: bool


layers = st.builds(
    Layer,
    st.sampled_from(CODES),
    st.sampled_from(["tensor", "inputs", "outputs", "blocks of 16", "blocks of 12", "blocks of 24"]),
    st.booleans(),
    st.sampled_from(["MatMul", "Gemm", "Gemm transB", "Transpose", "Add"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def entries(name: str, array: np.ndarray) -> TensorProto:
    """The same in int32_data: an element, or a byte of packed ones, an entry."""
    packed = raw(name, array)
    tensor = TensorProto(name=name, data_type=packed.data_type, dims=packed.dims)
    codes = np.frombuffer(packed.raw_data, np.int8 if array.dtype == np.int8 else np.uint8)
    tensor.int32_data.extend(codes.tolist())
    return tensor


def nodes_of(layer: Layer, at: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """What makes value `at + 1` of value `at`."""
    grid, attributes = {
        "tensor": ((), {}),
        "inputs": ((WIDTH,), {"axis": 0}),
        "outputs": ((WIDTH,), {"axis": -1}),
        "blocks of 16": ((2, WIDTH), {"axis": 0, "block_size": 16}),
        "blocks of 12": ((3, WIDTH), {"axis": 0, "block_size": 12}),
        "blocks of 24": ((WIDTH, 2), {"axis": 1, "block_size": 24}),
    }[layer.granularity]
    store = entries if layer.in_entries else raw
    weight = store(f"w{at}", random((WIDTH, WIDTH), layer.dtype, seed=at))
    parameters = [raw(f"s{at}", positive(grid, seed=at))]
    if layer.zero_point:
        parameters.append(store(f"z{at}", random(grid, layer.dtype, seed=at + 1)))
    nodes = []
    if layer.constant:
        nodes.append(node("Constant", [], [f"w{at}"], value=weight))
    else:
        parameters.insert(0, weight)
    names = [f"w{at}", f"s{at}"] + ([f"z{at}"] if layer.zero_point else [])
    nodes.append(linear(*names, output=f"v{at}", **attributes))
    weight_name, result = f"v{at}", f"h{at + 1}"
    if layer.product == "Transpose":
        nodes.append(node("Transpose", [weight_name], [f"t{at}"], perm=[1, 0]))
        nodes.append(node("MatMul", [f"h{at}", f"t{at}"], [result]))
    elif layer.product == "Add":  # no product at all: the weight is added to itself times the value
        nodes += [node("MatMul", [f"h{at}", weight_name], [f"p{at}"])]
        nodes += [node("ReduceMax", [weight_name], [f"m{at}"], keepdims=0), node("Add", [f"p{at}", f"m{at}"], [result])]
    elif layer.product == "MatMul":
        nodes.append(node("MatMul", [f"h{at}", weight_name], [result]))
    else:
        transposed = {"transB": 1} if layer.product.endswith("B") else {}
        nodes.append(node("Gemm", [f"h{at}", weight_name, "bias"], [result], **transposed))
    return nodes, parameters


def model_of(path: Path, some: list[Layer]) -> Path:
    nodes, parameters = [node("Identity", ["x"], ["h0"])], [raw("bias", positive((WIDTH,)))]
    outputs = [info("y", 2, WIDTH)]
    for at, layer in enumerate(some):
        made, stored = nodes_of(layer, at)
        nodes += made
        parameters += stored
        if layer.also_an_output:
            outputs.append(info(f"v{at}", WIDTH, WIDTH))
    nodes.append(node("Identity", [f"h{len(some)}"], ["y"]))
    return save(path, nodes, parameters, [info("x", 2, WIDTH)], outputs)


@settings(max_examples=60)
@given(st.lists(layers, min_size=1, max_size=3), st.sampled_from(WAYS))
def test_random_graphs_survive_every_way(some, way):
    with tempfile.TemporaryDirectory() as folder:
        source = model_of(Path(folder) / "a.onnx", some)
        target = Path(folder) / "b.onnx"
        nibblecast.convert(source, target, verify=True, **way)
        expected, found = run(source, x=x(2, WIDTH)), run(target, x=x(2, WIDTH))
        for ours, theirs in zip(found, expected, strict=True):
            # float16 holds these weights exactly; products are summed in another order
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4 * np.abs(theirs).max())
        if not way:
            assert target.read_bytes() == source.read_bytes()


def test_the_helper_makes_valid_models(tmp_path):
    layer = Layer(ml_dtypes.int4, "blocks of 16", True, "Gemm transB", True, True, True)
    onnx.checker.check_model(onnx.load(model_of(tmp_path / "a.onnx", [layer])), full_check=True)


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_damaged_graphs_are_written_or_refused_in_one_line(way, tmp_path):
    rng = np.random.default_rng(len(str(way)))
    some = [Layer(dtype, "blocks of 16", True, "Gemm transB", constant, True, False) for dtype, constant in EACH]
    content = model_of(tmp_path / "a.onnx", some).read_bytes()
    for _ in range(120):
        data = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "b.onnx").write_bytes(bytes(data))
        try:
            nibblecast.convert(tmp_path / "b.onnx", tmp_path / "c.onnx", **way)
        except nibblecast.Error as error:
            assert "\n" not in str(error)
