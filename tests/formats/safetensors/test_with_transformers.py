"""Folders of floats that we write are what transformers loads, and compute what the quantized model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nibblecast
from tests.formats.safetensors.transformers_models import logits_of, tiny_gpt_oss, tiny_llama

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def test_a_model_that_is_only_copied_computes_the_same(llama: Path, tmp_path: Path) -> None:
    nibblecast.convert(llama, tmp_path / "copy", to="safetensors", shard_size="100K")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    dtype, logits = logits_of(tmp_path / "copy")
    assert dtype == "torch.bfloat16"
    np.testing.assert_array_equal(logits, logits_of(llama)[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dequantized_weights_are_loaded_in_their_dtype(dtype: str, llama: Path, tmp_path: Path) -> None:
    quantize = "int4,block=32,scale=bfloat16,except=*embed*|lm_head*"
    nibblecast.convert(llama, tmp_path / "int4", to="safetensors", quantize=quantize)
    nibblecast.convert(tmp_path / "int4", tmp_path / "floats", to="safetensors", dequantize=dtype, verify=True)
    loaded, logits = logits_of(tmp_path / "floats")
    assert loaded == f"torch.{dtype}"
    exact = logits_of(llama)[1]
    assert 0 < np.abs(logits - exact).mean() < 0.2 * np.abs(exact).mean()


def test_gpt_oss_computes_what_transformers_makes_of_its_blocks(tmp_path: Path) -> None:
    source = tiny_gpt_oss(tmp_path / "mxfp4")
    nibblecast.convert(source, tmp_path / "floats", to="safetensors", dequantize="bfloat16", verify=True)
    np.testing.assert_array_equal(logits_of(tmp_path / "floats")[1], logits_of(source, "dequantize-mxfp4")[1])
