"""One rule for the files beside a model, whichever format names them, and none of them is waited for."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.input.containment import contained_file, is_inside
from tests.formats.encodings.checkpoints import write_file, write_folder
from tests.formats.gguf import gguf_files
from tests.formats.onnx.onnx_models import save
from tests.formats.pytorch.pickle.hostile_pickles import zipped

FIXTURES = Path(__file__).parents[2] / "fixtures"
INT4 = FIXTURES / "tflite" / "mlp_int4_blockwise.tflite"
TENSORS = {"a.weight": np.zeros((2, 3), np.float32), "b.weight": np.ones(4, np.float32)}


def _onnx(folder: Path) -> tuple[Path, str]:
    from onnx import TensorProto

    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="data.bin")
    (folder / "data.bin").write_bytes(b"0123")
    return save(folder / "m.onnx", initializers=[tensor], outputs=["w"]), "data.bin"


def _tflite(folder: Path) -> tuple[Path, str]:
    for name in ("external_buffer.tflite", "external_buffer.weights.bin"):
        shutil.copy(FIXTURES / "tflite" / name, folder)
    return folder / "external_buffer.tflite", "external_buffer.weights.bin"


def _c_source(folder: Path) -> tuple[Path, str]:
    nibblecast.convert(INT4, folder / "m.h")
    return folder / "m.h", "m.c"


def _c_payload(folder: Path) -> tuple[Path, str]:
    nibblecast.convert(INT4, folder / "m.h", style="incbin")
    return folder / "m.h", "m.bin"


def _lone_shard(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS), "model.safetensors"


def _indexed_shard(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS, shards=2), "model-00002-of-00002.safetensors"


def _index(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS, shards=2), "model.safetensors.index.json"


def _config(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS, config={"model_type": "llama"}), "config.json"


def _config_of_a_file(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS, config={"model_type": "llama"}) / "model.safetensors", "config.json"


def _quantization_config(folder: Path) -> tuple[Path, str]:
    return write_folder(folder, TENSORS, quantize_config={"bits": 4}), "quantize_config.json"


def _pytorch_shard(folder: Path) -> tuple[Path, str]:
    for number, key in enumerate(TENSORS, 1):
        zipped(pickle.dumps({key: TENSORS[key]}, 2), folder / f"pytorch_model-{number:05}-of-00002.bin")
    return folder, "pytorch_model-00002-of-00002.bin"


def _gguf_part(folder: Path) -> tuple[Path, str]:
    for number in range(2):
        values = [gguf_files.number("split.no", number), gguf_files.number("split.count", 2)]
        content = gguf_files.file([gguf_files.info(f"w{number}", (4,), gguf_files.F32, 0)], bytes(32), values)
        (folder / f"m-{number + 1:05}-of-00002.gguf").write_bytes(content)
    return folder / "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


def _gguf_of_a_folder(folder: Path) -> tuple[Path, str]:
    (folder / "m.gguf").write_bytes(gguf_files.file([gguf_files.info("w", (4,), gguf_files.F32, 0)], bytes(32)))
    return folder, "m.gguf"


MAKERS = [
    _onnx,
    _tflite,
    _c_source,
    _c_payload,
    _lone_shard,
    _indexed_shard,
    _index,
    _config,
    _config_of_a_file,
    _quantization_config,
    _pytorch_shard,
    _gguf_part,
    _gguf_of_a_folder,
]
Maker = Callable[[Path], tuple[Path, str]]
by_maker = pytest.mark.parametrize("make", MAKERS, ids=[make.__name__.strip("_") for make in MAKERS])


def _read(path: Path) -> None:
    for tensor in nibblecast.load(path).values():
        tensor.dequantize(np.float32)


@by_maker
def test_a_link_within_the_folder_is_followed(make: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, name = make(folder)
    (folder / "below").mkdir()
    (folder / name).rename(folder / "below" / "content")
    (folder / name).symlink_to(Path("below", "content"))
    _read(path)


@by_maker
def test_a_link_to_a_blob_of_the_same_repository_is_followed(make: Maker, tmp_path: Path) -> None:
    """huggingface_hub keeps files by their hashes, and snapshots of links to them."""
    repository = tmp_path / "models--org--name"
    folder = repository / "snapshots" / "abc" / "below"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    path, _ = make(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(Path("../../../blobs", str(number)))
    _read(path)


@by_maker
@pytest.mark.parametrize("layout", ["plain", "other repository", "blobs behind a link", "behind a folder's link"])
def test_a_link_out_of_the_folder_is_refused(make: Maker, layout: str, tmp_path: Path) -> None:
    outside, repository = tmp_path / "outside", tmp_path / "models--org--name"
    folder = tmp_path / "model" if layout == "plain" else repository / "snapshots" / "abc"
    folder.mkdir(parents=True)
    path, name = make(folder)
    if layout == "other repository":
        outside = tmp_path / "models--org--other" / "blobs"
    outside.mkdir(parents=True)
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    if layout == "blobs behind a link":
        (repository / "blobs").symlink_to(outside)
        (folder / name).unlink()
        (folder / name).symlink_to(repository / "blobs" / name)
    if layout == "behind a folder's link":
        (folder / "linked").symlink_to(outside)
        (folder / name).unlink()
        (folder / name).symlink_to(Path("linked", name))
    with pytest.raises(CorruptFile, match="is a link out of the folder") as refused:
        _read(path)
    assert name in str(refused.value)


@by_maker
def test_a_link_to_itself_is_one_line(make: Maker, tmp_path: Path) -> None:
    path, name = make(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(CorruptFile, match="cannot be found|cannot be read"):
        _read(path)


@by_maker
def test_a_fifo_is_not_waited_for(make: Maker, tmp_path: Path) -> None:
    path, name = make(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CorruptFile, match="not a regular file"):
        _read(path)


@pytest.mark.parametrize("suffix", [".tflite", ".onnx", ".pt", ".safetensors", ".gguf", ".h", ".task", ".unknown", ""])
def test_a_model_that_is_a_fifo_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    os.mkfifo(path)
    with pytest.raises(CorruptFile, match="cannot be read: not a regular file"):
        nibblecast.load(path)


@pytest.mark.parametrize(
    "location", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a\0b", "C:\\a", "C:a", "\\\\host\\a", "..\\a"]
)
def test_paths_that_lead_out_are_refused(location: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="it must be the path of a file inside its folder"):
        contained_file(tmp_path, location)


def test_a_folder_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_file(tmp_path / "real" / "model.safetensors", TENSORS)
    (tmp_path / "link").symlink_to("real")
    assert is_inside(tmp_path / "link" / "model.safetensors", tmp_path / "link")
    _read(tmp_path / "link")


def test_a_configuration_that_is_a_link_out_of_the_folder_reaches_no_output(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", TENSORS)
    (tmp_path / "secret.json").write_text('{"auths": "SECRETTOKEN"}')
    (source / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CorruptFile, match=r"config\.json: is a link out of the folder"):
        nibblecast.convert(source, tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_copied_are_said(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", TENSORS)
    (tmp_path / "secret").write_text("key")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (source / "gone.json").symlink_to("nothing")
    (source / "folder").symlink_to(tmp_path)
    os.mkfifo(source / "fifo")
    done = nibblecast.convert(source, tmp_path / "out", to="safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    said = "; ".join(loss.detail for loss in done.losses)
    for name, reason in {
        "tokenizer.json": "is a link to a file outside of it",
        "gone.json": "is a broken link",
        "folder": "is not a regular file",
        "fifo": "is not a regular file",
    }.items():
        assert f"'{name}' of the source's folder: it {reason}" in said
