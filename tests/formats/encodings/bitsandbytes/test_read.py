"""bitsandbytes' 4-bit weights: its own values, sums done by hand, and files that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from tests.formats.encodings import checkpoints

STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 32]}
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def text(state: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def tensors(state: Any = STATE, **changed: np.ndarray | None) -> dict[str, np.ndarray]:
    parts = {
        "fc.weight": np.arange(64, dtype=np.uint8)[:, None],
        "fc.weight.absmax": np.array([0.5, 2], np.float32),
        "fc.weight.quant_map": np.linspace(-1, 1, 16).astype(np.float32),
        "fc.weight.quant_state.bitsandbytes__nf4": text(state),
    }
    parts |= {f"fc.weight{key.replace('__', '.', 1)}": value for key, value in changed.items() if value is not None}
    return {
        key: value for key, value in parts.items() if changed.get(key.replace("fc.weight.", "__", 1), 0) is not None
    }


@pytest.mark.parametrize("case", checkpoints.cases("bitsandbytes"), ids=lambda case: case.name)
def test_values_and_codes_are_those_of_bitsandbytes(case: Path) -> None:
    checkpoints.check(case)


@pytest.mark.parametrize("case", checkpoints.cases("bitsandbytes"), ids=lambda case: case.name)
def test_they_survive_to_safetensors_and_back(case: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    comparison = nibblecast.convert(case, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal
    rounded = [
        {
            name: tensor.quantization and tensor.quantization.value_dtype
            for name, tensor in nibblecast.load(path).items()
        }
        for path in (case, target)
    ]
    assert rounded[0] == rounded[1]


def test_the_high_nibble_is_first(tmp_path: Path) -> None:
    weight = nibblecast.load(checkpoints.write_folder(tmp_path, tensors()))["fc.weight"]
    assert weight.dtype == ml_dtypes.uint4
    assert weight.codes()[0, :6].tolist() == [0, 0, 0, 1, 0, 2]
    assert weight.quantization is not None
    assert weight.quantization.block_shape == (2, 32)
    assert weight.dequantize(np.float32)[2, 0] == 2 * np.linspace(-1, 1, 16).astype(np.float32)[2]


def test_what_is_expanded_is_a_loss() -> None:
    model = checkpoints.loaded(checkpoints.FIXTURES / "bitsandbytes_nf4")
    assert {loss.tensor for loss in model.losses} == {"across.weight", "odd.weight"}
    assert {loss.kind for loss in model.losses} == {"expanded"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"__absmax": None}, "no tensor 'fc.weight.absmax'"),
        ({"__absmax": np.zeros(3, np.float32)}, "3 of fc.weight.absmax for 2 blocks"),
        ({"__absmax": np.zeros(2, np.uint8)}, "without nested"),
        ({"__absmax": np.zeros(2, np.float16)}, "float32 is needed"),
        ({"__nested_absmax": np.zeros(1, np.float32)}, "with nested"),
        ({"__quant_map": np.zeros(15, np.float32)}, "16 of float32"),
        ({"": np.zeros(63, np.uint8)}, "63 bytes of codes"),
        ({"": np.zeros(66, np.float16)}, "132 bytes of codes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(**changed)), message)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "not a JSON object: it is"),
        ({**STATE, "quant_type": "fp4"}, "says otherwise"),
        ({**STATE, "blocksize": 0}, "blocksize 0"),
        ({**STATE, "blocksize": "64"}, "blocksize '64'"),
        ({**STATE, "blocksize": 1 << 60}, "blocksize"),
        ({**STATE, "dtype": "float64"}, "dtype 'float64'"),
        ({**STATE, "shape": [4, -32]}, "shape"),
        ({**STATE, "shape": [1 << 40, 1 << 10]}, "bytes of codes"),
        ({**STATE, "shape": [1 << 40, 1 << 40]}, "larger than any memory"),
        ({**STATE, "shape": None}, "shape None"),
        ({**STATE, "nested_blocksize": 256}, "without nested"),
        ({**STATE, "nested_blocksize": 256, "nested_offset": "0"}, "nested_offset"),
    ],
)
def test_a_state_that_lies_is_refused(state: Any, message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(state)), message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "load_in_4bit": False}, "load_in_4bit False"),
        ({**CONFIG, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
        ({**CONFIG, "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant True"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
    ],
)
def test_a_configuration_of_something_else_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, tensors(), config={"quantization_config": config})
    checkpoints.refused(folder, message)


def test_two_states_are_refused(tmp_path: Path) -> None:
    both = tensors() | {"fc.weight.quant_state.bitsandbytes__fp4": text({**STATE, "quant_type": "fp4"})}
    checkpoints.refused(checkpoints.write_folder(tmp_path, both), "of nf4 and one of fp4")


def test_a_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    damaged = tensors() | {"fc.weight.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}
    checkpoints.refused(checkpoints.write_folder(tmp_path, damaged), "not a JSON object")


INT8 = {
    "fc.weight": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "fc.SCB": np.array([1, 2, 3], np.float32),
    "fc.weight_format": np.zeros((), np.uint8),
}


def test_int8_has_its_magnitudes_as_scales_and_one_factor(tmp_path: Path) -> None:
    model = nibblecast.load(checkpoints.write_folder(tmp_path, INT8))
    assert list(model) == ["fc.weight"]
    quantization = model["fc.weight"].quantization
    assert quantization is not None
    assert quantization.scale.numpy().reshape(-1).tolist() == [1, 2, 3]
    assert quantization.factor == np.float32(1 / 127)


def test_a_factor_that_a_format_lacks_is_folded_into_the_scales(tmp_path: Path) -> None:
    target = tmp_path / "weights.onnx"
    conversion = nibblecast.convert(checkpoints.FIXTURES / "bitsandbytes_int8", target, verify=True)
    comparison = conversion.verified[target]
    assert comparison is not None
    assert comparison.equal
    assert any(loss.kind == "rounded" for loss in conversion.losses)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fc.weight": np.zeros((3, 4), np.uint8)}, "matrix of int8"),
        ({"fc.SCB": np.zeros(4, np.float32)}, "SCB of 4"),
        ({"fc.SCB": np.zeros(3, np.float16)}, "float16 for 3 rows"),
        ({"fc.weight_format": np.ones((), np.uint8)}, "order of a GPU"),
    ],
)
def test_int8_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, INT8 | changed), message)
