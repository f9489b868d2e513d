"""Operators that take codes themselves, and idioms that decode them: what no fixture holds, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.metadata import Use
from tests.formats.onnx.onnx_models import INT4_CODES, linear, raw, read, save

RNG = np.random.default_rng(0)


def microsoft(operator: str, inputs, **attributes) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)


def taken(tmp_path, node, *arrays, inputs=("x",), more=()):
    """The model of one node that takes initializers of these names and arrays."""
    return read(save(tmp_path / "m.onnx", [node, *more], [raw(name, array) for name, array in arrays], inputs=inputs))


def nbits(**change) -> onnx.NodeProto:
    attributes = {"K": 40, "N": 3, "bits": 4, "block_size": 16} | change
    return microsoft("MatMulNBits", ["x", "w", "s"], **{k: v for k, v in attributes.items() if v is not None})


BLOBS = RNG.integers(0, 256, (3, 3, 8), np.uint8)
SCALES = RNG.uniform(0.1, 1, (3, 3)).astype(np.float32)


def test_default_zero_points_are_half_the_range(tmp_path):
    weight = taken(tmp_path, nbits(bits=None), ("w", BLOBS), ("s", SCALES))["w"]
    assert (weight.shape, weight.dtype.name) == ((3, 40), "uint4")
    assert (weight.quantization.zero_point.numpy() == 8).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_scales_keep_their_dtype(dtype, tmp_path):
    weight = taken(tmp_path, nbits(), ("w", BLOBS), ("s", SCALES.astype(dtype)))["w"]
    assert weight.quantization.scale.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_prepacked": 1}, Unsupported, "weight_prepacked 1"),
        ({"bits": 3}, Unsupported, "codes of 3 bits"),
        ({"block_size": 24}, CorruptFile, "block_size 24"),
        ({"block_size": 8}, CorruptFile, "block_size 8"),
        ({"block_size": 1 << 62}, CorruptFile, "a power of two"),
        ({"block_size": None}, CorruptFile, "block_size 0"),
        ({"K": 0}, CorruptFile, "K 0 of a MatMulNBits"),
        ({"K": -1}, CorruptFile, "K -1"),
        ({"N": 1 << 62}, CorruptFile, "N 4611686018427387904"),
        ({"N": None}, CorruptFile, "N 0"),
        ({"N": 4}, CorruptFile, "4 rows of 24 bytes"),
        ({"K": 60}, CorruptFile, "3 rows of 32 bytes"),
        ({"bits": 8}, CorruptFile, "3 rows of 48 bytes"),
    ],
)
def test_attributes_that_are_wrong(change, error, message, tmp_path):
    with pytest.raises(error) as refused:
        taken(tmp_path, nbits(**change), ("w", BLOBS), ("s", SCALES))
    assert message in str(refused.value)
    assert "tensor 'w'" in str(refused.value)


@pytest.mark.parametrize(
    ("inputs", "array", "message"),
    [
        (["x", "w", "s", "p"], np.zeros((3, 3), np.uint8), "zero points of dims (3, 3): 3 rows of 2 bytes"),
        (["x", "w", "s", "p"], np.zeros((3, 2), np.float32), "zero points of dims (3, 2): (3, 3) are needed"),
        (["x", "w", "s", "", "p"], np.zeros(39, np.int32), "g_idx of dims (39,) and int32: 40 integers"),
        (["x", "w", "s", "", "p"], np.zeros(40, np.float32), "float32: 40 integers"),
        (["x", "w", "s", "", "p"], np.full(40, 3, np.int32), "groups 3 to 3 in g_idx: there are 3"),
        (["x", "w", "s", "", "p"], np.full(40, -1, np.int32), "groups -1"),
        (["x", "w", "p"], np.zeros((3, 2), np.float32), "scales of dims (3, 2): (3, 3) are needed"),
    ],
)
def test_parameters_that_do_not_fit(inputs, array, message, tmp_path):
    node = microsoft("MatMulNBits", inputs, K=40, N=3, bits=4, block_size=16)
    with pytest.raises(CorruptFile) as refused:
        taken(tmp_path, node, ("w", BLOBS), ("s", SCALES), ("p", array))
    assert message in str(refused.value)


def test_group_index_of_whole_blocks(tmp_path):
    """onnxruntime takes one that is filled up."""
    node = microsoft("MatMulNBits", ["x", "w", "s", "", "g"], K=40, N=3, bits=4, block_size=16)
    groups = np.append(RNG.permutation(np.arange(40) // 16), [0] * 8).astype(np.int32)
    weight = taken(tmp_path, node, ("w", BLOBS), ("s", SCALES), ("g", groups))["w"]
    values = (weight.codes().astype(np.float32) - 8) * SCALES[:, groups[:40]]
    np.testing.assert_array_equal(weight.dequantize(np.float32), values)


def test_a_projection_that_is_left_out(tmp_path):
    model = taken(tmp_path, nbits(), ("w", BLOBS[:, :0]), ("s", SCALES))
    assert model["w"].shape == (3, 0, 8)
    assert model["w"].quantization is None


def test_parameters_that_are_computed(tmp_path):
    model = taken(tmp_path, nbits(), ("w", BLOBS), inputs=("x", "s"))
    assert model["w"].quantization is None
    assert model["w"].shape == BLOBS.shape


def test_blobs_behind_a_reshape(tmp_path):
    """A head that shares its codes with an embedding."""
    reshape = helper.make_node("Reshape", ["table", "shape"], ["w"])
    gather = helper.make_node("GatherBlockQuantized", ["table", "x", "s"], ["z"], domain="com.microsoft", block_size=16)
    arrays = [("table", BLOBS.reshape(3, 24)), ("s", SCALES), ("shape", np.array([3, 3, 8]))]
    model = taken(tmp_path, nbits(K=48), *arrays, more=[reshape, gather])
    assert (model["table"].shape, model["table"].granularity) == ((3, 48), "blockwise (1, 16)")
    assert {use.operator for use in model["table"].uses} == {"MatMulNBits", "GatherBlockQuantized"}


def test_operators_of_several_projections(tmp_path):
    names = ["x", "", "norm", "q", "q_s", "", "k", "k_s", "", "v", "v_s"]
    node = microsoft("MatMulNBitsQkv", names, K=40, Nq=3, Nkv=2, bits=4, block_size=16)
    arrays = [("norm", np.ones(40, np.float32)), ("q", BLOBS), ("q_s", SCALES)]
    arrays += [(f"{n}{end}", array[:2]) for n in "kv" for end, array in (("", BLOBS), ("_s", SCALES))]
    model = taken(tmp_path, node, *arrays)
    assert {name: tensor.shape for name, tensor in model.items()} == {
        "norm": (40,),
        "q": (3, 40),
        "k": (2, 40),
        "v": (2, 40),
    }
    assert model["v"].uses == (Use("MatMulNBitsQkv", 9, 0),)


# Tables


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn])
@pytest.mark.parametrize(
    ("block", "scales", "block_shape"),
    [(16, (3, 2), (1, 16)), (0, (3, 1), (1, 32)), (0, (1, 1), (3, 32)), (16, (1, 2), (3, 16))],
)
def test_tables_of_small_floats(dtype, block, scales, block_shape, tmp_path):
    table = RNG.normal(size=(3, 32)).astype(dtype)
    scale = RNG.uniform(1, 2, scales).astype(np.float32)
    weight = taken(
        tmp_path, microsoft("GatherBlockQuantized", ["w", "x", "s"], block_size=block), ("w", table), ("s", scale)
    )["w"]
    assert weight.quantization.block_shape == block_shape
    wide = np.repeat(scale, 32 // scales[1], axis=1)
    np.testing.assert_array_equal(weight.dequantize(np.float32), table.astype(np.float32) * wide)


@pytest.mark.parametrize(
    ("table", "attributes", "message"),
    [
        (np.zeros((3, 16), np.uint8), {"quantize_axis": 2}, "quantize_axis 2, and 2 axes"),
        (np.zeros((3, 16), np.uint8), {"bits": 5}, "codes of 5 bits"),
        (np.zeros((3, 16), np.int8), {}, "codes of int8"),
        (np.zeros((3, 16), np.uint8), {"block_size": 0}, "block_size 0"),
        (np.zeros((3, 16), np.uint8), {"block_size": 16}, "(3, 2) are needed"),
    ],
)
def test_tables_that_are_refused(table, attributes, message, tmp_path):
    node = microsoft("GatherBlockQuantized", ["w", "x", "s"], **attributes)
    with pytest.raises(Error) as refused:
        taken(tmp_path, node, ("w", table), ("s", np.ones((3, 3), np.float32)))
    assert message in str(refused.value)


# bitsandbytes' codes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"quant_type": 2}, "quant_type 2"),
        ({"quant_type": None}, "quant_type None"),
        ({"N": 5}, "1 rows of 40 bytes"),
        ({"block_size": 32}, "absmax of dims (4,): (2,) are needed"),
        ({"block_size": 0}, "block_size 0"),
    ],
)
def test_bnb4_that_is_refused(attributes, message, tmp_path):
    attributes = {"K": 16, "N": 4, "block_size": 16, "quant_type": 1} | attributes
    node = microsoft("MatMulBnb4", ["x", "w", "s"], **{k: v for k, v in attributes.items() if v is not None})
    with pytest.raises(Error) as refused:
        taken(tmp_path, node, ("w", np.zeros(32, np.uint8)), ("s", np.ones(4, np.float32)))
    assert message in str(refused.value)


# Experts


def moe(**attributes) -> onnx.NodeProto:
    return microsoft("QMoE", ["x", "x", "w", "s", "", "v", "t"], **attributes)


EXPERTS = [("w", np.zeros((2, 8, 8), np.uint8)), ("s", np.ones((2, 8), np.float32))]
EXPERTS += [("v", np.zeros((2, 16, 8), np.uint8)), ("t", np.ones((2, 16), np.float32))]


def test_experts_of_different_widths(tmp_path):
    model = taken(tmp_path, moe(expert_weight_bits=4, fc2_expert_weight_bits=8), *EXPERTS)
    assert (model["w"].dtype.name, model["w"].shape, model["w"].granularity) == (
        "uint4",
        (2, 8, 16),
        "blockwise (1, 1, 16)",
    )
    assert (model["v"].dtype.name, model["v"].shape) == ("uint8", (2, 16, 8))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"quant_type": "nvfp4"}, "quant_type 'nvfp4' of a QMoE"),
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"weights_prepacked": 1}, "weights_prepacked 1"),
        ({"expert_weight_bits": 3}, "codes of 3 bits"),
        ({"block_size": 16, "expert_weight_bits": 2}, "(2, 8, 2) are needed"),
        ({"block_size": 20}, "block_size 20"),
        ({"quant_type": "fp8", "block_size": 16}, "float8 is needed"),
    ],
)
def test_experts_that_are_refused(attributes, message, tmp_path):
    with pytest.raises(Error) as refused:
        taken(tmp_path, moe(**attributes), *EXPERTS)
    assert message in str(refused.value)
    assert "tensor 'w'" in str(refused.value)


def test_experts_of_float8(tmp_path):
    weight = RNG.normal(size=(2, 20, 24)).astype(ml_dtypes.float8_e4m3fn)
    scale = RNG.uniform(1, 2, (2, 2, 2)).astype(np.float32)
    node = microsoft("QMoE", ["x", "x", "w", "s"], quant_type="fp8", block_size=16)
    found = taken(tmp_path, node, ("w", weight), ("s", scale))["w"]
    wide = np.repeat(np.repeat(scale, 16, 1)[:, :20], 16, 2)[:, :, :24]
    np.testing.assert_array_equal(found.dequantize(np.float32), weight.astype(np.float32) * wide)
    node = microsoft("QMoE", ["x", "x", "w", *[""] * 12, "s"], quant_type="fp8")
    found = taken(tmp_path, node, ("w", weight), ("s", scale[:, 0, 0]))["w"]
    np.testing.assert_array_equal(found.dequantize(np.float32), weight.astype(np.float32) * scale[:, :1, :1])


def test_matrices_of_small_floats(tmp_path):
    weight = RNG.normal(size=(3, 40)).astype(ml_dtypes.float8_e4m3fn)
    scale = RNG.uniform(1, 2, (3, 3)).astype(np.float32)
    node = microsoft("MatMulBlockQuantizedFp8Weight", ["x", "w", "s"], block_size=16)
    found = taken(tmp_path, node, ("w", weight), ("s", scale))["w"]
    wide = np.repeat(scale, 16, 1)[:, :40]
    np.testing.assert_array_equal(found.dequantize(np.float32), weight.astype(np.float32) * wide)

    codes = RNG.integers(0, 16, (3, 40)).astype(np.uint8)
    bits = RNG.integers(1, 0x7E, (3, 3)).astype(np.uint8)
    node = microsoft("MatMulBlockQuantizedFp4Weight", ["x", "w", "s", "t"])
    arrays = [("w", codes[:, 0::2] | codes[:, 1::2] << 4), ("s", bits), ("t", np.float32(0.125))]
    found = taken(tmp_path, node, *((name, np.asarray(array)) for name, array in arrays))["w"]
    assert (found.dtype.name, found.quantization.scale.dtype.name) == ("float4_e2m1fn", "float8_e4m3fn")
    scales = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.125)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * np.repeat(scales, 16, 1)[:, :40]
    np.testing.assert_array_equal(found.dequantize(np.float32), values)


@pytest.mark.parametrize("operator", ["MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"])
@pytest.mark.parametrize(
    ("array", "attributes"),
    [
        (np.zeros((2, 3, 4), np.uint8), {}),
        (np.zeros((2, 4), np.float32), {}),
        (np.zeros((2, 4), np.uint8), {"block_size": -1}),
        (np.zeros((2, 32), np.uint8), {"block_size": 4}),
    ],
)
def test_matrices_of_small_floats_that_are_refused(operator, array, attributes, tmp_path):
    arrays = [("w", array), ("s", np.ones((2, 1), np.uint8)), ("t", np.float32(1))]
    with pytest.raises(CorruptFile, match="tensor 'w': has"):
        taken(
            tmp_path, microsoft(operator, ["x", "w", "s", "t"], **attributes), *((n, np.asarray(a)) for n, a in arrays)
        )


# Codes and their scales among an operator's inputs


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize(
    ("operator", "places", "shape", "scale", "zero_point", "granularity"),
    [
        ("DynamicQuantizeMatMul", (1, 2, 3), (4, 6), (6,), (6,), "per-axis 1"),
        ("DynamicQuantizeMatMul", (1, 2, 3), (4, 6), (6,), (), "per-axis 1"),
        ("DynamicQuantizeMatMul", (1, 2, 3), (4, 6), (), (6,), "per-axis 1"),
        ("MatMulIntegerToFloat", (1, 3, 5), (4, 6), (), None, "per-tensor"),
        ("QAttention", (1, 4, 7), (4, 6), (6,), (6,), "per-axis 1"),
        ("QGemm", (3, 4, 5), (4, 6), (6,), (6,), "per-axis 1"),
        ("QEmbedLayerNormalization", (2, 8, 13), (4, 6), (), (), "per-tensor"),
        ("QEmbedLayerNormalization", (6, 12, 17), (6,), (), (), "per-tensor"),
        ("QLinearAdd", (3, 4, 5), (4, 6), (), (), "per-tensor"),
        ("QLinearMul", (0, 1, 2), (4, 6), (), None, "per-tensor"),
        ("DynamicQuantizeLSTM", (1, 8, 9), (2, 4, 6), (2,), (2,), "per-axis 0"),
        ("DynamicQuantizeLSTM", (2, 10, 11), (2, 4, 6), (2, 6), (2, 6), "blockwise (1, 4, 1)"),
    ],
)
def test_codes_among_the_inputs(operator, places, shape, scale, zero_point, granularity, tmp_path):
    names = ["x"] * (max(places) + 1)
    for place, name in zip(places, ("w", "s", "z" if zero_point is not None else ""), strict=True):
        names[place] = name
    codes, scales = integers(*shape), RNG.uniform(1, 2, scale).astype(np.float32)
    arrays = [("w", codes), ("s", scales)] + ([] if zero_point is None else [("z", integers(*zero_point))])
    model = taken(tmp_path, microsoft(operator, names), *arrays)
    assert list(model) == ["w"]
    assert model["w"].granularity == granularity

    def over(array: np.ndarray) -> np.ndarray:
        if operator == "DynamicQuantizeLSTM":
            return array[:, None, None] if array.ndim == 1 else array[:, None, :]
        return array

    difference = codes.astype(np.float32) - (0 if zero_point is None else over(arrays[-1][1]).astype(np.float32))
    np.testing.assert_array_equal(model["w"].dequantize(np.float32), difference * over(scales))


def test_transposed_gemm(tmp_path):
    names = ["x", "x", "x", "w", "s", "z"]
    arrays = [("w", integers(6, 4)), ("s", np.ones(6, np.float32)), ("z", np.zeros(6, np.int8))]
    model = taken(tmp_path, microsoft("QGemm", names, transB=1), *arrays)
    assert model["w"].granularity == "per-axis 0"
    assert model["w"].uses == (Use("QGemm", 3, 0),)


def test_integer_products_without_a_scale_are_codes(tmp_path):
    node = helper.make_node("MatMulInteger", ["x", "w", "", "z"], ["y"])
    model = taken(tmp_path, node, ("w", integers(4, 6)), ("z", np.zeros((), np.int8)))
    assert model["w"].quantization is None


# Idioms


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_cast_and_mul_in_any_float(dtype, tmp_path):
    scale = RNG.uniform(1, 2, (3, 1)).astype(helper.tensor_dtype_to_np_dtype(dtype))
    nodes = [helper.make_node("Cast", ["q"], ["f"], to=dtype), helper.make_node("Mul", ["f", "s"], ["y"])]
    weight = read(save(tmp_path / "m.onnx", nodes, [raw("q", INT4_CODES), raw("s", scale)]))["q"]
    values = INT4_CODES.astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(weight.dequantize(np.float32), values)


def rounded(codes_dtype, block=None, **attributes):
    axes = {"axis": 1, "block_size": block} if block else {"axis": 0}
    names = ["w", "s", "z"] if "output_dtype" not in attributes else ["w", "s"]
    return [
        helper.make_node("QuantizeLinear", names, ["q"], **axes, **attributes),
        linear("q", *names[1:], **axes),
    ]


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8, ml_dtypes.int2, np.int16])
@pytest.mark.parametrize("block", [None, 16])
def test_floats_that_are_rounded_on_loading(dtype, block, tmp_path):
    """Round half to even, then the zero point, then saturate (ONNX operators, QuantizeLinear)."""
    limits = ml_dtypes.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    grid = (5, 3) if block else (5,)
    scale = np.float32(0.5) * RNG.integers(1, 4, grid).astype(np.float32)
    zero_point = RNG.integers(max(low, -2), min(high, 2) + 1, grid).astype(dtype)
    floats = (RNG.integers(-2 * high, 2 * high, (5, 37)) * 0.25).astype(np.float32)
    path = save(tmp_path / "m.onnx", rounded(dtype, block), [raw("w", floats), raw("s", scale), raw("z", zero_point)])
    weight = read(path)["w"]
    assert (weight.dtype, weight.shape) == (dtype, (5, 37))
    wide, zero = (np.repeat(a.reshape(5, -1), block or 37, 1)[:, :37] for a in (scale, zero_point.astype(np.int64)))
    codes = np.clip(np.rint(floats / wide) + zero, low, high).astype(np.int64)
    np.testing.assert_array_equal(weight.codes(), codes)
    np.testing.assert_array_equal(weight.dequantize(np.float32), (codes - zero).astype(np.float32) * wide)
    pieces = [part.packed() for part in weight.parts(24)]
    assert np.concatenate(pieces).tobytes() == weight.packed().tobytes()


def test_floats_that_are_rounded_without_a_zero_point(tmp_path):
    floats, scale = np.float32([[-3, -1.5, 0.5], [1.5, 2.5, 99]]), np.float32([1, 1])
    nodes = rounded(None, output_dtype=TensorProto.INT4)
    weight = read(save(tmp_path / "m.onnx", nodes, [raw("w", floats), raw("s", scale)]))["w"]
    assert weight.codes().tolist() == [[-3, -2, 0], [2, 2, 7]]


def test_floats_that_others_take_as_they_are(tmp_path):
    nodes = [*rounded(np.int8), helper.make_node("Relu", ["w"], ["r"])]
    arrays = [("w", np.ones((5, 3), np.float32)), ("s", np.ones(5, np.float32)), ("z", np.zeros(5, np.int8))]
    model = read(save(tmp_path / "m.onnx", nodes, [raw(*each) for each in arrays]))
    assert model["w"].quantization is None


def test_floats_that_are_rounded_outside_the_graph(tmp_path):
    """A DequantizeLinear in a body, of codes that are made around it."""
    rounding, decoding = rounded(np.int8)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    body = helper.make_graph([decoding], "body", [], [value])
    branch = helper.make_node("If", ["c"], ["r"], then_branch=body, else_branch=body)
    arrays = [("w", np.ones((5, 3), np.float32)), ("s", np.ones(5, np.float32)), ("z", np.zeros(5, np.int8))]
    model = read(
        save(tmp_path / "m.onnx", [rounding, branch], [raw(*each) for each in arrays], outputs=["r"], inputs=["c"])
    )
    assert model["w"].dtype == np.float32


def test_codes_that_are_gathered_first(tmp_path):
    nodes = [helper.make_node("Gather", ["q", "x"], ["g"]), linear("g", "s", "z")]
    arrays = [("q", integers(5, 3)), ("s", np.float32(0.5)), ("z", np.int8(3))]
    model = read(save(tmp_path / "m.onnx", nodes, [raw(n, np.asarray(a)) for n, a in arrays], inputs=["x"]))
    assert model["q"].granularity == "per-tensor"
    assert model["q"].uses == (Use("Gather", 0, sum_axes=()),)
    several = [("q", integers(5, 3)), ("s", np.ones(3, np.float32)), ("z", np.zeros(3, np.int8))]
    model = read(save(tmp_path / "m.onnx", nodes, [raw(*each) for each in several], inputs=["x"]))
    assert model["q"].quantization is None  # scales of what is gathered: which codes they are for, is open


# Functions


def function(name: str, inputs, nodes, domain: str = "local") -> onnx.FunctionProto:
    return helper.make_function(domain, name, inputs, ["y"], nodes, [helper.make_opsetid("", 25)])


def call(name: str, inputs, output: str = "y") -> onnx.NodeProto:
    return helper.make_node(name, inputs, [output], domain="local")


def test_functions_that_call_functions(tmp_path):
    decode = function("Decode", ["a", "b"], [linear("a", "b", axis=0)])
    product = [call("Decode", ["w", "s"], "v"), helper.make_node("MatMul", ["x", "v"], ["y"])]
    outer = function("Product", ["x", "w", "s"], product)
    arrays = [raw("q", INT4_CODES), raw("s", np.float32([1, 2, 3]))]
    path = save(
        tmp_path / "m.onnx", [call("Product", ["x", "q", "s"])], arrays, inputs=["x"], functions=[outer, decode]
    )
    model = read(path)
    assert list(model) == ["q"]
    assert model["q"].granularity == "per-axis 0"


def test_functions_whose_axis_is_a_parameter(tmp_path):
    """What the axis is, is not known where the node is: codes stay codes, rather than be decoded along another one."""
    node = linear("a", "b")
    node.attribute.append(onnx.AttributeProto(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT))
    body = function("Decode", ["a", "b"], [node])
    arrays = [raw("q", INT4_CODES), raw("s", np.float32([1, 2, 3, 4, 5]))]
    model = read(save(tmp_path / "m.onnx", [call("Decode", ["q", "s"])], arrays, functions=[body]))
    assert model["q"].quantization is None


def test_functions_that_call_each_other_without_end(tmp_path):
    bodies = [
        function(name, ["a"], [call(other, ["a"], "b"), call(other, ["a"])]) for name, other in (("F", "G"), ("G", "F"))
    ]
    with pytest.raises(Unsupported, match="functions call functions"):
        read(save(tmp_path / "m.onnx", [call("F", ["q"])], [raw("q", INT4_CODES)], functions=bodies))
