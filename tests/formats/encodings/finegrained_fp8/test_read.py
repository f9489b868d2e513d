"""float8 weights in blocks with a scale each: values are those of transformers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile
from nibblecast.formats.encodings.checkpoint import is_encoded
from tests.formats.encodings.checkpoints import library_values
from tests.formats.encodings.checkpoints_in_memory import decoded, refused

FLOAT8 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu


def config(block: object = (128, 128), **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": list(block) if isinstance(block, tuple) else block, **more}


def codes(shape: tuple[int, ...], dtype: Any = FLOAT8, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def scales(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 1) -> NDArray[Any]:
    return np.random.default_rng(seed).uniform(0.01, 0.1, shape).astype(dtype)


@settings(max_examples=60)
@given(
    leading=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dtype=st.sampled_from([FLOAT8, ml_dtypes.float8_e5m2]),
    name=st.sampled_from(["m.weight", "experts.gate_up_proj"]),
)
def test_scales_multiply_their_blocks(
    leading: tuple[int, ...], rows: int, columns: int, block: tuple[int, int], dtype: Any, name: str
) -> None:
    weight = codes((*leading, rows, columns), dtype)
    scale = scales((*leading, -(-rows // block[0]), -(-columns // block[1])))
    tensors = decoded({name: weight, f"{name}_scale_inv": scale}, config(block))
    assert list(tensors) == [name]
    spread = scale.repeat(block[0], -2).repeat(block[1], -1)[..., :rows, :columns]
    np.testing.assert_array_equal(tensors[name].dequantize(np.float32), weight.astype(np.float32) * spread)
    np.testing.assert_array_equal(tensors[name].codes().view(np.uint8), weight.view(np.uint8))


@pytest.mark.parametrize("scale", ["m.scale", "m.qscale_weight"])
def test_other_names_of_scales_are_known_where_the_configuration_names_the_method(scale: str) -> None:
    arrays = {"m.weight": codes((4, 6)), scale: scales((2, 3))}
    assert list(decoded(arrays, config((2, 2)))) == ["m.weight"]
    assert list(decoded(arrays)) == list(arrays)


def test_the_scale_of_an_activation_does_not_tell_of_an_encoding() -> None:
    assert not is_encoded(["conv.weight", "conv.scale", "conv.zero_point"])
    assert is_encoded(["m.weight", "m.weight_scale_inv"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, (128, 128)])
def test_one_scale_is_the_tensors(shape: tuple[int, ...], block: object) -> None:
    arrays = {"m.weight": codes((4, 6)), "m.weight_scale_inv": scales(shape).reshape(shape)}
    tensor = decoded(arrays, config(block))["m.weight"]
    assert tensor.granularity == "per-tensor"


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_float4_experts_have_groups_of_32_beside_blocks(dtype: Any) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 32), np.uint8)
    exponents = np.random.default_rng(0).integers(100, 140, (2, 3, 2), np.uint8)
    arrays = {"e.w1.weight": stored.view(dtype), "e.w1.scale": exponents.view(E8M0)}
    tensor = decoded(arrays, config())["e.w1.weight"]
    nibbles = np.stack((stored & 15, stored >> 4), -1).reshape(2, 3, 64)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    wanted = values * np.exp2(exponents.astype(np.float32) - 127).repeat(32, -1)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), wanted)
    assert tensor.dtype == ml_dtypes.float4_e2m1fn


@pytest.mark.parametrize(
    ("arrays", "told", "word"),
    [
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 2))}, config((2, 2)), "(2, 2)"),
        ({"m.weight": codes((5, 6)), "m.weight_scale_inv": scales((2, 3))}, config(None), "None"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((6,))}, config((2, 2)), "(6,)"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((0, 3))}, config(None), "(0, 3)"),
        ({"m.weight": codes((6,)), "m.weight_scale_inv": scales((3,))}, config((2, 2)), "(6,)"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 3), np.float64)}, config((2, 2)), "float64"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 3))}, config((2, 0)), "weight_block_size"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 3))}, config((2, 2, 2)), "weight_block_size"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 3))}, config("2x2"), "weight_block_size"),
        ({"m.weight": codes((4, 6)), "m.weight_scale_inv": scales((2, 3))}, {"quant_method": "gptq"}, "gptq"),
    ],
)
def test_what_does_not_fit_is_refused(arrays: dict[str, Any], told: dict[str, Any], word: str) -> None:
    refused(arrays, told, word, kind=CorruptFile)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shape", "grid", "block", "kind"),
    [
        ((256, 384), (2, 3), (128, 128), "float32"),
        ((256, 384), (2, 3), (128, 128), "bfloat16"),
        ((2, 64, 64), (2, 2, 4), (32, 16), "float32"),
        ((8, 64), (8, 2), (128, 128), "float8_e8m0fnu"),
        ((8, 64), (), None, "float32"),
    ],
)
def test_values_are_those_of_transformers(
    shape: tuple[int, ...], grid: tuple[int, ...], block: object, kind: str
) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = (torch.rand(grid) / 100).to(getattr(torch, kind))
    wanted = finegrained.Fp8Dequantize(None)._dequantize_one(weight, scale)
    stored_scale = scale.view(torch.int16) if kind == "bfloat16" else scale
    if kind == "float8_e8m0fnu":
        stored_scale = scale.view(torch.uint8)
    arrays = {
        "m.weight": weight.view(torch.uint8).numpy().view(FLOAT8),
        "m.weight_scale_inv": stored_scale.numpy().view(
            {"bfloat16": ml_dtypes.bfloat16, "float8_e8m0fnu": E8M0}.get(kind, np.float32)
        ),
    }
    tensor = decoded(arrays, config(block))["m.weight"]
    np.testing.assert_array_equal(library_values(tensor), wanted.float().numpy())
    unrounded = finegrained.Fp8Dequantize(None)._dequantize_one(weight, scale.float())
    np.testing.assert_array_equal(tensor.dequantize(np.float32), unrounded.numpy())
