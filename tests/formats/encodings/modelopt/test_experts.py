"""Fused experts of ModelOpt, in the layouts that its exporters write."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.encodings.checkpoints_in_memory import decoded, refused

FLOAT4 = ml_dtypes.float4_e2m1fn
FLOAT8 = ml_dtypes.float8_e4m3fn
NAME = "model.layers.0.mlp.experts.gate_up_proj"


def config(algorithm: str = "", **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", **({"quant_algo": algorithm} if algorithm else {}), **more}


def nvfp4(
    experts: int, inputs: int, outputs: int, *, transposed: bool, outer: tuple[int, ...] = ()
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """The tensors of experts whose nibbles are packed along the inputs, as (E, O, I) and then transposed or not, and
    the values."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (experts, outputs, inputs), np.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    scale = random.uniform(0.5, 2, (experts, outputs, inputs // 16)).astype(FLOAT8)
    nested = random.uniform(0.5, 2, outer).astype(np.float32).reshape(outer)
    of_expert = nested.reshape((-1, 1, 1) if nested.size > 1 else ())
    values = codes.view(FLOAT4).astype(np.float32) * (scale.astype(np.float32) * of_expert).repeat(16, -1)
    if transposed:
        packed, scale, values = (np.ascontiguousarray(each.swapaxes(1, 2)) for each in (packed, scale, values))
    arrays = {NAME: packed, f"{NAME}_weight_scale": scale, f"{NAME}_weight_scale_2": nested}
    return arrays | {f"{NAME}_input_scale": np.ones((), np.float32)}, values


@settings(max_examples=40)
@given(
    experts=st.integers(1, 3),
    blocks=st.integers(1, 3),
    outputs=st.integers(1, 9),
    transposed=st.booleans(),
    of_experts=st.booleans(),
)
def test_nvfp4_in_both_orientations(
    experts: int, blocks: int, outputs: int, transposed: bool, of_experts: bool
) -> None:
    outer = (experts,) if of_experts else ()
    arrays, values = nvfp4(experts, blocks * 16, outputs, transposed=transposed, outer=outer)
    tensors = decoded(arrays, config("NVFP4", group_size=16))
    assert list(tensors) == [NAME, f"{NAME}_input_scale"]
    tensor = tensors[NAME]
    assert (tensor.shape, tensor.dtype) == (values.shape, np.dtype(FLOAT4))
    np.testing.assert_array_equal(tensor.dequantize(np.float32), values)
    step = tensor.row_step
    if tensor.shape[0] > 1:
        rows = [tensor.rows(start, min(start + step, experts)) for start in range(0, experts, step)]
        np.testing.assert_array_equal(np.concatenate([part.dequantize(np.float32) for part in rows]), values)


def test_the_scales_of_a_single_expert_have_lost_an_axis() -> None:
    arrays, values = nvfp4(1, 32, 6, transposed=True)
    arrays[f"{NAME}_weight_scale"] = arrays[f"{NAME}_weight_scale"][0]
    np.testing.assert_array_equal(decoded(arrays, config("NVFP4"))[NAME].dequantize(np.float32), values)


@pytest.mark.parametrize("algorithm", ["MXFP4", "MXFP8"])
def test_exponents_are_along_the_last_axis(algorithm: str) -> None:
    random = np.random.default_rng(0)
    exponents = random.integers(110, 140, (2, 3, 2), np.uint8)
    if algorithm == "MXFP4":
        stored = random.integers(0, 256, (2, 3, 32), np.uint8)
        codes = np.stack((stored & 15, stored >> 4), -1).reshape(2, 3, 64).view(FLOAT4).astype(np.float32)
    else:
        stored = random.standard_normal((2, 3, 64)).astype(FLOAT8)
        codes = stored.astype(np.float32)
    tensor = decoded({NAME: stored, f"{NAME}_weight_scale": exponents}, config(algorithm))[NAME]
    wanted = codes * np.exp2(exponents.astype(np.float32) - 127).repeat(32, -1)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), wanted)


@pytest.mark.parametrize(
    ("scales", "axes"),
    [
        ((), ()),
        ((1,), ()),
        ((2,), (2, 1, 1)),
        ((2, 1, 1), (2, 1, 1)),
        ((2, 4), (2, 4, 1)),
        ((2, 6), (2, 1, 6)),
        ((2, 1, 6), (2, 1, 6)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_fp8_scales_are_of_what_their_shape_tells(scales: tuple[int, ...], axes: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(FLOAT8)
    scale = np.random.default_rng(1).random(scales).astype(np.float32).reshape(scales)
    tensor = decoded({NAME: codes, f"{NAME}_weight_scale": scale}, config("FP8"))[NAME]
    np.testing.assert_array_equal(tensor.dequantize(np.float32), codes.astype(np.float32) * scale.reshape(axes))


@pytest.mark.parametrize(
    ("arrays", "told", "word", "kind"),
    [
        (nvfp4(2, 32, 5, transposed=True)[0], config("FP8"), "'FP8'", CorruptFile),
        (nvfp4(2, 32, 5, transposed=True)[0], config("NVFP4", group_size=32), "32", CorruptFile),
        (nvfp4(2, 32, 5, transposed=True)[0], {"quant_method": "gptq"}, "gptq", CorruptFile),
        (
            nvfp4(2, 32, 5, transposed=True)[0] | {f"{NAME}_weight_scale": np.ones((2, 3, 5), FLOAT8)},
            config(),
            "(2, 3, 5)",
            CorruptFile,
        ),
        (
            {NAME: np.ones((2, 4, 4), FLOAT8), f"{NAME}_weight_scale": np.ones((2, 4), np.float32)},
            config(),
            "either axis",
            Unsupported,
        ),
        (
            {NAME: np.ones((2, 4, 6), FLOAT8), f"{NAME}_weight_scale": np.ones((2, 5), np.float32)},
            config(),
            "(2, 5)",
            CorruptFile,
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    arrays: dict[str, Any], told: dict[str, Any], word: str, kind: type[Error]
) -> None:
    refused(arrays, told, word, kind=kind)


def test_the_outer_scale_must_be_there() -> None:
    arrays = {key: value for key, value in nvfp4(2, 32, 5, transposed=True)[0].items() if not key.endswith("_2")}
    refused(arrays, config(), "_weight_scale_2", kind=CorruptFile)
