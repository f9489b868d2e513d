"""Floats to 4-bit codes against onnxruntime's quantizers of weights: the time, and the mean square error."""

from __future__ import annotations

import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import nibblecast
from benchmarks.measure import Row, by_turns
from nibblecast.converters.ir import Tensor
from nibblecast.converters.stages.quantize import quantized
from nibblecast.converters.stages.scheme import parse_scheme

_SHAPE = (4096, 4096)
_LAYERS, _WIDTH = 12, 2048


def rows(folder: Path) -> list[Row]:
    """One matrix in memory, in either layout, and a whole model from file to file."""
    return [*_matrix(), *_model(folder)]


def _matrix() -> list[Row]:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    array = np.random.default_rng(0).standard_normal(_SHAPE, np.float32)
    tensor = Tensor.from_array("W", array)
    found = []
    for block, symmetric, scales in (
        (32, True, ""),
        (32, False, ""),
        (128, True, ""),
        (128, False, ""),
        (32, True, ",mse"),
    ):
        text = f"int4,block={block},axis=0,{'symmetric' if symmetric else 'asymmetric'}{scales}"
        peer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric))
        seconds = by_turns(lambda: _ours(tensor, text), lambda: peer.qbits_block_quant(array), rounds=5)  # noqa: B023
        errors = _error(array, _ours(tensor, text).dequantize()), _error(array, _decoded(peer, array))
        what = f"quantize a matrix of {_SHAPE[0]} x {_SHAPE[1]} to {text}, against onnxruntime's kernel"
        found.append(_seconds(what, *seconds, "" if scales else "at least 1"))
        shown = f"{errors[0]:.6f}", f"{errors[1]:.6f}", f"{errors[0] / errors[1]:.4f}"
        found.append(Row("- mean square error of that", *shown, "at most 1"))
    return found


def _ours(plain: Tensor, text: str) -> Tensor:
    """The quantized matrix, its codes and parameters computed, and their error measured."""
    tensor = quantized(plain, parse_scheme(text))
    tensor.packed()
    assert tensor.quantization is not None
    for _, parameter in tensor.quantization.parameters():
        parameter.packed()
    return tensor


def _decoded(quantizer: Any, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """What onnxruntime's codes stand for: they lie by columns, low nibble first, zero points likewise."""
    packed, scales, zero_points = quantizer.qbits_block_quant(array)
    columns, blocks, _ = packed.shape
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(columns, blocks, -1).astype(np.float32)
    zero = np.full((columns, blocks), 8, np.float32)
    if not quantizer.config.is_symmetric:
        zero = (
            np.stack([zero_points & 15, zero_points >> 4], axis=-1).reshape(columns, -1)[:, :blocks].astype(np.float32)
        )
    values = (codes - zero[:, :, None]) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(columns, -1)[:, : array.shape[0]].T)


def _error(array: NDArray[np.float32], values: NDArray[np.float32]) -> float:
    return float(np.square(array - values).mean(dtype=np.float64))


def _model(folder: Path) -> list[Row]:
    from onnxruntime.quantization import matmul_nbits_quantizer as peer

    logging.disable(logging.INFO)  # a line for each node
    source = folder / "chain.onnx"
    onnx.save(_chain(), source)

    def ours() -> None:
        nibblecast.convert(source, folder / "ours.onnx", quantize="int4,block=32")

    def theirs() -> None:
        config = peer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True)
        quantizer = peer.MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "theirs.onnx"))

    def rtn() -> None:
        quantizer = peer.MatMulNBitsQuantizer(
            onnx.load(source), block_size=32, is_symmetric=True, algo_config=peer.RTNWeightOnlyQuantConfig()
        )
        with redirect_stdout(StringIO()):  # a progress bar
            quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "rtn.onnx"))

    size = f"{_LAYERS} matrices of {_WIDTH} x {_WIDTH}"
    what = f"quantize an ONNX file of {size} to int4, block=32, against onnxruntime's"
    found = [
        _seconds(f"{what} default quantizer", *by_turns(ours, theirs, rounds=3), "at least 1"),
        _seconds(f"{what} RTN quantizer", *by_turns(ours, rtn, rounds=3), "at least 1"),
    ]
    logging.disable(logging.NOTSET)
    return found


def _chain() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((_WIDTH, _WIDTH), np.float32) for _ in range(_LAYERS)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"W{i}"], [f"x{i + 1}"]) for i in range(_LAYERS)]
    ends = [helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, [1, _WIDTH]) for i in (0, _LAYERS)]
    initializers = [numpy_helper.from_array(array, f"W{i}") for i, array in enumerate(arrays)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def _seconds(what: str, ours: float, peer: float, wanted: str) -> Row:
    return Row(what, f"{ours * 1e3:.0f} ms", f"{peer * 1e3:.0f} ms", f"{peer / ours:.1f}", wanted)
