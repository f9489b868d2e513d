"""Small ONNX graphs made with the official package, numbers that add exactly, and what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

node = helper.make_node


def info(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape or None)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[TensorProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    opset: int = 21,
    ir_version: int = 10,
    **fields: object,
) -> Path:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("acme", 3)]
    model = helper.make_model(graph, **{"opset_imports": opsets, "ir_version": ir_version, **fields})
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def random(shape: tuple[int, ...], dtype: object, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    limits = ml_dtypes.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def positive(shape: tuple[int, ...], seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    """Powers of two: products of them and small integers are exact in any order of addition."""
    return (2.0 ** np.random.default_rng(seed).integers(-3, 2, shape)).astype(dtype)


def x(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(9).integers(-4, 5, (rows, columns)).astype(np.float32)
