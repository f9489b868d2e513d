"""GPTQ, against a packer that puts one code after the other in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.encodings.checkpoints import write_folder
from tests.formats.encodings.gptq.packer import configuration, random_layer, stored


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 4, 8]),
    outputs=st.integers(1, 3),
    inputs=st.integers(1, 6),
    size=st.sampled_from([16, 32, 64]),
    version=st.sampled_from([1, 2]),
    shuffled=st.booleans(),
)
@settings(max_examples=60)
def test_every_code_and_value_comes_out(
    seed: int, bits: int, outputs: int, inputs: int, size: int, version: int, shuffled: bool, tmp_path_factory: Any
) -> None:
    layer = random_layer(seed, bits, outputs * 32 // bits, inputs * 16, size, shuffled=shuffled)
    folder = Path(tmp_path_factory.getbasetemp()) / "gptq"
    tensors = stored(layer, version=version, with_groups=shuffled or seed % 2 == 0)
    model = nibblecast.load(write_folder(folder, tensors, config=configuration(layer, size, version)))
    assert list(model) == ["model.fc.weight", "model.fc.bias"]
    weight = model["model.fc.weight"]
    np.testing.assert_array_equal(weight.codes(), layer.codes)
    np.testing.assert_array_equal(weight.dequantize(np.float32), layer.unrounded())
    np.testing.assert_array_equal(weight.dequantize(np.float16), layer.values())


def test_a_zero_of_zero_borrows_from_its_neighbour_and_gets_it_back(tmp_path: Path) -> None:
    layer = random_layer(1, 4, 16, 32, 32, shuffled=False)
    layer.zeros[:] = np.arange(16)[:, None] % 3
    folder = write_folder(
        tmp_path / "m", stored(layer, version=1, with_groups=True), config=configuration(layer, 32, 1)
    )
    weight = nibblecast.load(folder)["model.fc.weight"]
    assert weight.quantization is not None
    assert weight.quantization.zero_point is not None
    np.testing.assert_array_equal(weight.quantization.zero_point.codes(), layer.zeros)


def test_rows_in_groups_need_no_index(tmp_path: Path) -> None:
    layer = random_layer(2, 4, 16, 64, 32, shuffled=False)
    folder = write_folder(
        tmp_path / "m", stored(layer, version=2, with_groups=True), config=configuration(layer, 32, 2)
    )
    assert nibblecast.load(folder)["model.fc.weight"].granularity == "blockwise (1, 32)"


def test_pieces_are_as_the_whole(tmp_path: Path) -> None:
    layer = random_layer(3, 4, 64, 128, 32, shuffled=False)
    folder = write_folder(
        tmp_path / "m", stored(layer, version=2, with_groups=False), config=configuration(layer, 32, 2)
    )
    weight = nibblecast.load(folder)["model.fc.weight"]
    pieces = [part.dequantize(np.float16) for part in weight.parts(500)]
    assert len(pieces) > 3
    np.testing.assert_array_equal(np.concatenate(pieces), layer.values())


def test_shards_are_one_model(tmp_path: Path) -> None:
    layer = random_layer(4, 4, 16, 32, 32, shuffled=True)
    tensors = stored(layer, version=2, with_groups=True)
    folder = write_folder(tmp_path / "m", tensors, shards=3, config=configuration(layer, 32, 2))
    np.testing.assert_array_equal(nibblecast.load(folder)["model.fc.weight"].dequantize(), layer.unrounded())


def test_codes_survive_to_safetensors(tmp_path: Path) -> None:
    layer = random_layer(5, 4, 16, 64, 32, shuffled=True)
    folder = write_folder(
        tmp_path / "m", stored(layer, version=1, with_groups=True), config=configuration(layer, 32, 1)
    )
    target = tmp_path / "w.safetensors"
    conversion = nibblecast.convert(folder, target, verify=True)
    comparison = conversion.verified[target]
    assert comparison is not None
    assert comparison.equal


def test_parameters_stay_in_the_file(tmp_path: Path) -> None:
    layer = random_layer(8, 4, 16, 64, 32, shuffled=True)
    folder = write_folder(
        tmp_path / "m", stored(layer, version=1, with_groups=True), config=configuration(layer, 32, 1)
    )
    quantization = nibblecast.load(folder)["model.fc.weight"].quantization
    assert quantization is not None
    roles = dict(quantization.parameters())
    assert set(roles) == {"scale", "zero_point", "group_index"}
    for role, parameter in roles.items():
        assert list(parameter.data.files()), f"the {role} is held in memory"


@pytest.mark.parametrize(
    ("changed", "config", "error", "message"),
    [
        ({}, {"checkpoint_format": "marlin"}, Unsupported, "marlin"),
        ({}, {"bits": 8}, CorruptFile, "4 bits, not 8"),
        ({}, {"bits": "4"}, CorruptFile, "int of 32 bits is needed"),
        ({}, {"group_size": 1 << 70}, CorruptFile, "int of 32 bits is needed"),
        ({}, {"quant_method": "awq"}, CorruptFile, "quant_method 'awq'"),
        ({"g_idx": np.full(32, 7, np.int32)}, {}, CorruptFile, "g_idx from 7 to 7 for 1 groups"),
        ({"g_idx": np.zeros(31, np.int32)}, {}, CorruptFile, "g_idx of shape"),
        ({"qzeros": np.zeros((1, 2), np.int64)}, {}, CorruptFile, "qzeros of int64"),
        ({"qzeros": np.zeros((3, 2), np.int32)}, {}, Error, "zeros of shape"),
        ({"g_idx": None}, {"group_size": 16}, CorruptFile, "1 groups of scales for 32 inputs"),
        ({"scales": np.zeros((0, 16), np.float16), "qzeros": np.zeros((0, 2), np.int32)}, {}, CorruptFile, "0 groups"),
    ],
)
def test_contradictions_are_errors(
    changed: dict[str, Any], config: dict[str, Any], error: type[Error], message: str, tmp_path: Path
) -> None:
    layer = random_layer(6, 4, 16, 32, 32, shuffled=False)
    tensors = stored(layer, version=1, with_groups=True)
    for name, array in changed.items():
        key = f"model.fc.{name}"
        if array is None:
            del tensors[key]
        else:
            tensors[key] = array
    folder = write_folder(tmp_path / "m", tensors, config=configuration(layer, 32, 1, **config))
    with pytest.raises(error, match=message):
        nibblecast.load(folder)
