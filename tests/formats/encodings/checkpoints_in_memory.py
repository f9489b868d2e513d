"""Checkpoints in memory, fixtures with what their libraries decode, and what is wrong with hostile ones."""

from pathlib import Path

import numpy as np

import nibblecast
from nibblecast.converters.errors import Error
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from tests.formats.encodings.checkpoints import library_values

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "checkpoints"


def decoded(arrays, config=None):
    tensors, _ = decode_checkpoint(Checkpoint({k: Tensor.from_array(k, v) for k, v in arrays.items()}, config or {}))
    return tensors


def refused(arrays, config, *words, kind=Error):
    """The error has one line, which has the words in it."""
    try:
        tensors = decoded(arrays, config)
        for tensor in tensors.values():
            tensor.dequantize(np.float32)
    except kind as error:
        assert "\n" not in str(error)
        assert "tensor '" in str(error)
        for word in words:
            assert word in str(error), str(error)
    else:
        raise AssertionError(f"it was read: {list(tensors)}")


def check_fixture(folder):
    """Codes and values are those of the library, whole and row by row."""
    model = nibblecast.load(folder)
    with np.load(folder / "truth.npz") as truth:
        for key, wanted in truth.items():
            tensor = model[key[2:]]
            if key.startswith("c/"):
                np.testing.assert_array_equal(tensor.codes(), wanted, key)
                continue
            np.testing.assert_array_equal(library_values(tensor), wanted, key)
            step = tensor.row_step
            rows = [tensor.rows(start, min(start + step, tensor.shape[0])) for start in range(0, tensor.shape[0], step)]
            np.testing.assert_array_equal(np.concatenate([library_values(part) for part in rows]), wanted, key)
    return model
