"""Every TFLite operator that becomes ONNX: onnxruntime computes what LiteRT computes, one operator at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import nibblecast

pytestmark = pytest.mark.peers
one_operator = pytest.importorskip("tests.formats.tflite.to_onnx.one_operator", reason="needs ai-edge-litert")
Case = one_operator.Case

_RNG = np.random.default_rng(0)


def f(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return _RNG.uniform(low, high, shape).astype(np.float32)


def i(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def scalar(value: int) -> np.ndarray:
    return np.array(value, np.int32)


def b(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 2, shape).astype(np.bool_)


UNARY = (
    "ABS CEIL COS ELU EXP FLOOR HARD_SWISH LOGISTIC NEG RELU RELU6 RELU_N1_TO_1 RELU_0_TO_1 ROUND SIGN SIN SQUARE TANH"
).split()
POOL = {"padding": 1, "strideH": 2, "strideW": 2, "filterHeight": 2, "filterWidth": 2}
BINARY = "ADD SUB MUL DIV MAXIMUM MINIMUM SQUARED_DIFFERENCE FLOOR_DIV FLOOR_MOD ATAN2".split()
COMPARISONS = "EQUAL NOT_EQUAL LESS LESS_EQUAL GREATER GREATER_EQUAL".split()
REDUCTIONS = "MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD".split()

CHANGED_SINCE_13 = ("MEAN", "GELU", "CONV_2D", "HARD_SWISH", "SCATTER_ND")

CASES = [
    *(Case(name, [f(2, 3, 4)]) for name in UNARY),
    *(Case(name, [f(2, 3, high=4.0, low=0.1)]) for name in ("LOG", "SQRT", "RSQRT")),
    *(Case(name, [f(2, 3, 4), f(3, 1)]) for name in BINARY if name != "ATAN2"),
    Case("ATAN2", [f(3, 4), f(3, 4)]),
    *(Case(name, [i(-7, 7, -8, 8, 5), i(2, -2, 3, 3, 5)], result=np.int32) for name in ("FLOOR_DIV", "FLOOR_MOD")),
    *(Case(name, [f(2, 3), f(2, 3)], {"fusedActivationFunction": a}) for name in ("ADD", "MUL") for a in (1, 2, 3)),
    *(Case(name, [i(1, 2, 3), i(1, 5, 0)], result=np.bool_) for name in COMPARISONS),
    Case("POW", [f(2, 3, low=0.1), f(2, 3)]),
    Case("ADD_N", [f(2, 3), f(2, 3), f(2, 3)]),
    Case("LOGICAL_AND", [b(2, 3), b(2, 3)], result=np.bool_),
    Case("LOGICAL_OR", [b(2, 3), b(2, 3)], result=np.bool_),
    Case("LOGICAL_NOT", [b(2, 3)], result=np.bool_),
    Case("LEAKY_RELU", [f(2, 3)], {"alpha": 0.3}),
    *(Case("GELU", [f(2, 3)], {"approximate": a}) for a in (False, True)),
    Case("PRELU", [f(1, 3, 3, 2), f(1, 1, 2)], constant=[1]),
    *(Case("SOFTMAX", [f(2, 5)], {"beta": beta}) for beta in (1.0, 0.5)),
    Case("LOG_SOFTMAX", [f(2, 5)]),
    Case("L2_NORMALIZATION", [f(2, 5)]),
    # the reference kernel leaves the last channel of each window out
    Case(
        "LOCAL_RESPONSE_NORMALIZATION",
        [f(1, 2, 2, 6)],
        {"radius": 2, "bias": 1.0, "alpha": 0.2, "beta": 0.75},
        optimized=True,
    ),
    Case("SELECT", [b(2), f(2, 3), f(2, 3)]),
    Case("SELECT", [b(2, 3), f(2, 3), f(2, 3)]),
    Case("SELECT_V2", [b(3), f(2, 3), f(2, 1)]),
    # convolutions and images
    *(
        Case(
            "CONV_2D",
            [f(1, 7, 8, 4), f(6, 3, 2, 4), f(6)],
            {"padding": p, "strideH": s, "strideW": s, "dilationHFactor": d, "dilationWFactor": d},
            constant=[1, 2],
        )
        for p in (0, 1)
        for s, d in ((1, 1), (2, 1), (1, 2))
    ),
    *(
        Case(
            "DEPTHWISE_CONV_2D",
            [f(1, 7, 8, 3), f(1, 3, 3, 3 * m), f(3 * m)],
            {"padding": p, "strideH": 2, "strideW": 2, "depthMultiplier": m, "fusedActivationFunction": 1},
            constant=[1, 2],
        )
        for p in (0, 1)
        for m in (1, 2)
    ),
    Case(
        "CONV_3D",
        [f(1, 4, 5, 6, 2), f(2, 2, 3, 2, 3)],
        {"padding": 0, "strideD": 1, "strideH": 2, "strideW": 2},
        constant=[1],
    ),
    *(
        Case(
            "CONV_3D_TRANSPOSE",
            [i(1, *size, 4), f(2, 3, 3, 4, 3), f(1, 3, 4, 4, 3), f(4)],
            {"padding": p, "strideD": 1, "strideH": 2, "strideW": 2},
            constant=[0, 1, 3],
        )
        for p, size in ((0, (3, 8, 8)), (0, (3, 7, 7)), (1, (4, 9, 9)))
    ),
    *(
        Case(
            "TRANSPOSE_CONV",
            [i(1, *size, 5), f(5, 3, 3, 4), f(1, 4, 4, 4)],
            {"padding": p, "strideH": 2, "strideW": 2},
            constant=[0, 1],
        )
        for p, size in ((0, (8, 8)), (0, (7, 7)), (1, (9, 9)))
    ),
    *(
        Case(name, [f(1, 7, 8, 3)], {"padding": p, "strideH": 2, "strideW": 2, "filterHeight": 3, "filterWidth": 2})
        for name in ("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D")
        for p in (0, 1)
    ),
    *(
        Case(name, [f(1, 3, 4, 2), i(6, 5)], {"alignCorners": a, "halfPixelCenters": h}, constant=[1])
        for name in ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
        for a, h in ((False, False), (True, False), (False, True))
    ),
    Case("DEPTH_TO_SPACE", [f(1, 2, 3, 8)], {"blockSize": 2}),
    Case("SPACE_TO_DEPTH", [f(1, 4, 6, 2)], {"blockSize": 2}),
    # matrix products
    Case("FULLY_CONNECTED", [f(2, 6), f(4, 6), f(4)], constant=[1, 2]),
    Case("FULLY_CONNECTED", [f(2, 3, 6), f(4, 6)], {"keepNumDims": True}, constant=[1]),
    *(
        Case("BATCH_MATMUL", [f(2, *(4, 3) if x else (3, 4)), f(2, *(5, 4) if y else (4, 5))], {"adjX": x, "adjY": y})
        for x in (False, True)
        for y in (False, True)
    ),
    # reductions
    *(
        Case(name, [f(2, 3, 4), i(*axes)], {"keepDims": keep}, constant=[1])
        for name in REDUCTIONS
        for keep in (False, True)
        for axes in ((1,), (0, -1))
    ),
    Case("MEAN", [f(1, 4, 4, 3), i(1, 2)], constant=[1]),
    *(Case(name, [b(2, 3), i(1)], constant=[1], result=np.bool_) for name in ("REDUCE_ALL", "REDUCE_ANY")),
    *(
        Case(name, [f(3, 5), scalar(1)], {"outputType": 2}, constant=[1], result=np.int32)
        for name in ("ARG_MAX", "ARG_MIN")
    ),
    *(
        Case("CUMSUM", [f(2, 4), scalar(1)], {"exclusive": exclusive, "reverse": reverse}, constant=[1])
        for exclusive in (False, True)
        for reverse in (False, True)
    ),
    # shapes
    Case("RESHAPE", [f(2, 6), i(3, -1)], {"newShape": [3, -1]}, constant=[1]),
    Case("SQUEEZE", [f(1, 3, 1, 2)], {"squeezeDims": [0]}),
    Case("EXPAND_DIMS", [f(2, 3), np.array(1, np.int32)], constant=[1]),
    Case("TRANSPOSE", [f(2, 3, 4), i(2, 0, 1)], constant=[1]),
    Case("CONCATENATION", [f(2, 3), f(2, 2)], {"axis": -1}),
    Case("PACK", [f(2, 3), f(2, 3)], {"valuesCount": 2, "axis": 1}),
    Case("UNPACK", [f(2, 3)], {"num": 3, "axis": 1}, results=3),
    Case("SPLIT", [np.array(1, np.int32), f(2, 6)], {"numSplits": 3}, constant=[0], results=3),
    Case("SPLIT_V", [f(2, 6), i(1, -1, 3), np.array(1, np.int32)], {"numSplits": 3}, constant=[1, 2], results=3),
    Case("GATHER", [f(4, 3), i(2, 0)], {"axis": 0}),
    Case("GATHER", [f(2, 4, 3), np.array([[1, 0], [3, 3]], np.int32)], {"axis": 1, "batchDims": 1}),
    Case("GATHER", [f(2, 3, 4, 2), np.array([[1, 0, 3], [3, 3, 2]], np.int32)], {"axis": 2, "batchDims": 1}),
    Case("GATHER_ND", [f(2, 3, 4), np.array([[0, 1], [1, 2]], np.int32)]),
    Case("EMBEDDING_LOOKUP", [i(2, 0, 1), f(4, 3)], constant=[1]),
    Case("SCATTER_ND", [np.array([[1], [1], [3]], np.int32), f(3, 2), i(5, 2)], constant=[2]),
    Case("PAD", [f(1, 2, 3, 2), np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)], constant=[1]),
    Case("PADV2", [f(2, 3), np.array([[1, 0], [0, 2]], np.int32), np.array(7, np.float32)], constant=[1, 2]),
    Case("MIRROR_PAD", [f(3, 4), np.array([[1, 2], [2, 1]], np.int32)], {"mode": 0}, constant=[1]),
    Case("MIRROR_PAD", [f(3, 4), np.array([[1, 3], [4, 1]], np.int32)], {"mode": 1}, constant=[1]),
    Case("SLICE", [f(3, 4, 5), i(1, 0, 2), i(2, -1, 1)], constant=[1, 2]),
    *(
        Case("STRIDED_SLICE", [f(3, 4, 5), i(*a), i(*z), i(*s)], masks, constant=[1, 2, 3])
        for a, z, s, masks in (
            ((0, 1, 0), (3, 3, 5), (1, 1, 2), {}),
            ((1, 3, -1), (2, 0, 0), (1, -1, -1), {"beginMask": 4, "endMask": 4}),
            ((1, 0, 0), (2, 4, 5), (1, 1, 1), {"shrinkAxisMask": 1}),
            ((-1, 0, -1), (0, 4, 0), (1, 1, 1), {"shrinkAxisMask": 5}),
            ((0, 0), (1, 2), (1, 1), {"ellipsisMask": 1}),
        )
    ),
    Case(
        "STRIDED_SLICE",
        [f(3, 4, 5), i(0, 1, -4), i(2, 2, 3), i(1, 1, 1)],
        {"offset": True},
        constant=[1, 2, 3],
        version=8,
    ),
    Case("TILE", [f(2, 3), i(2, 3)]),
    Case("BROADCAST_TO", [f(3, 1), i(2, 3, 4)], constant=[1], version=2),
    Case("FILL", [i(2, 3), np.array(1.5, np.float32)], constant=[0]),
    Case("SHAPE", [f(2, 3)], {"outType": 2}, result=np.int32),
    Case("RANGE", [np.array(v, np.int32) for v in (2, 11, 3)], result=np.int32),
    Case(
        "ONE_HOT",
        [i(1, 0, 3), scalar(4), np.array(2, np.float32), np.array(-1, np.float32)],
        {"axis": -1},
        constant=[1, 2, 3],
    ),
    Case(
        "ONE_HOT",
        [scalar(2), scalar(4), np.array(2, np.float32), np.array(-1, np.float32)],
        {"axis": -1},
        constant=[1, 2, 3],
    ),
    Case("WHERE", [np.array([[True, False], [True, True]])], result=np.int64),
    Case("REVERSE_V2", [f(2, 3), i(1)], constant=[1]),
    Case("DYNAMIC_UPDATE_SLICE", [f(4, 5), f(2, 2), i(1, 4)]),
    Case("SPACE_TO_BATCH_ND", [f(1, 4, 5, 2), i(2, 3), np.array([[0, 0], [0, 1]], np.int32)], constant=[1, 2]),
    Case("BATCH_TO_SPACE_ND", [f(6, 2, 2, 2), i(2, 3), np.array([[0, 0], [0, 1]], np.int32)], constant=[1, 2]),
    Case("SEGMENT_SUM", [f(4, 3), i(0, 0, 1, 2)], constant=[1]),
    Case("SEGMENT_SUM", [f(4, 3), i(0, 1, 1, 2)]),
    Case("TOPK_V2", [f(2, 6), np.array(3, np.int32)], constant=[1], results=2, second_result=np.int32),
    # positions
    *(
        Case(f"UNSORTED_SEGMENT_{name}", [f(5, 3), i(2, 0, 2, -1, 1), scalar(4)], constant=[2])
        for name in ("SUM", "MAX", "MIN", "PROD")
    ),
    Case("MATRIX_DIAG", [f(2, 3)]),
    *(Case("MATRIX_SET_DIAG", [f(2, *size), f(2, 3)]) for size in ((3, 3), (3, 5), (4, 3))),
    Case("BROADCAST_ARGS", [i(3, 1), i(2, 1, 4)], result=np.int32),
    *(
        Case("REVERSE_SEQUENCE", [f(3, 4, 3), i(2, 3, 1)], {"seqDim": time, "batchDim": batch})
        for time, batch in ((1, 0), (1, 2), (0, 2))
    ),
    Case(
        "SPARSE_TO_DENSE",
        [np.array([[0, 1], [2, 0]], np.int32), i(3, 4), f(2), np.array(0.5, np.float32)],
        constant=[1],
    ),
    Case("SPARSE_TO_DENSE", [i(1, 3), i(5), np.array(2, np.float32), np.array(0.5, np.float32)], constant=[1]),
    Case("UNIQUE", [i(3, 1, 3, 3, 0)], {"idxOutType": 2}, result=np.int32, results=2, second_result=np.int32),
    Case(
        "NON_MAX_SUPPRESSION_V4",
        [
            np.array([[0, 0, 1, 1], [0, 0.1, 1, 1.1], [2, 2, 3, 3], [5, 5, 4, 4]], np.float32),
            np.array([0.5, 0.9, 0.7, 0.05], np.float32),
            scalar(3),
            np.array(0.5, np.float32),
            np.array(0.1, np.float32),
        ],
        constant=[2, 3, 4],
        result=np.int32,
        results=2,
        second_result=np.int32,
    ),
    Case("BUCKETIZE", [np.array([-3, -1, 0.5, 2, 9], np.float32)], {"boundaries": [-1.0, 2.0, 5.0]}, result=np.int32),
    Case("BITWISE_XOR", [i(5, -3, 9), i(3, 7, -1)], result=np.int32),
    Case("RIGHT_SHIFT", [i(-9, 9, -1, 1 << 30), i(1, 2, 40, 3)], result=np.int32),
    Case("RIGHT_SHIFT", [np.array([200, 7], np.uint8), np.array([3, 1], np.uint8)], result=np.uint8),
    # storage
    Case("CAST", [f(2, 3)], {"inDataType": 0, "outDataType": 2}, result=np.int32),
    Case("ZEROS_LIKE", [f(2, 3)]),
    *(
        Case("FAKE_QUANT", [f(4, 9)], {"min": low, "max": high, "numBits": bits})
        for low, high in ((-1.0, 1.5), (0.0, 1.0))
        for bits in (4, 8)
    ),
    *(Case(name, [f(3, 4), f(3, 4, low=0.2)]) for name in ("FLOOR_DIV", "FLOOR_MOD")),
    Case("QUANTIZE", [f(2, 3)], result=np.int8, result_quantized=(0.02, 3)),
    Case("DEQUANTIZE", [_RNG.integers(-128, 128, (2, 3)).astype(np.int8)], quantized={0: (0.02, 3)}),
]
QUANTIZED = [
    *(
        Case(
            name,
            [_RNG.integers(-128, 128, (1, 4, 4, 2)).astype(np.int8)] * count,
            options,
            quantized=dict.fromkeys(range(count), (0.03, -5)),
            result=np.int8,
            result_quantized=scale,
        )
        for name, count, options, scale in (
            ("ADD", 2, {}, (0.06, 7)),
            ("SUB", 2, {}, (0.05, 0)),
            ("MUL", 2, {}, (0.1, -3)),
            ("LOGISTIC", 1, {}, (1 / 256, -128)),
            ("TANH", 1, {}, (1 / 128, 0)),
            ("SOFTMAX", 1, {"beta": 1.0}, (1 / 256, -128)),
            ("MAX_POOL_2D", 1, POOL, (0.03, -5)),
            ("AVERAGE_POOL_2D", 1, POOL, (0.03, -5)),
            ("QUANTIZE", 1, {}, (0.06, 2)),
            ("HARD_SWISH", 1, {}, (0.03, -5)),
            ("LEAKY_RELU", 1, {"alpha": 0.1}, (0.03, -5)),
        )
    ),
    Case(
        "ADD",
        [_RNG.integers(-(1 << 15), 1 << 15, (2, 8)).astype(np.int16)] * 2,
        {"potScaleInt16": False},
        quantized=dict.fromkeys(range(2), (1e-4, 0)),
        result=np.int16,
        result_quantized=(2e-4, 0),
    ),
]


def converted(case, tmp_path, **options) -> dict[str, np.ndarray]:
    """What onnxruntime computes with the ONNX model."""
    source = tmp_path / "one.tflite"
    source.write_bytes(one_operator.model(case))
    nibblecast.convert(source, tmp_path / "one.onnx", **options)
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), settings, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    assert names == [f"result_{k}" for k in range(case.results)]
    return dict(zip(names, session.run(names, one_operator.fed(case)), strict=True))


def expected(case) -> dict[str, np.ndarray]:
    found = one_operator.run(one_operator.model(case), case)
    return {f"result_{k}": array for k, array in enumerate(found)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_litert_computes(case, tmp_path):
    for (name, ours), theirs in zip(converted(case, tmp_path).items(), expected(case).values(), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 if theirs.dtype.kind == "f" else 0)


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_a_quantized_operator_is_at_most_a_step_away(case, tmp_path):
    for ours, theirs in zip(converted(case, tmp_path).values(), expected(case).values(), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("case", [case for case in CASES if case.operator in CHANGED_SINCE_13], ids=str)
def test_an_operator_in_an_older_operator_set(case, tmp_path):
    opset = 16 if case.operator == "SCATTER_ND" else 13
    for ours, theirs in zip(converted(case, tmp_path, opset=opset).values(), expected(case).values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
