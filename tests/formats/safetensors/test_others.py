"""Weights that a layout of a library cannot hold: refused, or written as floats where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Quantization, Tensor, grid_shape
from tests import zoo

#: int8 codes of blocks of 5: no block size of AWQ, whose codes have 4 bits.
BLOCKS = (1, 5)


def weight(name: str, dtype: object = np.float32) -> Tensor:
    codes = Tensor.from_array(name, np.random.default_rng(1).integers(-128, 128, (8, 20)).astype(np.int8))
    scale = Tensor.from_array("scale", np.full(grid_shape(codes.shape, BLOCKS), 0.25, dtype))
    return replace(codes, quantization=Quantization(scale, BLOCKS))


@pytest.mark.parametrize("options", [{}, {"others": "refuse"}])
def test_such_a_weight_is_refused_with_what_to_do(options: dict[str, str], tmp_path: Path) -> None:
    model = zoo.model([weight("layer.weight")])
    with pytest.raises(Unsupported, match=r"tensor 'layer\.weight': .*layout awq.*--opt others=dequantize") as refused:
        nibblecast.save(model, tmp_path / "out", to="safetensors", layout="awq", **options)
    assert "--quantize int4" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_such_a_weight_becomes_floats_on_request(dtype: object, tmp_path: Path) -> None:
    source = weight("layer.weight", dtype)
    held = Tensor.from_array("held.weight", np.random.default_rng(2).standard_normal((64, 64), np.float32))
    model = zoo.model([source, held])
    done = nibblecast.save(
        model, tmp_path / "out", to="safetensors", quantize="int4,block=32", layout="awq", others="dequantize"
    )
    assert [(loss.tensor, loss.kind) for loss in done.losses] == [("layer.weight", "dropped")]
    written = nibblecast.load(tmp_path / "out")
    assert written["held.weight"].quantization is not None
    read = written["layer.weight"]
    assert source.quantization is not None
    assert read.quantization is None
    assert read.dtype == source.quantization.compute_dtype
    np.testing.assert_array_equal(read.numpy(), source.dequantize(read.dtype))
