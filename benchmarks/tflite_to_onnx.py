"""TFLite to ONNX, whole processes, against tf2onnx on models that both can convert.

tf2onnx needs TensorFlow, so it is looked for in an environment of its own: TF2ONNX_PYTHON is that one's interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx

import nibblecast
from benchmarks.measure import Row, processes_by_turns

FIXTURES = Path(__file__).parent.parent / "fixtures/tflite"
MODELS = ("mlp_float32", "mlp_float16", "mlp_int16x8", "cnn_int8_full")


def rows(folder: Path) -> list[Row]:
    """What each of the models costs, and how good it comes out."""
    peer = os.environ.get("TF2ONNX_PYTHON")
    if peer is None:
        return [Row("TFLite to ONNX", "", "set TF2ONNX_PYTHON to a Python that has tf2onnx and TensorFlow", "")]
    return [row for name in MODELS for row in compared(FIXTURES / f"{name}.tflite", peer, folder)]


def compared(source: Path, peer: str, folder: Path) -> Iterator[Row]:
    """Time, memory, nodes, and the largest difference of an output from LiteRT's."""
    targets = ours, theirs = folder / "ours.onnx", folder / "theirs.onnx"
    commands = (
        [sys.executable, "-m", "nibblecast", "convert", "--quiet", str(source), str(ours)],
        [peer, "-m", "tf2onnx.convert", "--opset", "18", "--tflite", str(source), "--output", str(theirs)],
    )
    (seconds, peak), (peer_seconds, peer_peak) = processes_by_turns(commands, rounds=3)
    ratio = f"{peer_seconds / seconds:.1f} times as fast"
    what = f"{source.stem} to ONNX"
    yield Row(f"{what}, against tf2onnx", f"{seconds:.2f} s", f"{peer_seconds:.2f} s", ratio, "at least 5")
    megabytes = [f"{peak / 1e6:.0f} MB" for peak in (peak, peer_peak)]
    yield Row("- peak memory", *megabytes, f"{peak / peer_peak:.2f}", "at most 0.2")
    nodes = [len(onnx.load(path).graph.node) for path in targets]
    yield Row("- nodes", *map(str, nodes), f"{nodes[0] / nodes[1]:.2f}", "at most 1")
    yield Row("- largest difference from LiteRT", *(_difference(source, path) for path in targets), "")


def _difference(source: Path, converted: Path) -> str:
    try:
        found = nibblecast.compare_outputs(source, converted)
    except nibblecast.Error as error:
        return f"does not run: {error.message.splitlines()[0]:.60}"
    return f"{max(each.largest for each in found):.2g}"
