"""Folders of PyTorch files: shards with an index, lone files, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.encodings.checkpoints import FIXTURES, library_values, write_file
from tests.formats.pytorch.pickle.hostile_pickles import zipped

INDEX = "pytorch_model.bin.index.json"
ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
ZEROS, ONES = np.zeros((2, 3), np.float32), np.ones(4, np.float32)


def save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A state dict of NumPy arrays, in the container of torch.save."""
    zipped(pickle.dumps(dict(tensors), 2), path)


def indexed(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def two_shards(folder: Path) -> Path:
    save(folder / ONE, {"a": ZEROS})
    save(folder / TWO, {"b": ONES})
    return folder


def test_shards_are_one_model_with_an_index_and_without(tmp_path: Path) -> None:
    model = nibblecast.load(two_shards(tmp_path))
    assert list(model) == ["a", "b"]
    assert (model.metadata.format, model.metadata.source, model.losses) == ("pytorch", tmp_path, ())
    model = nibblecast.load(indexed(tmp_path, {"b": TWO, "a": ONE}))
    assert list(model) == ["b", "a"]
    np.testing.assert_array_equal(model["b"].numpy(), ONES)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("pytorch_model.bin", ["training_args.bin", "optimizer.pt", "rng_state.pth"]),
        ("adapter_model.bin", ["training_args.bin", "scheduler.pt"]),
        ("consolidated.00.pth", ["other.pt"]),
        ("model.bin", ["scheduler.pt"]),
        ("qmodel.pt", []),
        ("model.pth", []),
    ],
)
def test_the_file_that_is_the_model_is_found(name: str, others: list[str], tmp_path: Path) -> None:
    save(tmp_path / name, {"a": ZEROS})
    for other in others:
        save(tmp_path / other, {"state": ONES})
    model = nibblecast.load(tmp_path)
    assert list(model) == ["a"]
    assert model.metadata.source == tmp_path


def test_nothing_is_guessed_among_files_of_any_name(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt", "c.pt"):
        save(tmp_path / name, {name: ZEROS})
    with pytest.raises(Unsupported, match=r"3 files \(a\.pt, b\.pt, …\)"):
        nibblecast.load(tmp_path)


def test_safetensors_go_before_pickles_of_the_same_weights(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_file(tmp_path / "model.safetensors", {"c": ONES})
    model = nibblecast.load(tmp_path)
    assert (model.metadata.format, list(model)) == ("safetensors", ["c"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.bin"}, "not in its folder"),
        ({"a": "/etc/passwd"}, "not in its folder"),
        ({"a": ".."}, "the path of a file inside its folder"),
        ({"a": "missing.bin"}, r"missing\.bin: does not exist"),
        ({"a": "nul\0.bin"}, "the path of a file inside its folder"),
        ({"a": "x" * 5000}, "cannot be read"),
        ({"z": ONE}, "tensor 'z': is in the index, but not in the file that it names"),
        ({"a": TWO}, "not in the file that it names"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=message) as raised:
        nibblecast.load(indexed(two_shards(tmp_path), weight_map))
    assert "\n" not in str(raised.value)


def test_what_an_index_leaves_out_is_said(tmp_path: Path) -> None:
    save(tmp_path / ONE, {"a": ZEROS, "left": ONES})
    model = nibblecast.load(indexed(tmp_path, {"a": ONE}))
    assert list(model) == ["a"]
    (loss,) = model.losses
    assert str(loss) == f"not kept: left: the index does not list it, though '{ONE}' has it"


@pytest.mark.parametrize("names", [(ONE, TWO), ("consolidated.00.pth", "consolidated.01.pth")])
def test_parts_of_a_tensor_in_two_files_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        save(tmp_path / name, {"a": ZEROS})
    with pytest.raises(CorruptFile, match=rf"{names[1]}: tensor 'a': is in two files, '{names[0]}' as well"):
        nibblecast.load(tmp_path)


def test_two_indexes_are_refused(tmp_path: Path) -> None:
    indexed(two_shards(tmp_path), {"a": ONE})
    shutil.copy(tmp_path / INDEX, tmp_path / "x.bin.index.json")
    with pytest.raises(CorruptFile, match="has 2 indexes"):
        nibblecast.load(tmp_path)


def test_prefixes_of_wrappers_are_those_of_the_whole_model(tmp_path: Path) -> None:
    save(tmp_path / ONE, {"module.a": ZEROS})
    save(tmp_path / TWO, {"module.b": ONES})
    assert list(nibblecast.load(indexed(tmp_path, {"module.a": ONE, "module.b": TWO}))) == ["a", "b"]
    save(tmp_path / TWO, {"b": ONES})
    assert list(nibblecast.load(indexed(tmp_path, {"module.a": ONE, "b": TWO}))) == ["module.a", "b"]


@pytest.mark.parametrize("program", ["exported_per_tensor.pt2", "static_scripted.pt"])
def test_a_program_is_no_shard(program: str, tmp_path: Path) -> None:
    found = FIXTURES.parent / "pytorch" / program
    assert found.exists()
    shutil.copy(found, tmp_path / ONE)
    save(tmp_path / TWO, {"b": ONES})
    with pytest.raises(Unsupported, match=f"{ONE}: is a program, and one of several files"):
        nibblecast.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle"])
def test_a_damaged_shard_is_named(content: bytes, tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / TWO).write_bytes(content)
    with pytest.raises(Error, match=TWO) as raised:
        nibblecast.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_configuration_that_nothing_fits_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "strange"}}')
    (loss,) = nibblecast.load(two_shards(tmp_path)).losses
    assert "no tensor is recognised as quantized by quant_method 'strange'" in str(loss)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_opening_shards_reads_no_payload(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")
    for name, key in ((ONE, "a"), (TWO, "b")):
        torch.save({key: torch.zeros(1000, 1000)}, tmp_path / name)
    model = nibblecast.load(indexed(tmp_path, {"a": ONE, "b": TWO}))
    assert {key: [file.path.name for file in model[key].data.files()] for key in model} == {"a": [ONE], "b": [TWO]}


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["bitsandbytes_nf4_double", "compressed_tensors_mixed", "hqq_f16", "mxfp4", "quanto_qint4_bf16"]
)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_encodings_in_shards_of_torch_have_the_values_of_their_libraries(
    name: str, shards: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch==2.13.0")
    from safetensors.torch import load_file

    case = FIXTURES / name
    tensors = load_file(case / "model.safetensors")
    files = [f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" for number in range(shards)]
    weight_map = {key: files[number % shards] for number, key in enumerate(tensors)}
    for file in files:
        torch.save({key: tensors[key] for key, of in weight_map.items() if of == file}, tmp_path / file)
    for configuration in case.glob("*.json"):
        shutil.copy(configuration, tmp_path)
    model = nibblecast.load(indexed(tmp_path, weight_map))
    wanted = nibblecast.load(case)
    assert sorted(model) == sorted(wanted)
    with np.load(case / "truth.npz") as truth:
        for key in truth.files:
            kind, _, tensor = key.partition("/")
            got = model[tensor].codes() if kind == "c" else library_values(model[tensor])
            np.testing.assert_array_equal(got, truth[key], err_msg=key)
