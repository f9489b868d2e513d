"""Small ONNX models made with the official package, and what reads and writes ours."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nibblecast.converters.ir import Model
from nibblecast.formats.onnx.options import OnnxOptions
from nibblecast.formats.onnx.reader import OnnxReader
from nibblecast.formats.onnx.writer import OnnxWriter
from nibblecast.formats.onnx.writing.files import OnnxPlan
from tests import zoo

INT4_CODES = np.arange(-8, 7, dtype=np.int8).reshape(3, 5).astype(ml_dtypes.int4)


def save(path: Path, nodes=(), initializers=(), outputs=("y",), inputs=(), **fields) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=13, producer_name="test", **fields)
    path.write_bytes(model.SerializeToString())
    return path


def read(path: Path) -> Model:
    return OnnxReader().read(path)


def write(model: Model, path: Path, options: OnnxOptions | None = None) -> OnnxPlan:
    return zoo.write(OnnxWriter(), model, path, options or OnnxOptions())


def raw(name: str, array: np.ndarray) -> TensorProto:
    tensor = numpy_helper.from_array(array, name)
    assert tensor.HasField("raw_data")
    return tensor


def linear(*inputs: str, output: str = "y", **attributes) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", list(inputs), [output], **attributes)
