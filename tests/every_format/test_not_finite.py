"""Scales, zero points, offsets and values that are NaN, infinite, signalling or too large, through every writer and
stage: an Error or a file, and never a warning of NumPy (pytest makes each of them an error)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, is_float
from nibblecast.converters.ir import Model, Tensor
from tests import zoo

pytestmark = pytest.mark.slow

VALUES = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, 65504.0, 65520.0, 1e308, -1e308, 1e-320]
SIGNALLING = {"float16": 0x7C01, "bfloat16": 0x7F81, "float32": 0x7F800001, "float64": 0x7FF0000000000001}
SCALES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn)
CODES = (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.uint2, np.int8, np.uint8, ml_dtypes.float4_e2m1fn)
PARAMETERS: tuple[dict[str, object], ...] = (
    {},
    {"zero_point": np.float32},
    {"offset": np.float32},
    {"zero_point": np.int8},
)
BLOCKS = ((1, 32), (1, 16), (8, 64))


def not_finite(tensor: Tensor, turn: int) -> Tensor:
    """The tensor with such values where it has floats; every third is a signalling NaN in odd turns."""
    if not is_float(tensor.dtype) or tensor.dtype in SUB_BYTE:
        return tensor
    with np.errstate(all="ignore"):
        values = np.resize(np.roll(np.array(VALUES), turn), tensor.shape).astype(tensor.dtype)
    bits = SIGNALLING.get(tensor.dtype.name)
    if turn % 2 and bits is not None:
        values.reshape(-1).view(f"u{tensor.dtype.itemsize}")[::3] = bits
    return replace(Tensor.from_array(tensor.name, values), parameter_of=tensor.parameter_of)


def with_such_parameters(tensor: Tensor, turn: int) -> Tensor:
    quantization = tensor.quantization
    if quantization is None:
        return not_finite(tensor, turn)
    parameters = {role: getattr(quantization, role) for role in ("scale", "zero_point", "offset", "codebook")}
    changed = {role: not_finite(each, turn) for role, each in parameters.items() if each is not None}
    return replace(tensor, quantization=replace(quantization, **changed))


def tensors() -> Iterator[Tensor]:
    """A weight of each combination, every theme of the zoo, and plain floats."""
    turn = 0
    for codes in CODES:
        for scale in SCALES:
            for more in PARAMETERS:
                turn += 1
                block = BLOCKS[turn % len(BLOCKS)]
                if codes is not ml_dtypes.float4_e2m1fn or more.get("zero_point") is not np.int8:
                    yield with_such_parameters(
                        zoo.quantized("m.weight", (8, 64), block, dtype=codes, scale=scale, **more), turn
                    )
    for number, tensor in enumerate([*zoo.schemes().values(), *zoo.scales().values(), *zoo.plain().values()]):
        yield with_such_parameters(tensor, number)
        yield with_such_parameters(tensor, number + 1)


TENSORS = list(tensors())[::2]
FOLDERS = [
    {"to": "safetensors", "layout": layout, "others": "dequantize", **more}
    for layout in ("awq", "compressed-tensors", "gptq", "mlx", "torchao")
    for more in ({}, {"scale_dtype": "float16"})
]
WRITERS: list[tuple[str, dict[str, Any]]] = [
    ("out.gguf", {}),
    ("out.h", {}),
    ("out.h", {"fixed_point": True}),
    ("out.onnx", {}),
    ("out.onnx", {"opset": 13}),
    ("out.safetensors", {}),
    *(("out", options) for options in FOLDERS),
]
QUANTIZE = ("int4,block=32", "int8,per-channel,mse", "int4,block=32,asymmetric,scale=float16", "uint4,block=16")


@pytest.mark.parametrize(("target", "options"), WRITERS, ids=str)
def test_writers(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    written = 0
    for tensor in TENSORS:
        with suppress(nibblecast.Error):
            nibblecast.save(Model({tensor.name: tensor}), tmp_path / target, **options)
            written += 1
    assert written


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_quantizing(quantize: str, tmp_path: Path) -> None:
    for tensor in TENSORS[::2]:
        with suppress(nibblecast.Error):
            nibblecast.save(Model({tensor.name: tensor}), tmp_path / "in.safetensors")
            nibblecast.convert(
                tmp_path / "in.safetensors", tmp_path / "out.onnx", quantize=f"{quantize},requantize", verify=True
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decoding_comparing_and_measuring(dtype: str, tmp_path: Path) -> None:
    source, decoded = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for tensor in TENSORS[::2]:
        nibblecast.save(Model({tensor.name: tensor}), source)
        with suppress(nibblecast.Error):
            tensor.dequantize(dtype)
        with suppress(nibblecast.Error):
            nibblecast.convert(source, decoded, dequantize=dtype, verify=True)
            nibblecast.verify(source, decoded)
            nibblecast.report(source, reference=decoded).document()
        assert nibblecast.verify(source, source).equal


def test_a_page_has_a_figure_for_them(tmp_path: Path) -> None:
    model = zoo.model([replace(tensor, name=f"{number}") for number, tensor in enumerate(TENSORS[::12])])
    nibblecast.save(model, tmp_path / "in.safetensors")
    nibblecast.report(tmp_path / "in.safetensors", tmp_path / "out.html")
