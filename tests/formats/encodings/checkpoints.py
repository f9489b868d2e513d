"""Checkpoints with their truth, and small ones made for a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import converters

FIXTURES = Path(__file__).parents[3] / "fixtures" / "checkpoints"


def cases(prefix: str) -> list[Path]:
    return sorted(FIXTURES.glob(f"{prefix}_*"))


def loaded(case: Path) -> converters.Model:
    pickled = case / "model.pt"
    return converters.load(pickled if pickled.exists() else case)


def check(case: Path) -> converters.Model:
    """Every value and code of the truth, and no tensor beside the float model's."""
    model = loaded(case)
    with np.load(case / "truth.npz") as truth:
        names = {key.partition("/")[2] for key in truth.files}
        for key in truth.files:
            kind, _, name = key.partition("/")
            got = model[name].codes() if kind == "c" else model[name].dequantize(np.float32)
            np.testing.assert_array_equal(got, truth[key], err_msg=key)
            assert got.shape == truth[key].shape, key
    assert all(name in names or name.endswith(".bias") for name in model), list(model)
    return model


def written(folder: Path, tensors: Mapping[str, NDArray[Any]], **files: Any) -> Path:
    """A folder with a checkpoint of these tensors; `files` are JSON documents by their names without suffix."""
    folder.mkdir(exist_ok=True)
    save_file({key: np.array(tensor, order="C") for key, tensor in tensors.items()}, folder / "model.safetensors")
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def refused(folder: Path, message: str) -> None:
    """It is refused in one line that says so, when it is loaded or when it is read."""
    with pytest.raises(converters.Error, match=message) as caught:
        _read_all(folder)
    assert "\n" not in str(caught.value)


def _read_all(folder: Path) -> None:
    for tensor in converters.load(folder).values():
        tensor.dequantize(np.float32)
