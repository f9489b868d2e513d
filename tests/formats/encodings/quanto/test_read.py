"""optimum-quanto: its own values, shapes that the file does not tell, and files that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from tests.formats.encodings import checkpoints


def tensors(name: str = "fc", **changed: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Four groups of 128 codes: two rows of 256; None leaves a part out."""
    parts = {
        "weight._data._data": np.arange(256, dtype=np.uint8).reshape(2, 128),
        "weight._scale": np.full((4, 1), 0.5, np.float32),
        "weight._shift": np.full((4, 1), 3.25, np.float32),
        "input_scale": np.ones((), np.float32),
        "bias": np.zeros(2, np.float32),
        **{key.replace("__", "._", 1).replace("weight_d", "weight._d"): value for key, value in changed.items()},
    }
    return {f"{name}.{key}": value for key, value in parts.items() if value is not None}


@pytest.mark.parametrize("case", checkpoints.cases("quanto"), ids=lambda case: case.name)
def test_values_and_codes_are_those_of_quanto(case: Path) -> None:
    checkpoints.check(case)


@pytest.mark.parametrize("case", checkpoints.cases("quanto"), ids=lambda case: case.name)
def test_they_survive_to_safetensors_and_back(case: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    comparison = nibblecast.convert(case, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal


def test_the_first_rows_are_in_the_low_nibbles(tmp_path: Path) -> None:
    weight = nibblecast.load(checkpoints.write_folder(tmp_path, tensors()))["fc.weight"]
    assert weight.dtype == ml_dtypes.uint4
    assert weight.shape == (2, 256)
    assert weight.codes()[0, :3].tolist() == [0, 1, 2]
    assert weight.codes()[1, 16:19].tolist() == [1, 1, 1]
    assert weight.dequantize(np.float32)[0, 2] == 2 * 0.5 - 3.25


def test_shifts_may_be_integers(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, tensors(weight__shift=np.full((4, 1), 8, np.int8)))
    weight = nibblecast.load(folder)["fc.weight"]
    assert weight.quantization is not None
    assert weight.quantization.zero_point is not None
    assert weight.dequantize(np.float32)[0, 2] == (2 - 8) * 0.5


@pytest.mark.parametrize(
    ("module", "config", "shape"),
    [
        ("m.q_proj", {"num_attention_heads": 2, "hidden_size": 2}, (2, 256)),
        ("m.k_proj", {"num_attention_heads": 2, "hidden_size": 2, "num_key_value_heads": 1}, (1, 512)),
        ("m.up_proj", {"intermediate_size": 2}, (2, 256)),
        ("m.o_proj", {"hidden_size": 1}, (1, 512)),
    ],
)
def test_the_architecture_tells_the_rows_where_no_bias_does(
    module: str, config: dict[str, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder = checkpoints.write_folder(tmp_path, tensors(module, bias=None), config=config)
    assert nibblecast.load(folder)[f"{module}.weight"].shape == shape


def test_a_shape_that_is_nowhere_is_said(tmp_path: Path) -> None:
    """A convolution of (2, 64, 2, 2) has the same tensors as a matrix of (2, 256)."""
    (loss,) = nibblecast.load(checkpoints.write_folder(tmp_path / "any", tensors("layer"))).losses
    assert (loss.tensor, loss.kind) == ("layer.weight", "reinterpreted")
    assert "the weight of a convolution would have more axes" in loss.detail
    assert nibblecast.load(checkpoints.write_folder(tmp_path / "linear", tensors("up_proj"))).losses == ()
    ungrouped = tensors(weight__scale=np.ones((4, 1, 1), np.float32), weight__shift=np.ones((4, 1, 1), np.float32))
    ungrouped["fc.weight._data._data"] = np.zeros((2, 8, 16), np.uint8)
    model = nibblecast.load(checkpoints.write_folder(tmp_path / "ungrouped", ungrouped))
    assert (model["fc.weight"].shape, model.losses) == ((4, 8, 16), ())


@pytest.mark.parametrize("shape", [(4, 4), (3, 4), (2, 3, 4)])
def test_bytes_that_are_quantized_along_the_last_axis(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = np.arange(np.prod(shape), dtype=np.int8).reshape(shape)
    scale = np.array([1, 2, 4, 8], np.float32).reshape(*(1 for _ in shape[1:]), 4)
    folder = checkpoints.write_folder(tmp_path, {"fc.weight._data": data, "fc.weight._scale": scale})
    weight = nibblecast.load(folder)["fc.weight"]
    np.testing.assert_array_equal(weight.dequantize(np.float32), data * scale)


def test_packed_codes_along_the_last_axis_are_refused_by_name(tmp_path: Path) -> None:
    changed = {"weight__scale": np.ones((1, 4), np.float32), "weight__shift": np.ones((1, 4), np.float32)}
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(**changed)), "along its last axis")


def test_scales_of_activations_are_kept(tmp_path: Path) -> None:
    plain = nibblecast.load(checkpoints.write_folder(tmp_path / "plain", tensors()))
    assert set(plain) == {"fc.bias", "fc.weight"}
    scaled = tensors(input_scale=np.full((), 0.1, np.float32))
    assert "fc.input_scale" in nibblecast.load(checkpoints.write_folder(tmp_path / "scaled", scaled))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": None}, "neither a bias nor config.json"),
        ({"bias": np.zeros(3, np.float32)}, "do not make 3 rows"),
        ({"bias": np.zeros(0, np.float32)}, "do not make 0 rows"),
        ({"weight__shift": None}, "no tensor 'fc.weight._shift'"),
        ({"weight__shift": np.zeros(3, np.float32)}, "3 shifts"),
        ({"weight__scale": np.zeros((4, 1), np.int32)}, "scales of int32"),
        ({"weight__scale": np.zeros((9, 1), np.float32), "weight__shift": np.zeros(9, np.int8)}, "2 rows of codes"),
        ({"weight._data._data": np.zeros((2, 128), np.int8)}, "matrix of uint8"),
        ({"weight._data._data": np.zeros((0, 128), np.uint8)}, "matrix of uint8"),
        ({"weight._data._data": np.zeros((2,), np.uint8)}, "matrix of uint8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(**changed)), message)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"weights": "qint2"}, "2 rows of codes for 4 scales and qint2"),
        ({"weights": "qint3"}, "'qint3'"),
        ([], "weights of None"),
    ],
)
def test_a_map_of_something_else_is_refused(types: Any, message: str, tmp_path: Path) -> None:
    checkpoints.refused(checkpoints.write_folder(tmp_path, tensors(), quanto_qmap={"fc": types}), message)


def test_bytes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scale, data = np.ones((4, 1), np.float32), np.ones((4, 8), np.int8)
    wrong = checkpoints.write_folder(tmp_path / "a", {"fc.weight._data": data[:3], "fc.weight._scale": scale})
    checkpoints.refused(wrong, "4 scales for data")
    wide = {"fc.weight._data": data.astype(np.int32), "fc.weight._scale": scale}
    checkpoints.refused(checkpoints.write_folder(tmp_path / "b", wide), "data of int32")
    qmap = {"fc": {"weights": "qfloat8"}}
    mapped = checkpoints.write_folder(
        tmp_path / "c", {"fc.weight._data": data, "fc.weight._scale": scale}, quanto_qmap=qmap
    )
    checkpoints.refused(mapped, "data of int8, but is qfloat8")
