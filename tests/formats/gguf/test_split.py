"""Models in several files, as gguf's own writer splits them."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile
from tests import zoo
from tests.formats.gguf import gguf_files

ARRAYS = {f"blk.{n}.weight": np.random.default_rng(n).normal(size=(3, 32)).astype(np.float32) for n in range(5)}


def make(folder: Path, name: str = "model", *, first_is_empty: bool = False) -> list[Path]:
    """Three files of two tensors each, the last one of one; with an empty one before them, if wanted."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=2, small_first_shard=first_is_empty)
    writer.add_context_length(128)
    for key, array in ARRAYS.items():
        writer.add_tensor(key, quantize(array, GGMLQuantizationType.Q4_0), raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


@pytest.mark.parametrize("first_is_empty", [False, True])
@pytest.mark.peers
def test_any_file_of_them_and_their_folder_are_the_whole_model(first_is_empty: bool, tmp_path: Path) -> None:
    files = make(tmp_path, first_is_empty=first_is_empty)
    assert len(files) == 3 + first_is_empty
    for path in (*files, tmp_path):
        model = nibblecast.load(path)
        assert list(model) == list(ARRAYS)
        assert [loss.detail for loss in model.losses] == ["1 key-values of the metadata (llama.context_length)"]


@pytest.mark.peers
def test_values_are_those_of_gguf_in_each_file(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    files = make(tmp_path)
    model = nibblecast.load(files[1])
    for tensor in (tensor for file in files for tensor in GGUFReader(file).tensors):
        wanted = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(model[tensor.name].dequantize(np.float32), wanted)


@pytest.mark.peers
def test_one_file_is_written_of_them_with_the_key_values_of_the_first(tmp_path: Path) -> None:
    from gguf import GGUFReader

    make(tmp_path)
    target = tmp_path / "whole" / "model.gguf"
    target.parent.mkdir()
    result = nibblecast.convert(tmp_path, target, verify=True, fail_on_loss=True)
    comparison = result.verified[target]
    assert comparison is not None
    assert comparison.equal
    assert comparison.tensors == len(ARRAYS)
    read = GGUFReader(target)
    assert [tensor.name for tensor in read.tensors] == list(ARRAYS)
    assert [key for key in read.fields if not key.startswith("GGUF.")] == [
        "general.architecture",
        "llama.context_length",
    ]


@pytest.mark.peers
def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    files = make(tmp_path)
    files[1].unlink()
    for path in (files[0], files[2], tmp_path):
        with pytest.raises(CorruptFile, match=r"model-00002-of-00003\.gguf: is missing: it is file 2 of"):
            nibblecast.load(path)


@pytest.mark.peers
def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    files = make(tmp_path)
    renamed = files[0].rename(tmp_path / "first.gguf")
    with pytest.raises(CorruptFile, match=r"split\.no 0 and split\.count 3.*NAME-00001-of-00003\.gguf"):
        nibblecast.load(renamed)


@pytest.mark.peers
def test_files_that_are_swapped_are_refused(tmp_path: Path) -> None:
    files = make(tmp_path)
    shutil.copy(files[1], files[2])
    with pytest.raises(CorruptFile, match=r"00003-of-00003\.gguf: has split\.no 1 and split\.count 3, where 2"):
        nibblecast.load(files[0])


@pytest.mark.peers
def test_a_folder_with_two_models_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, "other")
    with pytest.raises(nibblecast.Error, match=r"2 models \(model-00001-of-00003\.gguf, other-"):
        nibblecast.load(tmp_path)


def test_a_folder_is_its_only_model_and_safetensors_before_that(tmp_path: Path) -> None:
    infos = [gguf_files.info("from gguf", (1,), gguf_files.F32, 0)]
    (tmp_path / "model.gguf").write_bytes(gguf_files.file(infos, bytes(32)))
    model = nibblecast.load(tmp_path)
    assert list(model) == ["from gguf"]
    nibblecast.save(nibblecast.Model({"w": zoo.codes("w", (3,), np.float32)}), tmp_path / "model.safetensors")
    assert list(nibblecast.load(tmp_path)) == ["w"]


def part(number: int, tensor: str, **changed: int) -> bytes:
    """A file of two with one tensor, by hand."""
    values = {"split.no": number, "split.count": 2, "split.tensors.count": 2} | changed
    infos = [gguf_files.info(tensor, (1,), gguf_files.F32, 0)]
    return gguf_files.file(
        infos, struct.pack("<f", number) + bytes(28), [gguf_files.number(*v) for v in values.items()]
    )


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(part(number, "twice"))
    with pytest.raises(CorruptFile, match=r"00002\.gguf: tensor 'twice': is in m-00001-of-00002\.gguf"):
        nibblecast.load(tmp_path / "m-00001-of-00002.gguf")


def test_files_with_other_tensors_than_they_say_are_refused(tmp_path: Path) -> None:
    for number in (0, 1):
        content = part(number, str(number), **{"split.tensors.count": 3})
        (tmp_path / f"m-0000{number + 1}-of-00002.gguf").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"split\.tensors\.count 3, and its 2 files have 2 tensors"):
        nibblecast.load(tmp_path / "m-00001-of-00002.gguf")


def test_a_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    value = gguf_files.string("split.count") + struct.pack("<I", gguf_files.STRING) + gguf_files.string("two")
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_files.file([], b"", [value]))
    with pytest.raises(CorruptFile, match=r"split\.count must be a whole number, got 'two' \(string\)"):
        nibblecast.load(path)
