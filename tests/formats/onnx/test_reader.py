"""What other programs write is read as it is meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nibblecast.converters.metadata import Use
from tests import zoo
from tests.formats.onnx.onnx_models import INT4_CODES, linear, raw, read, save

# What DequantizeLinear means


@pytest.mark.parametrize(
    ("scale_shape", "attributes", "block_shape"),
    [
        ((), {}, (3, 5)),
        ((1,), {}, (3, 5)),
        ((5,), {}, (3, 1)),
        ((5,), {"axis": -1}, (3, 1)),
        ((3,), {"axis": 0}, (1, 5)),
        ((3,), {"axis": -2}, (1, 5)),
        ((3, 3), {"block_size": 2}, (1, 2)),
        ((3, 1), {"axis": 1, "block_size": 5}, (1, 5)),
        ((3, 1), {"axis": 1, "block_size": 8}, (1, 8)),
        ((2, 5), {"axis": -2, "block_size": 2}, (2, 1)),
    ],
)
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("has_zero_point", [False, True])
def test_dequantize_linear(scale_shape, attributes, block_shape, scale_dtype, has_zero_point, tmp_path):
    scale = zoo.parameter("s", scale_shape, scale_dtype).numpy()
    zero_point = zoo.codes("z", scale_shape, ml_dtypes.int4).numpy()
    initializers = [raw("q", INT4_CODES), raw("s", scale), *([raw("z", zero_point)] * has_zero_point)]
    node = linear("q", "s", *(["z"] * has_zero_point), **attributes)
    model = read(save(tmp_path / "m.onnx", [node], initializers))
    assert list(model) == ["q"]
    quantization = model["q"].quantization
    assert quantization.block_shape == block_shape
    assert quantization.scale.dtype == scale_dtype
    assert quantization.scale.numpy().tobytes() == scale.tobytes()
    assert (quantization.zero_point is not None) == has_zero_point
    assert np.array_equal(model["q"].numpy(), INT4_CODES)
    assert quantization.scale.name == "s"


@pytest.mark.parametrize("domain", ["", "ai.onnx", "com.microsoft"])
def test_domains_of_dequantize_linear(domain, tmp_path):
    initializers = [raw("q", INT4_CODES), raw("s", np.float32(0.5).reshape(()))]
    model = read(save(tmp_path / "m.onnx", [linear("q", "s", domain=domain)], initializers))
    assert model["q"].granularity == "per-tensor"


def test_a_scale_behind_a_cast(tmp_path):
    cast = helper.make_node("Cast", ["s"], ["s32"], to=TensorProto.FLOAT)
    initializers = [raw("q", INT4_CODES), raw("s", np.array([1, 2, 3, 4, 5], np.float16))]
    model = read(save(tmp_path / "m.onnx", [cast, linear("q", "s32")], initializers))
    assert list(model) == ["q"]
    assert model["q"].quantization.scale.dtype == np.float16


@pytest.mark.parametrize("scale_shape", [(), (5,), (3, 1), (1, 5)])
@pytest.mark.parametrize("has_zero_point", [False, True])
@pytest.mark.parametrize("scale_first", [False, True])
def test_cast_and_mul_without_dequantize_linear(scale_shape, has_zero_point, scale_first, tmp_path):
    initializers = [raw("q", INT4_CODES), raw("s", zoo.parameter("s", scale_shape, np.float32).numpy())]
    nodes = [helper.make_node("Cast", ["q"], ["q32"], to=TensorProto.FLOAT)]
    if has_zero_point:
        initializers.append(raw("z", np.full(scale_shape, 3, np.int8)))
        nodes.append(helper.make_node("Cast", ["z"], ["z32"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Sub", ["q32", "z32"], ["d"]))
    codes = "d" if has_zero_point else "q32"
    nodes.append(helper.make_node("Mul", ["s", codes] if scale_first else [codes, "s"], ["y"]))
    model = read(save(tmp_path / "m.onnx", nodes, initializers))
    assert list(model) == ["q"]
    scale = initializers[1]
    expected = (INT4_CODES.astype(np.float32) - 3 * has_zero_point) * numpy_helper.to_array(scale)
    assert np.array_equal(model["q"].dequantize(np.float32), expected)


def test_products_that_are_no_weights(tmp_path):
    """Of two integers, of wide integers, of parameters that no block structure has."""
    initializers = [raw(name, np.int8([[1, 2]])) for name in "ab"]
    initializers += [raw("n", np.int64([[1, 2]])), raw("s", np.float32([0.5])), raw("t", np.ones((3, 1), np.float32))]
    nodes = [helper.make_node("Cast", [name], [f"{name}32"], to=TensorProto.FLOAT) for name in "abn"]
    products = [("a32", "b32"), ("n32", "s"), ("a32", "t")]
    nodes += [helper.make_node("Mul", inputs, [f"y{n}"]) for n, inputs in enumerate(products)]
    model = read(save(tmp_path / "m.onnx", nodes, initializers, outputs=["y0"]))
    assert list(model) == ["a", "b", "n", "s", "t"]
    assert not [tensor for tensor in model.values() if tensor.quantization is not None]


@pytest.mark.parametrize(
    ("operator", "scale_shape", "granularity"),
    [
        ("QLinearConv", (2,), "per-axis 0"),
        ("QLinearConv", (), "per-tensor"),
        ("QLinearMatMul", (3,), "per-axis 3"),
        ("QLinearMatMul", (), "per-tensor"),
        ("QLinearMatMul", (2, 1, 1, 3), "blockwise (1, 2, 2, 1)"),
    ],
)
def test_operators_that_take_codes(operator, scale_shape, granularity, tmp_path):
    weight = np.arange(24, dtype=np.int8).reshape(2, 2, 2, 3)
    scale, zero_point = np.full(scale_shape, 0.5, np.float32), np.ones(scale_shape, np.int8)
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    node = helper.make_node(operator, names, ["y"])
    initializers = [raw("w", weight), raw("w_scale", scale), raw("w_zero", zero_point)]
    inputs = [name for name in names if not name.startswith("w")]
    model = read(save(tmp_path / "m.onnx", [node], initializers, inputs=inputs))
    assert model["w"].granularity == granularity
    assert len(model) == (3 if granularity == "none" else 1)
    if granularity != "none":
        assert np.array_equal(model["w"].dequantize(np.float32), (weight - 1) * np.float32(0.5))
        assert [use.operator for use in model["w"].uses] == [operator]


def test_a_scale_from_an_input_is_no_weight(tmp_path):
    model = read(save(tmp_path / "m.onnx", [linear("q", "s")], [raw("q", INT4_CODES)], inputs=["s"]))
    assert model["q"].quantization is None


def test_uses_and_operators(tmp_path):
    nodes = [
        linear("q", "s", output="w"),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "v"], ["y"], transB=1),
    ]
    initializers = [raw("q", INT4_CODES), raw("s", np.float32(1).reshape(())), raw("v", np.ones((4, 5), np.float32))]
    model = read(save(tmp_path / "m.onnx", nodes, initializers, inputs=["x"]))
    assert model["q"].uses == (Use("MatMul", 1, 1, sum_axes=(0,)),)
    assert model["v"].uses == (Use("Gemm", 1, 0, sum_axes=(1,)),)
    assert model.metadata.operators == {"DequantizeLinear": 1, "MatMul": 1, "Gemm": 1}
    assert model.metadata.producer == "test"


def test_a_parameter_that_is_an_output(tmp_path):
    initializers = [raw("q", INT4_CODES), raw("s", np.float32([1, 2, 3, 4, 5]))]
    model = read(save(tmp_path / "m.onnx", [linear("q", "s")], initializers, outputs=["y", "s"]))
    assert list(model) == ["q", "s"]
    assert model["s"].parameter_of == "q"


def test_constants_and_subgraphs(tmp_path):
    def branch(value: float) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([value]), "unused"))
        nodes = [constant, linear("q", "s", output="d"), helper.make_node("Add", ["d", "c"], ["out"])]
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        initializers = [raw("q", INT4_CODES), raw("s", np.float32(value).reshape(()))]
        return helper.make_graph(nodes, "branch", [], [out], initializers)

    node = helper.make_node("If", ["x"], ["y"], then_branch=branch(1.0), else_branch=branch(2.0))
    model = read(save(tmp_path / "m.onnx", [node], inputs=["x"]))
    assert list(model) == ["q", "c", "q:1", "c:1"]
    assert model["q:1"].name == "q:1"
    assert {float(model[n].quantization.scale.numpy()[0, 0]) for n in ("q", "q:1")} == {1.0, 2.0}


def test_a_weight_of_the_graph_around_a_subgraph(tmp_path):
    out = helper.make_tensor_value_info("d", TensorProto.FLOAT, None)
    bodies = [helper.make_graph([linear("q", "s", output="d")], "branch", [], [out]) for _ in range(2)]
    node = helper.make_node("If", ["x"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    initializers = [raw("q", INT4_CODES), raw("s", np.float32(0.5).reshape(()))]
    model = read(save(tmp_path / "m.onnx", [node], initializers, inputs=["x"]))
    assert {name: tensor.granularity for name, tensor in model.items()} == {"q": "per-tensor"}


# Where payloads lie


@pytest.mark.parametrize("dtype", [t for t in zoo.PLAIN if t is not ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_typed_fields(dtype, shape, tmp_path):
    array = zoo.codes("w", shape, dtype).numpy()
    data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensor = helper.make_tensor("w", data_type, shape, array.reshape(-1).tolist() if array.dtype.kind != "V" else array)
    assert not tensor.HasField("raw_data")
    model = read(save(tmp_path / "m.onnx", initializers=[tensor], outputs=["w"]))
    assert (model["w"].shape, model["w"].dtype) == (shape, array.dtype)
    assert model["w"].numpy().tobytes() == array.tobytes()
    assert model["w"].packed().tobytes() == zoo.codes("w", shape, dtype).packed().tobytes()


def test_raw_data_are_not_copied(tmp_path):
    path = save(tmp_path / "m.onnx", initializers=[raw("w", np.arange(6, dtype=np.float32))], outputs=["w"])
    data = read(path)["w"].data
    assert path.read_bytes()[data.offset : data.offset + data.nbytes] == np.arange(6, dtype=np.float32).tobytes()


def test_strings_and_sparse_initializers_are_losses(tmp_path):
    strings = helper.make_tensor("words", TensorProto.STRING, [1], [b"a"])
    path = save(tmp_path / "m.onnx", initializers=[strings, raw("w", INT4_CODES)], outputs=["w"])
    model = onnx.load(path)
    values, indices = raw("sparse", np.float32([1])), raw("i", np.int64([3]))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    path.write_bytes(model.SerializeToString())
    read_again = read(path)
    assert list(read_again) == ["w"]
    assert [(loss.tensor, loss.kind) for loss in read_again.losses] == [("sparse", "dropped"), ("words", "dropped")]


def test_neither_reading_nor_writing_imports_onnx():
    program = (
        "import sys, nibblecast.formats.onnx.reader, nibblecast.formats.onnx.writer; sys.exit('onnx' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
