"""From a .tflite file to C that prints what LiteRT computes for it, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nibblecast.formats.tflite.reader import TFLiteReader
from tests.formats.cheader.c_harness import assert_same_values, walked, write

FIXTURES = sorted((Path(__file__).parents[3] / "fixtures" / "tflite").glob("*.npz"))


@pytest.mark.parametrize("truth", FIXTURES, ids=lambda path: path.stem)
def test_values_are_those_of_litert(tmp_path, truth):
    whole = TFLiteReader().read(truth.with_suffix(".tflite"))
    real = {name: tensor for name, tensor in whole.items() if tensor.dtype.kind != "c"}
    model = replace(whole, tensors=real)
    tensors = walked("gcc c99", write(model, tmp_path / "weights.h"), "weights")
    assert_same_values(tensors, model)
    expected = np.load(truth)
    compared = 0
    for name, values in tensors:
        if f"values/{name}" in expected:
            with np.errstate(over="ignore"):  # float64 has values beyond float32
                wanted = expected[f"values/{name}"].astype(np.float32)
            assert values.tobytes() == wanted.tobytes(), name
            compared += 1
    assert compared
