"""What a model's folder holds: shards, index, configuration, and the source's other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import nibblecast
from tests import zoo
from tests.formats.encodings.checkpoints import write_file, write_folder

FIXTURES = Path(__file__).parent.parent.parent.parent / "fixtures"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TENSORS = {
    "model.embed.weight": np.ones((10, 8), BFLOAT16),
    "model.norm.weight": np.ones(8, np.float32),
    "lm_head.weight": np.full((10, 8), 2, BFLOAT16),
}
CONFIG = {
    "model_type": "llama",
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "name": "größe",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", TENSORS, config=CONFIG)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def config_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def test_shards_hold_no_more_than_asked_and_the_index_names_all(source: Path, tmp_path: Path) -> None:
    nibblecast.convert(source, tmp_path / "out", to="safetensors", shard_size="200")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / "out" / name, "np") as file:
            assert key in file.keys()  # noqa: SIM118 - it is no mapping
            assert file.metadata() == {"format": "pt"}
    files = sorted(name for name in listing(tmp_path / "out") if name.endswith(".safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(source: Path, tmp_path: Path) -> None:
    nibblecast.convert(source, tmp_path / "out", to="safetensors", shard_size="1", verify=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(TENSORS)


def test_the_configuration_says_what_the_values_are(source: Path, tmp_path: Path) -> None:
    nibblecast.convert(source, tmp_path / "out", to="safetensors")
    assert config_of(tmp_path / "out") == {"model_type": "llama", "torch_dtype": "bfloat16", "name": "größe"}


def test_the_dtype_goes_where_the_configuration_has_it(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", TENSORS, config={"dtype": "float32"})
    nibblecast.convert(source, tmp_path / "out", to="safetensors")
    assert config_of(tmp_path / "out") == {"dtype": "bfloat16"}


def test_a_source_without_a_configuration_gets_none(tmp_path: Path) -> None:
    nibblecast.convert(FIXTURES / "tflite" / "cnn_int4_per_channel.tflite", tmp_path / "out", to="safetensors")
    assert listing(tmp_path / "out") == ["model.safetensors"]


def test_other_files_are_copied_and_weights_are_not(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling": true}')
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    for name in ("pytorch_model.bin", "quantize_config.json", "pytorch_model.bin.index.json", ".gitattributes"):
        (source / name).write_text("{}")
    nibblecast.convert(source, tmp_path / "out", to="safetensors")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]


def test_of_a_file_in_a_folder_only_the_models_own_files_are_taken(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "holiday.jpg", "generation_config.json"):
        (source / name).write_text("{}")
    nibblecast.convert(next(source.glob("*.safetensors")), tmp_path / "out", to="safetensors")
    found = listing(tmp_path / "out")
    assert found == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_a_link_out_of_the_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    nibblecast.convert(source, tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_the_links_of_a_cache_of_hugging_face_are_followed(tmp_path: Path) -> None:
    (tmp_path / "models--x" / "snapshots").mkdir(parents=True)
    snapshot = write_folder(tmp_path / "models--x" / "snapshots" / "abc", TENSORS, config=CONFIG)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(Path("..") / ".." / "blobs" / "123")
    nibblecast.convert(snapshot, tmp_path / "out", to="safetensors")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("shard_size", ["1", "300", "1G"])
def test_everything_that_the_representation_holds_survives_in_shards(shard_size: str, tmp_path: Path) -> None:
    model = zoo.zoo()
    nibblecast.save(model, tmp_path / "out", to="safetensors", shard_size=shard_size)
    zoo.assert_identical(model, nibblecast.load(tmp_path / "out"))


def test_unrelated_files_of_ours_are_no_model_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = zoo.model([zoo.codes(name, (3,), ml_dtypes.int4)])
        nibblecast.save(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(nibblecast.Error, match="is one of several files here"):
        nibblecast.load(tmp_path)


@pytest.mark.parametrize("description", ["[]", "{", '{"version": 1}', '{"version": 1, "tensors": [1]}'])
def test_damaged_descriptions_of_shards_are_refused(description: str, tmp_path: Path) -> None:
    for number in (1, 2):
        tensors = {f"t{number}": np.zeros(2, np.uint8)}
        write_file(tmp_path / f"{number}.safetensors", tensors, {"nibblecast": description})
    index = {"weight_map": {f"t{number}": f"{number}.safetensors" for number in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(nibblecast.Error, match="metadata is damaged"):
        nibblecast.load(tmp_path)


def test_scales_of_inputs_go_into_floats_and_are_said_where_codes_stay(tmp_path: Path) -> None:
    codes = np.array([[0x21, 0x43, 0x65, 0x07] * 8] * 16, np.uint8)
    stored = {
        "layers.0.q.weight": codes,
        "layers.0.q.weight_scale": np.full((32, 2), 0.5, np.float16),
        "layers.0.q.pre_quant_scale": np.linspace(0.5, 2, 32, dtype=np.float16),
    }
    config = {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 16}}
    source = write_folder(tmp_path / "source", stored, hf_quant_config=config)
    weight = nibblecast.load(source)["layers.0.q.weight"].dequantize(np.float32)
    done = nibblecast.convert(source, tmp_path / "floats", to="safetensors", dequantize="float32", verify=True)
    assert "pre_quant_scale" in done.losses[-1].detail
    floats = nibblecast.load(tmp_path / "floats")
    assert list(floats) == ["layers.0.q.weight"]
    scaled = weight * stored["layers.0.q.pre_quant_scale"].astype(np.float32)
    np.testing.assert_array_equal(floats["layers.0.q.weight"].numpy(), scaled)
    done = nibblecast.convert(source, tmp_path / "gptq", to="safetensors", layout="gptq", verify=True)
    assert [loss.kind for loss in done.losses if loss.tensor == "layers.0.q.pre_quant_scale"] == ["reinterpreted"]
