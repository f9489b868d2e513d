"""`python -m benchmarks [TOPIC ...]`: runs all topics, or those named, and puts their tables into README.md."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import (
    batch,
    c_compile,
    c_text,
    checkpoints,
    dequantize,
    onnx_graph,
    pytorch,
    quantize,
    start_up,
    tflite_to_onnx,
)
from benchmarks.measure import table

ROOT = Path(__file__).parent.parent
README = Path(__file__).parent / "README.md"
#: The topics by name; those whose files lie in memory where that can be, so that nothing waits for the disk.
TOPICS = {
    "start_up": start_up,
    "c_text": c_text,
    "c_compile": c_compile,
    "dequantize": dequantize,
    "quantize": quantize,
    "onnx_graph": onnx_graph,
    "tflite_to_onnx": tflite_to_onnx,
    "pytorch": pytorch,
    "checkpoints": checkpoints,
    "batch": batch,
}
IN_MEMORY = ("c_text", "c_compile")
MEMORY = Path("/dev/shm")


def main(names: list[str]) -> None:
    """Runs these topics; all when there are none."""
    unknown = set(names) - TOPICS.keys()
    if unknown:
        sys.exit(f"no topic is called {', '.join(sorted(unknown))}: there are {', '.join(TOPICS)}")
    os.chdir(ROOT)
    for name in names or TOPICS:
        in_memory = name in IN_MEMORY and MEMORY.is_dir()
        with tempfile.TemporaryDirectory(dir=MEMORY if in_memory else None) as folder:
            text = table(TOPICS[name].rows(Path(folder)))
        print(text)
        _put_into_readme(name, f"{text}\n\nMeasured on {_machine()}.")


def _machine() -> str:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{system}, Python {platform.python_version()}, NumPy {np.__version__}"


def _put_into_readme(name: str, text: str) -> None:
    """Between the marks of the topic."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{start}.*{end}", re.DOTALL)
    README.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
