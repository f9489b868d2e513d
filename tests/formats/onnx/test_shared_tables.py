"""Tables of values that weights of a graph look up: tensors of the model, which stay when no weight needs them."""

from __future__ import annotations

from pathlib import Path

import onnx

import nibblecast
from tests import zoo


def test_a_table_stays_when_the_weights_that_looked_it_up_are_floats(tmp_path: Path) -> None:
    """The graph as another program might have made it: nothing says that the table is no tensor of its own."""
    weights = [tensor for name, tensor in zoo.schemes().items() if name == "codebook of float4"]
    nibblecast.save(zoo.model(weights), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "m.onnx")
    assert "float4_e2m1fn_values" in nibblecast.load(tmp_path / "m.onnx")
    nibblecast.convert(tmp_path / "m.onnx", tmp_path / "floats.onnx", dequantize="float32", verify=True)
    assert "float4_e2m1fn_values" in nibblecast.load(tmp_path / "floats.onnx")
