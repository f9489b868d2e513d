"""Operators that older operator sets lack are spelled out: ONNX Runtime computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.options import OPTIONS
from tests.formats.onnx.writing.onnx_graphs import run
from tests.formats.tflite.models import ints, operator, subgraph, table, tensor, whole


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(approximate: bool, tmp_path: Path) -> None:
    options = {OPTIONS["GELU"]["approximate"].slot: np.bool_(approximate)}
    graph = subgraph(
        [tensor("x", "FLOAT32", (9,)), tensor("y", "FLOAT32", (9,))],
        [operator(0, [0], [1], builtin_options=options)],
        [0],
    ) | table(schema.SubGraph, outputs=ints(1))
    (tmp_path / "m.tflite").write_bytes(whole([graph], [b""], ["GELU"]))
    values = np.linspace(-3, 3, 9, dtype=np.float32)
    found = []
    for opset in (17, 21):
        nibblecast.convert(tmp_path / "m.tflite", tmp_path / f"{opset}.onnx", opset=opset)
        found.append(run(tmp_path / f"{opset}.onnx", x=values)[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert abs(float(found[0][-1]) - 2.9963) < 1e-3
