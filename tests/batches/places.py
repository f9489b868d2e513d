"""The models of the tests of other places than this machine, and what lies there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nibblecast.converters.batches.records import REPORT
from tests.formats.encodings.checkpoints import write_folder

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOOD = [path for path in sorted((FIXTURES / "tflite").glob("*.tflite")) if not path.name.startswith("external_")][:5]
EXTERNAL = FIXTURES / "tflite" / "external_buffer.tflite"
NO_MODELS = ["types_zoo*", "*.weights.bin"]


def write_models(folder: Path) -> Path:
    """Files in folders, a checkpoint's folder, a model with its weights in another file, a broken one, and no model."""
    (folder / "part").mkdir(parents=True)
    for number, path in enumerate(GOOD):
        shutil.copy(path, folder / "part" if number % 2 else folder)
    shutil.copy(EXTERNAL, folder)
    shutil.copy(EXTERNAL.with_suffix(".weights.bin"), folder / "external_buffer.weights.bin")
    weights = {f"layers.{n}.weight": np.full((8, 8), n, np.float32) for n in range(3)}
    write_folder(folder / "part" / "llama", weights, shards=3, config={"model_type": "llama"})
    (folder / "broken.tflite").write_bytes(GOOD[0].read_bytes()[:300])
    (folder / "README.md").write_text("no model")
    return folder


def outputs_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != REPORT}


def objects_of(store: Any, folder: str) -> dict[str, bytes]:
    store.invalidate_cache()
    files = store.find(folder)
    return {name.removeprefix(f"{folder}/"): store.cat_file(name) for name in files if not name.endswith(REPORT)}
