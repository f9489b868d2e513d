"""HQQ: its own values, and files that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from tests.formats.encodings import checkpoints


def setting(value: Any) -> NDArray[Any]:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    return np.array(value, np.int64 if isinstance(value, list) else np.int32)


def tensors(**changed: Any) -> dict[str, NDArray[Any]]:
    """Four rows of eight codes in groups of 8; settings are encoded, arrays are not; None leaves one out."""
    parts: dict[str, Any] = {
        "W_q": np.arange(16, dtype=np.uint8).reshape(2, 8),
        "scale": np.full((4, 1), 0.5, np.float32),
        "zero": np.full((4, 1), 7.5, np.float32),
        "nbits": 4,
        "group_size": 8,
        "shape": [4, 8],
        "axis": 1,
        "packing": "4bit_u8",
        "compute_dtype": "torch.float32",
        **changed,
    }
    return {
        f"fc.{key}": value if isinstance(value, np.ndarray) else setting(value)
        for key, value in parts.items()
        if value is not None
    }


@pytest.mark.parametrize("case", checkpoints.cases("hqq"), ids=lambda case: case.name)
def test_values_and_codes_are_those_of_hqq(case: Path) -> None:
    checkpoints.check(case)


@pytest.mark.parametrize("case", checkpoints.cases("hqq"), ids=lambda case: case.name)
def test_they_survive_to_safetensors_and_back(case: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "weights.safetensors", case / "model.pt"
    comparison = nibblecast.convert(source if source.exists() else case, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal


def test_the_first_rows_are_in_the_high_nibbles(tmp_path: Path) -> None:
    weight = nibblecast.load(checkpoints.write_folder(tmp_path, tensors()))["fc.weight"]
    assert weight.codes()[0].tolist() == [0] * 8
    assert weight.codes()[2].tolist() == list(range(8))
    assert weight.dequantize(np.float32)[2, 1] == (1 - 7.5) * 0.5


def test_only_what_fits_no_blocks_is_expanded() -> None:
    model = checkpoints.loaded(checkpoints.FIXTURES / "hqq_f16")
    assert {loss.tensor for loss in model.losses} == {"across.weight", "expanded.weight"}
    strided = model["every_third_row.weight"].quantization
    assert strided is not None
    assert strided.group_index is not None
    assert strided.scale.shape == (3, 16)


def test_one_scale_for_all(tmp_path: Path) -> None:
    one = {"scale": np.full((), 2, np.float32), "zero": np.full((), 1, np.float32)}
    weight = nibblecast.load(checkpoints.write_folder(tmp_path, tensors(**one)))["fc.weight"]
    assert weight.granularity == "per-tensor"
    assert weight.dequantize(np.float32)[2, 3] == 4


def test_scale_and_zero_may_be_one_tensor(tmp_path: Path) -> None:
    both = np.stack([np.full((4, 1), 1, np.float32), np.full((4, 1), 3, np.float32)])
    folder = checkpoints.write_folder(tmp_path, tensors(scale=None, zero=None, zero_scale=both))
    assert nibblecast.load(folder)["fc.weight"].dequantize(np.float32)[2, 3] == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": None}, "no 'fc.scale'"),
        ({"scale": np.zeros((3, 1), np.float32)}, "3 of scale for 4 blocks"),
        ({"zero": np.zeros((4, 1), np.int32)}, "floats are needed"),
        ({"zero_q": np.zeros((4, 1), np.uint8)}, "'zero_q'"),
        ({"shape": [4, 9]}, "for a weight of shape"),
        ({"shape": [1 << 40, 1 << 10]}, "for a weight of shape"),
        ({"shape": [1 << 40, 1 << 40]}, "larger than any memory"),
        ({"shape": [4, -8]}, "positive numbers"),
        ({"shape": None}, "shape None"),
        ({"nbits": 8}, "nbits 8"),
        ({"nbits": 0}, "nbits 0"),
        ({"packing": "5bit_u8"}, "packing '5bit_u8'"),
        ({"packing": None}, "packing None"),
        ({"packing": "2bit_u8", "nbits": 2}, "for a weight of shape"),
        ({"axis": 2}, "axis 2"),
        ({"axis": None}, "axis None"),
        ({"group_size": 16}, "groups of 8, but group_size 16"),
        ({"compute_dtype": "torch.float64"}, "compute_dtype"),
        ({"compute_dtype": np.zeros(1000, np.uint8)}, "a setting is needed"),
        ({"W_q": np.zeros((), np.uint8)}, "W_q of shape"),
        ({"W_q": np.zeros((0, 8), np.uint8)}, "W_q of shape"),
        ({"W_q": np.zeros((2, 0), np.uint8)}, "W_q of shape"),
        ({"scale": None, "zero": None, "zero_scale": np.zeros((3, 4), np.float32)}, "zero_scale of shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(**changed)), message)


def test_a_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq"}}
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(), config=config), "quant_method 'awq'")


def test_scales_beyond_the_dtype_that_is_computed_in_are_infinite(tmp_path: Path) -> None:
    """Found by random damage: NumPy warned of it."""
    folder = checkpoints.write_folder(tmp_path, tensors(scale=np.full((4, 1), 1e300)))
    assert np.isinf(nibblecast.load(folder)["fc.weight"].dequantize(np.float32)).all()
