"""Weights in training: which codes a fake quantizer stands for, by what its module says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, UsageError
from tests.formats.pytorch.pickle.bombs import fake_quantized, pushed, saved

#: A scale of 1, and weights that begin with it: the first six are 1, -6, -5, -4, -3, -2.
STORED = np.concatenate([[1.0], np.arange(-6, 1018)]).astype(np.float32)[:1024]


def model(path: Path, **settings: int) -> Path:
    path.write_bytes(saved(fake_quantized(**{k: pushed(v) for k, v in settings.items()}), **{"0": STORED.tobytes()}))
    return path


@pytest.mark.parametrize(
    ("lowest", "highest", "dtype", "codes"),
    [
        (-8, 7, "int4", [1, -6, -5, -4, -3, -2]),
        (-4, 0, "int4", [0, -4, -4, -4, -3, -2]),
        (-128, 127, "int8", [1, -6, -5, -4, -3, -2]),
        (0, 3, "uint2", [1, 0, 0, 0, 0, 0]),
    ],
)
def test_the_limits_that_a_module_has_are_those_of_its_codes(
    lowest: int, highest: int, dtype: str, codes: list[int], tmp_path: Path
) -> None:
    read = nibblecast.load(model(tmp_path / "m.pt", quant_min=lowest, quant_max=highest))
    (weight,) = (tensor for tensor in read.values() if tensor.quantization is not None)
    assert weight.dtype.name == dtype
    assert weight.codes().astype(int).reshape(-1).tolist() == codes


def test_limits_that_no_dtype_holds(tmp_path: Path) -> None:
    for lowest, highest in ((7, -8), (-(1 << 40), 7), (0, 1 << 40)):
        with pytest.raises(CorruptFile, match=f"codes from {lowest} to {highest}, a range"):
            nibblecast.load(model(tmp_path / "m.pt", quant_min=lowest, quant_max=highest))


def test_without_limits_nothing_is_guessed(tmp_path: Path) -> None:
    """Unless the option says how many bits there are."""
    source = model(tmp_path / "m.pt")
    read = nibblecast.load(source)
    assert all(tensor.quantization is None for tensor in read.values())
    assert any("--opt bits=" in loss.detail for loss in read.losses)
    nibblecast.convert(source, tmp_path / "m.safetensors", bits=2)
    (weight,) = nibblecast.load(tmp_path / "m.safetensors").values()
    assert weight.dtype.name == "int2"
    assert weight.codes().astype(int).reshape(-1).tolist() == [1, -2, -2, -2, -2, -2]


@pytest.mark.parametrize("bits", [0, -1, 1, 9, 17, 64])
def test_bits_that_cannot_be(bits: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"bits: {bits} "):
        nibblecast.convert(model(tmp_path / "m.pt"), tmp_path / "m.safetensors", bits=bits)
