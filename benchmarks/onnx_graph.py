"""A 2.5 GB ONNX model of many int4 layers, its weights moved to another layout and dequantized, against copying."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.measure import Row, seconds_and_peak

_SIZE, _BLOCK, _LAYERS = 4096, 32, 240


def rows(folder: Path) -> list[Row]:
    """QDQ to MatMulNBits, and to float16, each against copying what it writes to the disk."""
    source = _model(folder)
    start = seconds_and_peak([sys.executable, "-c", "import nibblecast, numpy"])[1]
    found = []
    for what, options in (("MatMulNBits", ["--opt", "layout=matmulnbits"]), ("float16", ["--dequantize", "float16"])):
        target = folder / "out.onnx"
        convert = [sys.executable, "-m", "nibblecast", "convert", "--quiet", str(source), str(target), *options]
        ours, peak = seconds_and_peak(convert)
        data = folder / "out.onnx.data"
        copy = ["sh", "-c", f"cp {data} {folder}/copy && sync {folder}/copy"]
        peer = seconds_and_peak(copy)[0]
        name = f"ONNX: {source.with_suffix('.onnx.data').stat().st_size / 1e9:.1f} GB of int4 QDQ to {what}"
        ratio = f"{ours / peer:.1f} times the time"
        found.append(Row(f"{name}, against copying the output", f"{ours:.1f} s", f"{peer:.1f} s", ratio, "at most 3"))
        memory = f"{(peak - start) / 1e6:.0f} MB above the interpreter"
        found.append(Row(f"{name}: peak memory", memory, "", "", "under 500 MB"))
        for path in (target, data, folder / "copy"):
            path.unlink()
    return found


def _model(folder: Path) -> Path:
    """A chain of square layers, (in, out) blocked along the inputs, as onnxruntime's quantizer writes them."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, _SIZE * _SIZE // 2, np.uint8).tobytes()
    scale = (rng.random(_SIZE // _BLOCK * _SIZE, np.float32) / 100).tobytes()
    nodes, initializers, value, end = [], [], "x", 0
    with (folder / "big.onnx.data").open("wb") as data:
        for layer in range(_LAYERS):
            for name, dtype, rows, payload in (
                (f"w{layer}", TensorProto.INT4, _SIZE, weight),
                (f"s{layer}", TensorProto.FLOAT, _SIZE // _BLOCK, scale),
            ):
                tensor = TensorProto(name=name, data_type=dtype, dims=[rows, _SIZE], data_location=TensorProto.EXTERNAL)
                for key, text in (("location", "big.onnx.data"), ("offset", end), ("length", len(payload))):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(text)
                end += data.write(payload)
                initializers.append(tensor)
            inputs = [f"w{layer}", f"s{layer}"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"d{layer}"], axis=0, block_size=_BLOCK))
            nodes.append(helper.make_node("MatMul", [value, f"d{layer}"], [f"y{layer}"]))
            value = f"y{layer}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _SIZE])]
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", _SIZE])]
    graph = helper.make_graph(nodes, "big", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "big.onnx")
    return folder / "big.onnx"
