"""The SHA-256 of what a small set of conversions writes: one of each reader to each writer. A table holds them.

    python -m tests.every_format.digests

writes the table anew. Do so when outputs are meant to change: a format's writer, a new version, or a new fixture. The
difference of the table then shows in the review which outputs are others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibblecast

TABLE = Path(__file__).parent / "digests.json"
FIXTURES = Path(__file__).parents[2] / "fixtures"
#: A model for each reader, by its name in what is written; the C is made of the first one.
SOURCES = {
    "model.tflite": "tflite/mlp_int4_blockwise.tflite",
    "model.onnx": "onnx/matmul_nbits.onnx",
    "model.pt": "pytorch/dynamic_qint8_state_dict.pt",
    "model.gguf": "gguf/types.gguf",
    "model.safetensors": "checkpoints/mlx",
    "model.h": "",
}
#: A target for each writer.
TARGETS = ("out.h", "out.gguf", "out.onnx", "out.safetensors")


def write(folder: Path) -> None:
    """Writes all conversions below a folder, each into a folder of its own."""
    for name, fixture in SOURCES.items():
        source = folder / "sources" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        if not fixture:
            nibblecast.convert(source.with_name("model.tflite"), source)
        elif (FIXTURES / fixture).is_dir():
            shutil.copytree(FIXTURES / fixture, source)
        else:
            shutil.copy(FIXTURES / fixture, source)
        for target in TARGETS:
            _convert(source, folder / f"{name} to {target}" / target)


def _convert(source: Path, target: Path) -> None:
    """As codes; as float16 where the format cannot hold these codes."""
    target.parent.mkdir()
    options: dict[str, Any] = {}
    try:
        nibblecast.convert(source, target, dry_run=True)
    except nibblecast.Error:
        options = {"dequantize": "float16"}
    nibblecast.convert(source, target, **options)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that `write` has written."""
    written = sorted(path for path in folder.glob("* to */*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


def main() -> None:
    """Writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        TABLE.write_text(json.dumps(digests(Path(folder)), indent=0) + "\n")


if __name__ == "__main__":
    main()
