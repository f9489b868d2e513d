"""Writes checkpoint folders for the tests: tensors by key, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats.safetensors.container import DTYPES

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def write_file(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> Path:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for key, array in tensors.items():
        header[key] = {
            "dtype": _KINDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_folder(
    folder: Path, tensors: Mapping[str, NDArray[Any]], *, shards: int = 1, **configurations: Mapping[str, Any]
) -> Path:
    """A folder of a checkpoint; `config={...}` becomes config.json, and so on."""
    folder.mkdir(exist_ok=True)
    for name, document in configurations.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    keys = list(tensors)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = {key: tensors[key] for key in keys[number::shards]}
        write_file(folder / name, own)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": {key: weight_map[key] for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
