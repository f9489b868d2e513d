"""Where a tensor's bytes are: behind the flatbuffer, in a file beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.storage import FileRange
from nibblecast.formats.tflite import schema
from tests.formats.tflite.models import (
    FIXTURES,
    Load,
    Patch,
    fixture,
    subgraph,
    table,
    tensor,
    whole,
)


def test_buffers_behind_the_flatbuffer_count_from_the_files_beginning() -> None:
    path = FIXTURES / "buffer_offset.tflite"
    flatbuffer = schema.Model.root(np.fromfile(path, np.uint8))
    outside = {(buffer.offset, buffer.size) for buffer in flatbuffer.buffers if buffer.offset > 1}
    found = [each.data for each in nibblecast.load(path).values()]
    assert {(data.offset, data.nbytes) for data in found if isinstance(data, FileRange)} == outside
    assert len(outside) == len(found) == 4


@pytest.mark.parametrize("field", ["offset", "size"])
@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 10**6])
def test_a_buffer_behind_the_files_end_is_refused(tmp_path: Path, field: str, value: int) -> None:
    patch = Patch("buffer_offset.tflite")
    number = next(patch.get("I", patch.need(each, 2)) for each in patch.tensors() if patch.field(each, 2))
    buffer = next(each for each in patch.buffers()[number:] if patch.field(each, schema.Buffer.offset.slot))
    patch.put("Q", patch.need(buffer, getattr(schema.Buffer, field).slot), value)
    with pytest.raises(CorruptFile, match=r"tensor '.*': has its data at bytes \d+ to \d+ of 3488: the file is trunc"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


def test_a_buffer_offset_file_cut_short_is_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match="the file is truncated"):
        load(fixture("buffer_offset.tflite")[:-200])


def external(tmp_path: Path, name: str | None = None) -> Path:
    """The external_buffer fixture in a folder of its own, perhaps with another name for the file of weights."""
    patch = Patch("external_buffer.tflite")
    if name is not None:
        group = patch.tables(patch.child(patch.root(), schema.Model.external_buffer_groups.slot))[1]
        place = patch.child(group, schema.ExternalBufferGroup.name.slot)
        encoded = name.encode()
        assert len(encoded) <= patch.get("I", place)
        patch.put("I", place, len(encoded))
        patch.data[place + 4 : place + 4 + len(encoded)] = encoded
    return patch.write(tmp_path / "model.tflite")


WEIGHTS = "external_buffer.weights.bin"


def test_external_buffers_are_read_from_the_file_beside(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / WEIGHTS, tmp_path)
    loaded = nibblecast.load(external(tmp_path))
    inside = nibblecast.load(FIXTURES / "mlp_int4_per_tensor.tflite")
    assert set(loaded) == set(inside)
    for name, each in loaded.items():
        assert isinstance(each.data, FileRange)
        assert each.data.file.path.name == WEIGHTS
        assert np.array_equal(each.dequantize(), inside[name].dequantize())


def test_external_buffers_of_one_file_share_one_mapping() -> None:
    data = [each.data for each in nibblecast.load(FIXTURES / "external_buffer.tflite").values()]
    assert len({id(each.file) for each in data if isinstance(each, FileRange)}) == 1


def test_external_buffers_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    shutil.copy(FIXTURES / WEIGHTS, tmp_path / "below" / "w.bin")
    assert len(nibblecast.load(external(tmp_path, "below/w.bin"))) == 4


@pytest.mark.parametrize("name", ["../w.bin", "below/../../w.bin", "..", "a\\..\\w.bin", "w\0.bin", "", "."])
def test_external_buffers_outside_the_models_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(FIXTURES / WEIGHTS, tmp_path / "w.bin")
    shutil.copy(FIXTURES / WEIGHTS, folder / "w.bin")
    with pytest.raises(CorruptFile, match="refers to '.*': it must be the path of a file inside its folder"):
        nibblecast.load(external(folder, name))


def test_an_absolute_path_of_external_buffers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / WEIGHTS, tmp_path / "w.bin")
    assert len(nibblecast.load(external(tmp_path, "w.bin"))) == 4
    with pytest.raises(CorruptFile, match="refers to '/dev/null': it must be the path of a file"):
        nibblecast.load(external(tmp_path, "/dev/null"))


def test_a_link_to_external_buffers_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(FIXTURES / WEIGHTS, tmp_path / "w.bin")
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    (folder / "in").symlink_to(tmp_path)
    for name in ("w.bin", "in/w.bin"):
        with pytest.raises(CorruptFile, match=rf"{name}: .*is a link out of the folder"):
            nibblecast.load(external(folder, name))


def test_a_model_reached_by_a_link_finds_the_buffers_beside_the_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(FIXTURES)
    assert len(nibblecast.load(tmp_path / "link" / "external_buffer.tflite")) == 4


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(CorruptFile, match=r"w\.bin: .*is beside a model, but cannot be found"):
        nibblecast.load(external(tmp_path, "w.bin"))


def test_a_missing_file_of_external_buffers_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=f"{WEIGHTS}: .*does not exist"):
        nibblecast.load(external(tmp_path))


def test_a_file_of_external_buffers_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((FIXTURES / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(CorruptFile, match=rf"external buffer at bytes \d+ to \d+ of the 328 bytes of '{WEIGHTS}'"):
        nibblecast.load(external(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", 2**64 - 1, r"has an external buffer at bytes \d+ to \d+ of the 368 bytes"),
        ("offset", 2**63, r"has an external buffer at bytes \d+ to \d+ of the 368 bytes"),
        ("length", 1, r"holds 1 bytes, but shape"),
        ("group", 2, r"refers to group 2 of 2 of external buffers"),
        ("id", 99, r"refers to external buffer 40, which the file lists 0 times"),
        ("id", 37, r"refers to external buffer \d+, which the file lists [02] times"),
    ],
)
def test_damaged_entries_of_external_buffers_are_refused(tmp_path: Path, field: str, value: int, message: str) -> None:
    shutil.copy(FIXTURES / WEIGHTS, tmp_path)
    patch = Patch("external_buffer.tflite")
    entry = patch.tables(patch.child(patch.root(), schema.Model.external_buffers.slot))[0]
    form = "Q" if field in ("offset", "length") else "I"
    patch.put(form, patch.need(entry, getattr(schema.ExternalBuffer, field).slot), value)
    with pytest.raises(CorruptFile, match=rf"tensor '.*': {message}"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


def test_a_packing_of_external_buffers_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(4))
    entry = table(schema.ExternalBuffer, id=np.uint32(1), length=np.uint64(4))
    tensors = [tensor("w", "INT8", (4,), external_buffer=np.uint32(1))]
    for packing, name in (("", "w"), ("zstd", None)):
        more = {
            "external_buffers": [entry | table(schema.ExternalBuffer, packing=packing)],
            "external_buffer_groups": [table(schema.ExternalBufferGroup, name="w.bin")],
        }
        content = whole([subgraph(tensors)], [b""], **more)
        if name:
            assert list(load(content)) == [name]
        else:
            with pytest.raises(Unsupported, match="packing 'zstd'"):
                load(content)


def test_many_external_buffers_take_one_open_file(load: Load, tmp_path: Path) -> None:
    count = 3000
    (tmp_path / "w.bin").write_bytes(bytes(count))
    tensors = [tensor(f"w{i}", "INT8", (1,), external_buffer=np.uint32(i + 1)) for i in range(count)]
    entries = [
        table(schema.ExternalBuffer, id=np.uint32(i + 1), offset=np.uint64(i), length=np.uint64(1))
        for i in range(count)
    ]
    groups = [table(schema.ExternalBufferGroup, name="w.bin")]
    loaded = load(whole([subgraph(tensors)], [b""], external_buffers=entries, external_buffer_groups=groups))
    assert len(loaded) == count
