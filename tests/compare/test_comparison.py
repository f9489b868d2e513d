"""Code for code and value for value."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.compare import comparison
from nibblecast.converters.compare.comparison import compare
from nibblecast.converters.ir import Model, Quantization, Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"


def weight(codes: np.ndarray, scale: float = 0.5, zero_point: int | None = None, name: str = "w") -> Tensor:
    quantization = Quantization(
        Tensor.from_array("scale", np.array([[scale]], np.float32)),
        codes.shape,
        None if zero_point is None else Tensor.from_array("zero_point", np.array([[zero_point]], np.int8)),
    )
    return Tensor.from_array(name, codes, quantization)


def one(tensor: Tensor) -> Model:
    return Model({tensor.name: tensor})


CODES = np.array([[1, -2, 3], [4, -5, 6]], ml_dtypes.int4)


def test_equal_models_are_equal() -> None:
    result = compare(one(weight(CODES)), one(weight(CODES)))
    assert result.equal
    assert (result.tensors, result.quantized, result.elements) == (1, 1, 6)


def test_a_code_that_differs_is_shown_with_its_place() -> None:
    other = CODES.copy()
    other[1, 0] = 7
    result = compare(one(weight(CODES)), one(weight(other)))
    assert [(d.kind, d.count, d.detail) for d in result.differences] == [
        ("codes", 1, "(1, 0) 4 against 7"),
    ]


def test_a_scale_that_differs_is_shown_even_where_all_codes_are_zero() -> None:
    zeros = np.zeros((2, 3), ml_dtypes.int4)
    result = compare(one(weight(zeros, 0.5)), one(weight(zeros, 0.25)))
    assert [(d.kind, d.detail) for d in result.differences] == [("scale", "(0, 0) 0.5 against 0.25")]


def test_no_zero_point_and_zeros_mean_the_same() -> None:
    assert compare(one(weight(CODES)), one(weight(CODES, zero_point=0))).equal


def test_zero_points_that_differ_are_shown() -> None:
    result = compare(one(weight(CODES, zero_point=1)), one(weight(CODES, zero_point=2)))
    assert [(d.kind, d.detail) for d in result.differences] == [("zero_point", "(0, 0) 1 against 2")]
    assert [d.kind for d in compare(one(weight(CODES)), one(weight(CODES, zero_point=2))).differences] == ["zero_point"]


def test_other_blocks_with_the_same_values_are_equal() -> None:
    per_row = Quantization(Tensor.from_array("s", np.array([[0.5], [0.5]], np.float32)), (1, 3))
    assert compare(one(weight(CODES)), one(Tensor.from_array("w", CODES, per_row))).equal
    other = Quantization(Tensor.from_array("s", np.array([[0.5], [0.25]], np.float32)), (1, 3))
    assert [d.kind for d in compare(one(weight(CODES)), one(Tensor.from_array("w", CODES, other))).differences] == [
        "values"
    ]


def test_offset_binary_equals_twos_complement_with_a_shifted_zero_point() -> None:
    unsigned = (CODES.astype(np.int8) + 8).astype(np.uint8).astype(ml_dtypes.uint4)
    assert compare(one(weight(CODES)), one(weight(unsigned, zero_point=8))).equal
    assert not compare(one(weight(CODES)), one(weight(unsigned, zero_point=7))).equal


def test_quantized_against_plain_is_compared_by_value() -> None:
    tensor = weight(CODES)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        plain = Tensor.from_array("w", tensor.dequantize(dtype))
        assert compare(one(tensor), one(plain)).equal
    changed = tensor.dequantize(np.float32)
    changed[0, 0] = 9
    assert [d.kind for d in compare(one(tensor), one(Tensor.from_array("w", changed))).differences] == ["values"]


def test_nan_equals_nan_and_the_sign_of_zero_does_not_count() -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.complex64):
        a = Tensor.from_array("x", np.array([np.nan, 0.0, 1.0], dtype))
        b = Tensor.from_array("x", np.array([np.nan, -0.0, 1.0], dtype))
        assert compare(one(a), one(b)).equal
        c = Tensor.from_array("x", np.array([np.nan, np.nan, 1.0], dtype))
        assert not compare(one(a), one(c)).equal


def test_missing_tensors_and_other_shapes_are_differences() -> None:
    a, b = Tensor.from_array("a", np.zeros(2, np.int8)), Tensor.from_array("b", np.zeros(2, np.int8))
    result = compare(Model({"a": a, "b": b}), Model({"a": Tensor.from_array("a", np.zeros((1, 2), np.int8))}))
    assert [str(d) for d in result.differences] == ["b: missing in the second", "a: shape (2,) against (1, 2)"]


def test_only_the_first_few_places_are_shown_but_all_are_counted() -> None:
    a = Tensor.from_array("x", np.zeros(100, np.int16))
    b = Tensor.from_array("x", np.ones(100, np.int16))
    (difference,) = compare(one(a), one(b)).differences
    assert difference.count == 100
    assert difference.detail == "(0,) 0 against 1, (1,) 0 against 1, (2,) 0 against 1"


def test_large_tensors_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_PIECE_ELEMENTS", 64)
    codes = (np.arange(35 * 21).reshape(35, 21) % 16 - 8).astype(ml_dtypes.int4)
    other = codes.copy()
    other[34, 20] = 0
    (difference,) = compare(one(weight(codes)), one(weight(other))).differences
    assert difference.detail.startswith("(34, 20) ")
    assert compare(one(weight(codes)), one(weight(codes))).equal


def test_files_of_different_formats(tmp_path: Path) -> None:
    source = FIXTURES / "mlp_int4_blockwise.tflite"
    nibblecast.convert(source, tmp_path / "a.safetensors", tmp_path / "a.onnx")
    for a, b in ((source, "a.safetensors"), (source, "a.onnx"), (tmp_path / "a.onnx", "a.safetensors")):
        result = nibblecast.verify(a, tmp_path / b)
        assert result.equal, result.differences
        assert result.quantized == sum(t.quantization is not None for t in nibblecast.load(source).values()) > 1
