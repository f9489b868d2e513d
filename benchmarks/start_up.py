"""What the command costs before it does anything."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import Row, by_turns, command

MODEL = Path(__file__).parent.parent / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"


def rows(folder: Path) -> list[Row]:
    """A whole conversion of a small model against importing NumPy, process for process."""
    found = []
    for suffix, wanted in ((".h", "at most 2.5"), (".safetensors", ""), (".onnx", "")):
        convert = [sys.executable, "-m", "nibblecast", "convert", str(MODEL), str(folder / f"w{suffix}")]
        ours, peer = by_turns(command(convert), command([sys.executable, "-c", "import numpy"]), rounds=15)
        what = f"start-up: convert a 3 KB .tflite to {suffix}, against `python -c 'import numpy'`"
        found.append(Row(what, f"{ours * 1e3:.0f} ms", f"{peer * 1e3:.0f} ms", f"{ours / peer:.2f}", wanted))
    return found
