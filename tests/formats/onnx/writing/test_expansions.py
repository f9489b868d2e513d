"""Operators that take quantized weights, spelled out in floats: ONNX Runtime computes the same before and after. All
numbers are integers times powers of two, so that it does to the last bit, whichever order it adds them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

import nibblecast
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.errors import Unsupported
from tests.formats.onnx.onnx_models import linear, raw
from tests.formats.onnx.writing.onnx_graphs import info, node, positive, random, run, save

#: Floats that DynamicQuantizeLinear holds exactly: integers of 255 steps; its scale is 1, its zero point 100.
VALUES = np.random.default_rng(3).integers(-100, 156, (6, 8)).astype(np.float32)
VALUES[0, :2] = -100, 155
CODES = random((6, 8), np.uint8, seed=7)
#: Seven bits: of more, ONNX Runtime's sums of two products saturate on processors without VNNI.
WEIGHT = random((8, 4), np.int8) >> 1
SCALES = positive((4,), seed=2)
ZEROS = np.int8([3, -2, 0, 7])


def microsoft(op_type: str, inputs: Sequence[str], **attributes: object) -> onnx.NodeProto:
    return node(op_type, inputs, ["y"], domain="com.microsoft", name="taker", **attributes)


def computed(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    values: np.ndarray,
    result: int = TensorProto.FLOAT,
    **how: object,
) -> list[str]:
    """Converts the model, holds what it computes of `values` against what it computed before, and returns the operators
    that it has then."""
    given = info("x", *values.shape, dtype=onnx.helper.np_dtype_to_tensor_dtype(values.dtype))
    tensors = [raw(name, np.asarray(array)) for name, array in arrays.items()]
    source = save(path / "a.onnx", nodes, tensors, [given], [info("y", dtype=result)])
    nibblecast.convert(source, path / "b.onnx", verify=True, **how)
    before, after = run(source, x=values)[0], run(path / "b.onnx", x=values)[0]
    assert before.any()
    np.testing.assert_array_equal(after, before)
    return [each.op_type for each in onnx.load(path / "b.onnx").graph.node]


def packed(codes: np.ndarray) -> np.ndarray:
    return pack(np.ascontiguousarray(codes).reshape(-1), 4)


BIAS = np.int32([40, -3, 1000, 7])
GEMM = {"s": np.float32(0.5), "z": np.uint8(3), "w": WEIGHT, "t": SCALES, "v": ZEROS, "c": BIAS}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_qgemm(bias: bool, rounded: bool, transposed: bool, tmp_path: Path) -> None:
    arrays = {name: array for name, array in GEMM.items() if bias or name != "c"}
    if transposed:
        arrays["w"] = WEIGHT.T.copy()
    names = ["x", "s", "z", "w", "t", "v", "c" if bias else ""]
    if rounded:
        arrays |= {"ys": np.float32(512), "yz": np.uint8(120)}
        names += ["ys", "yz"]
    result = TensorProto.UINT8 if rounded else TensorProto.FLOAT
    taker = microsoft("QGemm", names, transB=int(transposed))
    found = computed(tmp_path, [taker], arrays, CODES, result, dequantize="float32")
    scaled = ["Mul", "DequantizeLinear"] if bias else []
    assert found == ["DequantizeLinear", *scaled, "Gemm", *(["QuantizeLinear"] if rounded else [])]


def test_qgemm_with_a_factor_is_refused(tmp_path: Path) -> None:
    taker = microsoft("QGemm", ["x", "s", "z", "w", "t", "v"], alpha=2.0)
    with pytest.raises(Unsupported, match="tensor 'w': .* QGemm .*--skip"):
        computed(tmp_path, [taker], GEMM, CODES, dequantize="float32")


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("scale_first", [True, False])
def test_matmul_integer(zero_point: bool, scale_first: bool, tmp_path: Path) -> None:
    product = node("MatMulInteger", ["q", "w", "z", "v"] if zero_point else ["q", "w", "z"], ["p"], name="product")
    scales = ["t", "s"] if scale_first else ["s", "t"]
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        product,
        node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        node("Mul", scales, ["both"]),
        node("Mul", ["both", "f"] if scale_first else ["f", "both"], ["y"]),
    ]
    arrays = {"w": WEIGHT, "t": SCALES} | ({"v": np.int8(5)} if zero_point else {})
    assert computed(tmp_path, nodes, arrays, VALUES, dequantize="float32") == ["MatMul"]


def test_conv_integer(tmp_path: Path) -> None:
    """Its strides, pads and group are kept."""
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("ConvInteger", ["q", "w", "z"], ["p"], strides=[2, 1], pads=[1, 0, 1, 2], group=2),
        node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["s", "t"], ["both"]),
        node("Mul", ["f", "both"], ["y"]),
    ]
    image = np.random.default_rng(1).integers(-100, 156, (1, 4, 6, 5)).astype(np.float32)
    image[0, 0, 0, :2] = -100, 155
    arrays = {"w": random((6, 2, 3, 2), np.uint8), "t": np.float32(0.25)}
    assert computed(tmp_path, nodes, arrays, image, dequantize="float32") == ["Conv"]


def test_an_integer_product_of_codes_that_come_from_elsewhere_is_refused(tmp_path: Path) -> None:
    nodes = [
        node("MatMulInteger", ["x", "w"], ["p"]),
        node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["s", "t"], ["both"]),
        node("Mul", ["f", "both"], ["y"]),
    ]
    arrays = {"w": WEIGHT, "t": SCALES, "s": np.float32(0.5)}
    with pytest.raises(Unsupported, match="tensor 'w': .* MatMulInteger .*--skip"):
        computed(tmp_path, nodes, arrays, CODES, dequantize="float32")


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_quantize_matmul(bias: bool, tmp_path: Path) -> None:
    taker = microsoft("DynamicQuantizeMatMul", ["x", "w", "t", "v", *(["c"] if bias else [])])
    arrays = {"w": WEIGHT, "t": SCALES, "v": ZEROS} | ({"c": BIAS.astype(np.float32)} if bias else {})
    assert computed(tmp_path, [taker], arrays, VALUES, dequantize="float32") == ["MatMul", *(["Add"] if bias else [])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
def test_matmul_integer_to_float(bias: bool, zero_point: bool, tmp_path: Path) -> None:
    names = ["x", "w", "s", "t", *(["z", "v"] if zero_point else ["", ""]), "c" if bias else ""]
    arrays = {"w": WEIGHT, "s": np.float32(0.5), "t": SCALES}
    arrays |= {"z": np.uint8(3), "v": ZEROS} if zero_point else {}
    arrays |= {"c": BIAS.astype(np.float32)} if bias else {}
    found = computed(tmp_path, [microsoft("MatMulIntegerToFloat", names)], arrays, CODES, dequantize="float32")
    assert found == ["DequantizeLinear", "MatMul", *(["Add"] if bias else [])]


def test_qattention(tmp_path: Path) -> None:
    """A softmax is in it: equal to what float32 rounds."""
    codes = random((1, 3, 8), np.uint8, seed=4)
    arrays = {"w": random((8, 12), np.int8) >> 1, "c": random((12,), np.float32), "s": np.float32(1 / 256)}
    arrays |= {"t": np.float32(1 / 128), "z": np.uint8(100), "v": np.int8(2)}
    taker = microsoft("QAttention", ["x", "w", "c", "s", "t", "", "z", "v"], num_heads=2)
    given = info("x", 1, 3, 8, dtype=TensorProto.UINT8)
    source = save(
        tmp_path / "a.onnx", [taker], [raw(k, np.asarray(v)) for k, v in arrays.items()], [given], [info("y")]
    )
    nibblecast.convert(source, tmp_path / "b.onnx", verify=True, dequantize="float32")
    assert [each.op_type for each in onnx.load(tmp_path / "b.onnx").graph.node] == ["DequantizeLinear", "Attention"]
    before, after = run(source, x=codes)[0], run(tmp_path / "b.onnx", x=codes)[0]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_matmul_bnb4(tmp_path: Path) -> None:
    arrays = {"w": random((4 * 32 // 2,), np.uint8), "t": positive((8,))}
    taker = microsoft("MatMulBnb4", ["x", "w", "t"], K=32, N=4, block_size=16, quant_type=0)
    values = np.random.default_rng(5).integers(-3, 4, (2, 32)).astype(np.float32)
    given, tensors = info("x", 2, 32), [raw(name, array) for name, array in arrays.items()]
    source = save(tmp_path / "a.onnx", [taker], tensors, [given], [info("y")])
    nibblecast.convert(source, tmp_path / "b.onnx", verify=True, dequantize="float32")
    assert [each.op_type for each in onnx.load(tmp_path / "b.onnx").graph.node] == ["Transpose", "MatMul"]
    before, after = run(source, x=values)[0], run(tmp_path / "b.onnx", x=values)[0]
    np.testing.assert_allclose(after, before, rtol=1e-5)  # FP4's table has thirds


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [{"dequantize": "float32"}, {"layout": "qdq", "opset": 21}])
def test_matmul_nbits(bias: bool, how: dict[str, object], tmp_path: Path) -> None:
    names = ["x", "w", "t", "", "", *(["c"] if bias else [])]
    arrays = {"w": random((4, 2, 8), np.uint8), "t": positive((4, 2))}
    arrays |= {"c": BIAS.astype(np.float32)} if bias else {}
    values = np.random.default_rng(5).integers(-3, 4, (2, 32)).astype(np.float32)
    taker = microsoft("MatMulNBits", names, K=32, N=4, block_size=16, bits=4)
    found = computed(tmp_path, [taker], arrays, values, **how)
    assert found == [
        *(["DequantizeLinear"] if "layout" in how else ["Transpose"]),
        "MatMul",
        *(["Add"] if bias else []),
    ]


@pytest.mark.parametrize("gather_axis", [0, 1])
@pytest.mark.parametrize("how", [{"dequantize": "float32"}, {"layout": "qdq", "opset": 21}])
def test_gather_block_quantized(gather_axis: int, how: dict[str, object], tmp_path: Path) -> None:
    table = random((6, 32) if gather_axis == 0 else (32, 6), ml_dtypes.uint4)
    quantized = 1 - gather_axis
    grid = (6, 2) if gather_axis == 0 else (2, 6)
    taker = microsoft(
        "GatherBlockQuantized", ["w", "x", "t"], gather_axis=gather_axis, quantize_axis=quantized, block_size=16
    )
    found = computed(tmp_path, [taker], {"w": table, "t": positive(grid)}, np.int64([[5, 0], [3, 3]]), **how)
    assert found == [*(["DequantizeLinear"] if "layout" in how else []), "Gather"]


def test_codes_that_are_moved_before_they_are_decoded(tmp_path: Path) -> None:
    """The floats go the same way, with the same attributes."""
    nodes = [
        node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        node("Gather", ["turned", "x"], ["rows"], axis=1),
        node("Unsqueeze", ["rows", "axes"], ["wide"]),
        linear("wide", "s", "z"),
    ]
    arrays = {"w": random((6, 8), np.uint8), "axes": np.int64([0]), "s": np.float32(0.5), "z": np.uint8(100)}
    found = computed(tmp_path, nodes, arrays, np.int64([5, 0, 3]), dequantize="float32")
    assert found == ["Transpose", "Gather", "Unsqueeze"]


@pytest.mark.parametrize(
    ("permutation", "fused"), [((1, 0), ["MatMulNBits"]), (None, ["MatMulNBits"]), ((0, 1), None)], ids=str
)
def test_a_transpose_before_matmul_is_part_of_matmul_nbits(
    permutation: tuple[int, int] | None, fused: list[str] | None, tmp_path: Path
) -> None:
    """One that swaps nothing is not: the product stays, of what DequantizeLinear makes."""
    attributes = {} if permutation is None else {"perm": permutation}
    nodes = [
        linear("w", "s", output="v", axis=1, block_size=16),
        node("Transpose", ["v"], ["t"], **attributes),
        node("MatMul", ["x", "t"], ["y"]),
    ]
    arrays = {"w": random((32, 32), ml_dtypes.int4), "s": positive((32, 2))}
    values = np.random.default_rng(5).integers(-3, 4, (2, 32)).astype(np.float32)
    found = computed(tmp_path, nodes, arrays, values, layout="matmulnbits")
    assert found == (fused or ["DequantizeLinear", "Transpose", "MatMul"])
