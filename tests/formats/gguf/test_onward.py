"""GGUF's blocks, once they are read, in every format that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import nibblecast

FIXTURES = Path(__file__).parents[3] / "fixtures" / "gguf"
MODELS = sorted(FIXTURES.glob("*.gguf"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".h"])
def test_scales_and_minima_that_are_quantized_themselves_are_written(path: Path, suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"weights{suffix}"
    comparison = nibblecast.convert(path, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal
    assert comparison.quantized > 0
