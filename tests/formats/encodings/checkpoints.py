"""Checkpoints with their truth, and small ones made for a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from nibblecast.formats.safetensors.container import DTYPES

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
FIXTURES = Path(__file__).parents[3] / "fixtures" / "checkpoints"


def cases(prefix: str) -> list[Path]:
    return sorted(FIXTURES.glob(f"{prefix}_*"))


def loaded(case: Path) -> nibblecast.Model:
    pickled = case / "model.pt"
    return nibblecast.load(pickled if pickled.exists() else case)


def check(case: Path) -> nibblecast.Model:
    """Every value and code of the truth, and no tensor beside the float model's."""
    model = loaded(case)
    with np.load(case / "truth.npz") as truth:
        names = {key.partition("/")[2] for key in truth.files}
        for key in truth.files:
            kind, _, name = key.partition("/")
            got = model[name].codes() if kind == "c" else library_values(model[name])
            np.testing.assert_array_equal(got, truth[key], err_msg=key)
            assert got.shape == truth[key].shape, key
    assert all(name in names or name.endswith(".bias") for name in model), list(model)
    return model


def library_values(tensor: nibblecast.Tensor) -> NDArray[np.float32]:
    """The values as the producing library has them, rounded to its dtype, as float32."""
    quantization = tensor.quantization
    dtype = None if quantization is None else quantization.value_dtype
    return tensor.dequantize(dtype or np.float32).astype(np.float32)


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


def refused(folder: Path, message: str) -> None:
    """It is refused in one line that says so, when it is loaded or when it is read."""
    with pytest.raises(nibblecast.Error, match=message) as caught:
        _read_all(folder)
    assert "\n" not in str(caught.value)


def _read_all(folder: Path) -> None:
    for tensor in nibblecast.load(folder).values():
        tensor.dequantize(np.float32)
