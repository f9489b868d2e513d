"""ONNX to ONNX: what is not asked for stays byte for byte; folded weights compute the same; codes move unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import nibblecast
from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.ir import Quantization, Tensor, grid_shape
from tests.formats.onnx.onnx_models import linear, raw
from tests.formats.onnx.writing.onnx_graphs import info, node, positive, random, run, save, x


def operators(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]


def initializers(path: Path) -> dict[str, TensorProto]:
    return {i.name: i for i in onnx.load(path).graph.initializer}


def everything(path: Path) -> Path:
    """A model with all that a converter might lose."""
    inner = helper.make_graph(
        [node("Add", ["x", "inner_w"], ["then_y"], name="inner")],
        "then",
        [],
        [info("then_y", 3)],
        [raw("inner_w", np.arange(3, dtype=np.float32))],
    )
    other = helper.make_graph([node("Identity", ["x"], ["else_y"])], "else", [], [info("else_y", 3)])
    function = helper.make_function(
        "acme", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    nodes = [
        node("If", ["condition"], ["chosen"], then_branch=inner, else_branch=other),
        node("Twice", ["chosen"], ["twice"], domain="acme", name="twice", flavour="vanilla"),
        node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2), "")),
        node("Mul", ["twice", "two"], ["y"], doc_string="a product"),
    ]
    strings = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [info("x", 3), info("condition", dtype=TensorProto.BOOL)],
            [info("y", 3)],
            [strings, raw("unused", np.arange(4, dtype=np.int64))],
            doc_string="a graph",
            value_info=[info("twice", 3)],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("acme", 3)],
        ir_version=10,
        functions=[function],
        producer_name="somebody",
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "me"
    model.graph.quantization_annotation.add().tensor_name = "unused"
    training = model.training_info.add()
    training.algorithm.node.append(node("Identity", ["x"], ["t"]))
    training.algorithm.initializer.append(raw("rate", np.float32([0.1])))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(raw("thin", np.float32([1])))
    sparse.indices.CopyFrom(raw("", np.int64([2])))
    sparse.dims.append(5)
    unknown = b"\xfa\x3f\x03abc"  # field 1023, of a protobuf to come
    path.write_bytes(model.SerializeToString() + unknown)
    return path


def test_what_is_not_asked_for_stays_byte_for_byte(tmp_path):
    source = everything(tmp_path / "a.onnx")
    conversion = nibblecast.convert(source, tmp_path / "b.onnx", verify=True)
    assert (tmp_path / "b.onnx").read_bytes() == source.read_bytes()
    assert conversion.losses == ()


def test_graph_is_there_for_onnx_ir(tmp_path):
    graph = nibblecast.load(everything(tmp_path / "a.onnx")).graph
    assert [n.op_type for n in graph.onnx_ir().graph] == ["If", "Twice", "Constant", "Mul"]


def test_external_data_come_to_lie_in_one_file(tmp_path):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    tensors = []
    for name, location, offset in (("a", "one.bin", 0), ("b", "one.bin", 400), ("c", "sub/two.bin", 16)):
        array = random((100,), np.float32, seed=ord(name))
        with (source / location).open("r+b" if (source / location).exists() else "w+b") as file:
            file.seek(offset)
            file.write(array.tobytes())
        tensor = TensorProto(name=name, data_type=1, dims=[100], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", 400)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        tensors.append(tensor)
    nodes = [node("Sum", ["a", "b", "c", "d"], ["y"])]
    save(source / "m.onnx", nodes, [*tensors, raw("d", random((100,), np.float32))], [], [info("y", 100)])
    nibblecast.convert(source / "m.onnx", tmp_path / "out.onnx", verify=True)
    stored = {i.name: i for i in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer}
    assert [len(stored[name].external_data) > 0 for name in "abcd"] == [True, True, True, False]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out.onnx", "out.onnx.data"]
    assert run(tmp_path / "out.onnx")[0].tobytes() == run(source / "m.onnx")[0].tobytes()


@pytest.mark.parametrize("size", ["1", "100", "10K"])
def test_external_data_from_a_size_on(tmp_path, size):
    source = save(
        tmp_path / "a.onnx",
        [linear("w", "s", output="v", axis=1), node("MatMul", ["x", "v"], ["y"])],
        [raw("w", random((32, 8), ml_dtypes.int4)), raw("s", positive((8,)))],
        [info("x", 2, 32)],
        [info("y", 2, 8)],
    )
    nibblecast.convert(source, tmp_path / "b.onnx", external_data=size, verify=True)
    stored = {i.name: i for i in onnx.load(tmp_path / "b.onnx", load_external_data=False).graph.initializer}
    outside = {name for name, tensor in stored.items() if tensor.data_location == TensorProto.EXTERNAL}
    assert outside == {"1": {"w", "s"}, "100": {"w"}, "10K": set()}[size]
    assert run(tmp_path / "b.onnx", x=x(2, 32))[0].tobytes() == run(source, x=x(2, 32))[0].tobytes()
    nibblecast.convert(tmp_path / "b.onnx", tmp_path / "c.onnx", external_data="1M", verify=True)
    assert not (tmp_path / "c.onnx.data").exists()


DEQUANTIZE_LINEAR = {
    "per tensor": ((32, 8), (), ml_dtypes.int4, {}),
    "per axis": ((32, 8), (8,), ml_dtypes.uint4, {"axis": -1}),
    "blocked": ((32, 8), (2, 8), ml_dtypes.int4, {"axis": 0, "block_size": 16}),
    "ragged": ((50, 8), (4, 8), ml_dtypes.uint4, {"axis": 0, "block_size": 16}),
    "int8": ((32, 8), (8,), np.int8, {"axis": 1}),
    "uint8": ((32, 8), (1, 8), np.uint8, {"axis": 0, "block_size": 32}),
}


def quantized_matmul(path: Path, kind: str, *, zero_point: bool, scale_dtype: object = np.float32) -> Path:
    shape, scale_shape, dtype, attributes = DEQUANTIZE_LINEAR[kind]
    parameters = [raw("w", random(shape, dtype)), raw("s", positive(scale_shape, dtype=scale_dtype))]
    names = ["w", "s"]
    if zero_point:
        parameters.append(raw("z", random(scale_shape, dtype, seed=1)))
        names.append("z")
    nodes = [linear(*names, output="v", **attributes), node("MatMul", ["x", "v"], ["y"], name="product")]
    return save(path, nodes, parameters, [info("x", 2, shape[0])], [info("y", 2, shape[1])])


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("kind", DEQUANTIZE_LINEAR)
def test_dequantizing_folds(tmp_path, kind, zero_point):
    source = quantized_matmul(tmp_path / "a.onnx", kind, zero_point=zero_point)
    weight = nibblecast.load(source)["w"]
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    assert operators(tmp_path / "b.onnx") == ["MatMul"]
    stored = initializers(tmp_path / "b.onnx")
    assert list(stored) == ["w"]
    assert numpy_helper.to_array(stored["w"]).tobytes() == weight.dequantize("float32").tobytes()
    values = x(2, weight.shape[0])
    assert run(tmp_path / "b.onnx", x=values)[0].tobytes() == run(source, x=values)[0].tobytes()


def test_dequantizing_to_half_the_size_casts_back(tmp_path):
    source = quantized_matmul(tmp_path / "a.onnx", "per axis", zero_point=True)
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float16", verify=True)
    assert operators(tmp_path / "b.onnx") == ["Cast", "MatMul"]
    assert initializers(tmp_path / "b.onnx")["w"].data_type == TensorProto.FLOAT16
    assert run(tmp_path / "b.onnx", x=x(2, 32))[0].tobytes() == run(source, x=x(2, 32))[0].tobytes()


def test_a_decoded_weight_that_is_an_output_stays_one(tmp_path):
    source = save(
        tmp_path / "a.onnx",
        [linear("w", "s", output="v", axis=0), node("MatMul", ["x", "v"], ["y"])],
        [raw("w", random((4, 4), np.int8)), raw("s", positive((4,)))],
        [info("x", 2, 4)],
        [info("y", 2, 4), info("v", 4, 4)],
    )
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    for ours, theirs in zip(run(tmp_path / "b.onnx", x=x(2, 4)), run(source, x=x(2, 4)), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_tied_weights_with_a_shared_scale_are_folded_once(tmp_path):
    source = save(
        tmp_path / "a.onnx",
        [
            linear("w", "s", output="v1", axis=0),
            linear("w", "s", output="v2", axis=0),
            linear("u", "s", output="v3", axis=0),
            node("Sum", ["v1", "v2", "v3"], ["y"]),
        ],
        [raw("w", random((4, 4), np.int8)), raw("s", positive((4,))), raw("u", random((4, 4), np.uint8))],
        [],
        [info("y", 4, 4)],
    )
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    assert list(initializers(tmp_path / "b.onnx")) == ["w", "u"]
    assert run(tmp_path / "b.onnx")[0].tobytes() == run(source)[0].tobytes()
    nibblecast.convert(source, tmp_path / "c.onnx", dequantize="float32", only=["w"], verify=True)
    assert sorted(initializers(tmp_path / "c.onnx")) == ["s", "u", "w"]
    assert run(tmp_path / "c.onnx")[0].tobytes() == run(source)[0].tobytes()


def test_codes_that_something_else_takes_are_refused(tmp_path):
    source = save(
        tmp_path / "a.onnx",
        [
            linear("w", "s", output="v"),
            node("Shape", ["w"], ["n"]),
            node("Expand", ["v", "n"], ["e"]),
            node("Add", ["e", "b"], ["y"]),
        ],
        [raw("w", random((4, 4), np.int8)), raw("s", positive(())), raw("b", random((4,), np.float32))],
        [],
        [info("y", 4, 4)],
    )
    with pytest.raises(Unsupported, match=r"tensor 'w': its codes are also taken by a Shape .* with --skip"):
        nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32")
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", skip=["w"])
    assert (tmp_path / "b.onnx").read_bytes() == source.read_bytes()


def branches(path: Path, *, inside: bool) -> Path:
    """A weight decoded in both branches of an If, its codes in them or around them."""
    weights = [raw("w", random((4, 4), ml_dtypes.int4)), raw("s", positive((4,)))]
    bodies = {}
    for side, operator in (("then_branch", "Add"), ("else_branch", "Sub")):
        nodes = [linear("w", "s", output=f"v_{side}", axis=0), node(operator, ["x", f"v_{side}"], [f"y_{side}"])]
        bodies[side] = helper.make_graph(nodes, side, [], [info(f"y_{side}", 4, 4)], weights if inside else [])
    inputs = [info("x", 4, 4), info("condition", dtype=TensorProto.BOOL)]
    nodes = [node("If", ["condition"], ["y"], **bodies)]
    return save(path, nodes, [] if inside else weights, inputs, [info("y", 4, 4)])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("external", [None, "1"])
def test_weights_of_branches(tmp_path, inside, external):
    source = branches(tmp_path / "a.onnx", inside=inside)
    options = {} if external is None else {"external_data": external}
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True, **options)
    assert "DequantizeLinear" not in str(onnx.load(tmp_path / "b.onnx", load_external_data=False))
    for condition in (False, True):
        inputs = {"x": x(4, 4), "condition": np.array(condition)}
        assert run(tmp_path / "b.onnx", **inputs)[0].tobytes() == run(source, **inputs)[0].tobytes()


def test_weights_of_constants_and_functions(tmp_path):
    body = [
        node("Constant", [], ["w"], value=raw("", random((4, 4), ml_dtypes.int4))),
        node("Constant", [], ["s"], value=raw("", positive((4,)))),
        linear("w", "s", output="v", axis=0),
        node("MatMul", ["a", "v"], ["b"]),
    ]
    function = helper.make_function("acme", "Layer", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    outside = [linear("w0", "s0", output="v0"), node("MatMul", ["x", "v0"], ["h"])]
    constants = [
        node("Constant", [], ["w0"], value=raw("", random((4, 4), np.int8))),
        node("Constant", [], ["s0"], value=raw("", positive(()))),
    ]
    nodes = [*constants, *outside, node("Layer", ["h"], ["y"], domain="acme")]
    source = save(tmp_path / "a.onnx", nodes, [], [info("x", 2, 4)], [info("y", 2, 4)], functions=[function])
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    written = onnx.load(tmp_path / "b.onnx")
    assert [n.op_type for n in written.functions[0].node] == ["Constant", "MatMul"]
    assert [n.op_type for n in written.graph.node] == ["MatMul", "Layer"]
    assert run(tmp_path / "b.onnx", x=x(2, 4))[0].tobytes() == run(source, x=x(2, 4))[0].tobytes()


def test_initializers_that_are_inputs_too(tmp_path):
    """Below IR version 4 all initializers are."""
    weights = [raw("w", random((4, 4), np.int8)), raw("s", positive(()))]
    inputs = [info("x", 2, 4), info("w", 4, 4, dtype=TensorProto.INT8), info("s")]
    nodes = [linear("w", "s", output="v"), node("MatMul", ["x", "v"], ["y"])]
    source = save(tmp_path / "a.onnx", nodes, weights, inputs, [info("y", 2, 4)], opset=13, ir_version=3)
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    assert run(tmp_path / "b.onnx", x=x(2, 4))[0].tobytes() == run(source, x=x(2, 4))[0].tobytes()


QLINEAR = {
    "QLinearMatMul": ((4, 3), (1, 4), {}),
    "QLinearConv": ((3, 4, 1, 1), (1, 4, 2, 2), {"strides": [1, 1], "kernel_shape": [1, 1]}),
}


@pytest.mark.parametrize("operator", QLINEAR)
def test_operators_on_codes_are_spelled_out_in_floats(tmp_path, operator):
    weight, values, attributes = QLINEAR[operator]
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"] + (["b"] if operator == "QLinearConv" else [])
    parameters = [
        raw("xs", np.float32(0.5)),
        raw("xz", np.uint8(3)),
        raw("w", random(weight, np.int8)),
        raw("ws", np.float32(0.25)),
        raw("wz", np.int8(0)),
        raw("ys", np.float32(2)),
        raw("yz", np.uint8(100)),
        raw("b", np.arange(3, dtype=np.int32)),
    ][: None if operator == "QLinearConv" else -1]
    result = (1, 3) if operator == "QLinearMatMul" else (1, 3, 2, 2)
    source = save(
        tmp_path / "a.onnx",
        [node(operator, names, ["y"], name="q", **attributes)],
        parameters,
        [info("x", *values, dtype=TensorProto.UINT8)],
        [info("y", *result, dtype=TensorProto.UINT8)],
    )
    nibblecast.convert(source, tmp_path / "b.onnx", dequantize="float32", verify=True)
    assert operator not in operators(tmp_path / "b.onnx")
    inputs = random(values, np.uint8)
    assert np.array_equal(run(tmp_path / "b.onnx", x=inputs)[0], run(source, x=inputs)[0])


@pytest.mark.parametrize("opset", [19, 21, 23])
def test_another_operator_set(tmp_path, opset):
    weights = [raw("w", random((4, 4), np.int8)), raw("s", positive(())), raw("large", random((64, 64), np.float32))]
    nodes = [
        linear("w", "s", output="v"),
        node("MatMul", ["x", "v"], ["h"]),
        node("ReduceMean", ["h"], ["m"], axes=[1], keepdims=1),
        node("ReduceSum", ["large", "axes"], ["total"], keepdims=0),
        node("Add", ["m", "total"], ["y"]),
    ]
    weights.append(raw("axes", np.int64([0, 1])))
    source = save(tmp_path / "a.onnx", nodes, weights, [info("x", 2, 4)], [info("y", 2, 1)], opset=17, ir_version=8)
    nibblecast.convert(source, tmp_path / "b.onnx", opset=opset, verify=True)
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == opset
    assert initializers(tmp_path / "b.onnx")["large"].raw_data == weights[2].raw_data
    assert run(tmp_path / "b.onnx", x=x(2, 4))[0].tobytes() == run(source, x=x(2, 4))[0].tobytes()


def test_operator_sets_and_ir_versions_that_cannot_be(tmp_path):
    source = quantized_matmul(tmp_path / "a.onnx", "per axis", zero_point=True)
    with pytest.raises(UsageError, match="opset 7 cannot be written: give one from 13 to 25"):
        nibblecast.convert(source, tmp_path / "b.onnx", opset=7)
    with pytest.raises(Unsupported, match="onnx's version converter does not bring it to opset 13"):
        nibblecast.convert(source, tmp_path / "b.onnx", opset=13)
    with_functions = everything(tmp_path / "f.onnx")
    with pytest.raises(Unsupported, match="has functions, which onnx's version converter drops"):
        nibblecast.convert(with_functions, tmp_path / "b.onnx", opset=22)
    nibblecast.convert(source, tmp_path / "b.onnx", ir_version=11, verify=True)
    assert onnx.load(tmp_path / "b.onnx").ir_version == 11


def test_layout_needs_a_graph(tmp_path):
    source = quantized_matmul(tmp_path / "a.onnx", "per axis", zero_point=True)
    nibblecast.convert(source, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="layout=qdq is for models with a graph"):
        nibblecast.convert(tmp_path / "w.safetensors", tmp_path / "b.onnx", layout="qdq")


def float_model(path: Path, opset: int = 21, **weights: np.ndarray) -> Path:
    """Gather, Conv, MatMul and Gemm by float weights."""
    stored = {
        "table": random((10, 64), np.float32),
        "kernel": random((4, 2, 3, 3), np.float32),
        "dense": random((64, 32), np.float32),
        "head": random((16, 32), np.float32),
        "bias": random((16,), np.float32),
    } | weights
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("MatMul", ["rows", "dense"], ["hidden"]),
        node("Gemm", ["hidden", "head", "bias"], ["y"], transB=1),
        node("Conv", ["image", "kernel"], ["features"]),
    ]
    inputs = [info("ids", 3, dtype=TensorProto.INT64), info("image", 1, 2, 5, 5)]
    outputs = [info("y", 3, 16), info("features", 1, 4, 3, 3)]
    tensors = [raw(name, array) for name, array in stored.items()]
    return save(path, nodes, tensors, inputs, outputs, opset=opset, ir_version=8 if opset < 21 else 10)


INPUTS = {"ids": np.int64([1, 9, 4]), "image": random((1, 2, 5, 5), np.float32, seed=5)}


def int4(tensor: Tensor, block_shape: tuple[int, ...], dtype: object = ml_dtypes.int4) -> Tensor:
    """Some codes of the tensor's shape."""
    grid = grid_shape(tensor.shape, block_shape)
    codes = Tensor.from_array(tensor.name, random(tensor.shape, dtype))
    quantization = Quantization(Tensor.from_array("s", positive(grid)), block_shape)
    return replace(codes, quantization=quantization, uses=tensor.uses)


@pytest.mark.parametrize("layout", ["", "matmulnbits"])
@pytest.mark.parametrize("opset", [17, 21])
def test_weights_that_a_stage_quantized(tmp_path, layout, opset):
    source = float_model(tmp_path / "a.onnx", opset=opset)
    model = nibblecast.load(source)
    quantized = {
        "table": int4(model["table"], (1, 32)),
        "kernel": int4(model["kernel"], (1, 2, 3, 3)),
        "dense": int4(model["dense"], (32, 1)),
        "head": int4(model["head"], (1, 32), ml_dtypes.uint4),
    }
    changed = replace(model, tensors={**model, **quantized})
    nibblecast.save(changed, tmp_path / "b.onnx", layout=layout)
    found = set(operators(tmp_path / "b.onnx"))
    if layout:
        assert {"MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "Conv"} <= found
        assert not {"MatMul", "Gemm", "Gather"} & found
    else:
        assert {"DequantizeLinear", "Conv", "MatMul", "Gemm", "Gather"} == found
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == 21
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    values = {name: tensor.dequantize("float32") for name, tensor in quantized.items()}
    reference = run(float_model(tmp_path / "c.onnx", **values), **INPUTS)
    for ours, theirs in zip(run(tmp_path / "b.onnx", **INPUTS), reference, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_operator_set_stays_with_layouts_that_do_not_need_another(tmp_path):
    model = nibblecast.load(float_model(tmp_path / "a.onnx", opset=17))
    changed = replace(model, tensors={**model, "dense": int4(model["dense"], (32, 1))})
    nibblecast.save(changed, tmp_path / "b.onnx", layout="matmulnbits")
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == 17


def test_a_weight_taken_in_two_ways(tmp_path):
    """Codes for MatMulNBits, and beside them what the others need."""
    source = save(
        tmp_path / "a.onnx",
        [
            linear("w", "s", output="v", axis=1),
            node("MatMul", ["x", "v"], ["p"]),
            node("Gather", ["v", "ids"], ["g"], axis=1),
            node("Add", ["p", "g"], ["y"]),
        ],
        [raw("w", random((32, 32), ml_dtypes.int4)), raw("s", positive((32,))), raw("ids", np.arange(32))],
        [info("x", 32, 32)],
        [info("y", 32, 32)],
    )
    nibblecast.convert(source, tmp_path / "b.onnx", layout="matmulnbits")
    assert operators(tmp_path / "b.onnx") == ["DequantizeLinear", "MatMulNBits", "Gather", "Add"]
    assert run(tmp_path / "b.onnx", x=x(32, 32))[0].tobytes() == run(source, x=x(32, 32))[0].tobytes()
