"""Folders of safetensors files: what is one model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error
from tests.formats.encodings.checkpoints import write_file, write_folder

TENSORS = {f"layer{number}.weight": np.full((2, 3), number, np.float32) for number in range(5)}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_is_a_model_in_the_order_of_its_index(shards: int, tmp_path: Path) -> None:
    model = nibblecast.load(write_folder(tmp_path / "m", TENSORS, shards=shards))
    assert sorted(model) == sorted(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(model[name].numpy(), array)


def test_files_without_an_index_are_together(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"a": np.zeros(2, np.float32)})
    write_file(tmp_path / "b.safetensors", {"b": np.ones(2, np.float32)})
    assert list(nibblecast.load(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "not in its folder"),
        ({"a": "/etc/passwd"}, "not in its folder"),
        ({"a": "missing.safetensors"}, "does not exist"),
        ({"z": "a.safetensors"}, "not in the file that it names"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"a": np.zeros(2, np.float32)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(Error, match=message):
        nibblecast.load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.safetensors", {"same": np.zeros(2, np.float32)})
    with pytest.raises(CorruptFile, match="two files"):
        nibblecast.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "\x00", '{"a": ' * 100_000])
def test_a_configuration_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    write_folder(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"config\.json.* not a JSON object"):
        nibblecast.load(tmp_path)


def test_a_folder_without_a_model_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="no model in this folder"):
        nibblecast.load(tmp_path)


def test_the_folder_is_no_output(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", TENSORS)
    with pytest.raises(Error, match="both the input and an output"):
        nibblecast.convert(folder, folder / "model.safetensors")


def test_a_folder_with_a_file_of_ours_is_read_as_that(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "fixtures" / "tflite" / "mlp_int4_odd.tflite"
    (tmp_path / "m").mkdir()
    nibblecast.convert(source, tmp_path / "m" / "a.safetensors")
    assert nibblecast.verify(source, tmp_path / "m").equal
    nibblecast.convert(source, tmp_path / "m" / "b.safetensors")
    with pytest.raises(Error, match=r"a\.safetensors.*several files"):
        nibblecast.load(tmp_path / "m")


def test_an_encoding_that_is_not_known_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", TENSORS, config={"quantization_config": {"quant_method": "strange"}})
    (loss,) = nibblecast.load(folder).losses
    assert "no tensor is recognised as quantized by quant_method 'strange'" in str(loss)
