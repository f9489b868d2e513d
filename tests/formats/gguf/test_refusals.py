"""Files of a split model that do not go together, made by hand: refused by what each says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.formats.gguf.reader import GGUFReader
from tests.formats.gguf import gguf_files


def part(path: Path, number: int, count: int = 2, name: str = "") -> Path:
    values = {"split.no": number, "split.count": count, "split.tensors.count": count}
    infos = [gguf_files.info(name or f"w{number}", (1,), gguf_files.F32, 0)]
    keys = [gguf_files.number(*value) for value in values.items()]
    path.write_bytes(gguf_files.file(infos, struct.pack("<f", number) + bytes(28), keys))
    return path


def names(folder: Path, count: int = 2) -> list[Path]:
    return [folder / f"m-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]


def test_files_that_go_together_are_one_model(tmp_path: Path) -> None:
    for number, path in enumerate(names(tmp_path)):
        part(path, number)
    for source in (*names(tmp_path), tmp_path):
        assert list(nibblecast.load(source)) == ["w0", "w1"]


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    first, second = names(tmp_path)
    part(first, 0)
    with pytest.raises(CorruptFile, match=rf"{second.name}: is missing: it is file 2 of the 2"):
        nibblecast.load(first)


def test_a_file_with_the_number_of_another(tmp_path: Path) -> None:
    first, second = names(tmp_path)
    part(first, 0)
    part(second, 0)
    with pytest.raises(CorruptFile, match=rf"{second.name}: has split\.no 0 and split\.count 2, where 1 and 2"):
        nibblecast.load(first)
    part(second, 1, 3)
    with pytest.raises(CorruptFile, match=rf"{second.name}: has split\.no 1 and split\.count 3, where 1 and 2"):
        nibblecast.load(first)


@pytest.mark.parametrize(
    ("name", "number", "count"),
    [("m.gguf", 0, 2), ("m-00001-of-00003.gguf", 0, 2), ("m-00001-of-00002.gguf", 1, 2), ("m-1-of-2.gguf", 0, 2)],
)
def test_a_name_that_does_not_go_with_the_number(name: str, number: int, count: int, tmp_path: Path) -> None:
    path = part(tmp_path / name, number, count)
    wanted = rf"has split\.no {number} and split\.count {count}, .*NAME-0000{number + 1}-of-00002\.gguf"
    with pytest.raises(CorruptFile, match=wanted):
        nibblecast.load(path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="a folder without GGUF files"):
        GGUFReader().read(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf_files.file([gguf_files.info("w", (1,), gguf_files.F32, 0)], bytes(32)))
    with pytest.raises(UsageError, match=r"2 models \(a\.gguf, b\.gguf"):
        GGUFReader().read(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"GGML" + bytes(20), CorruptFile, "begins with b'GGML', not with b'GGUF'"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), Unsupported, "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), Unsupported, "version 1: 2 and 3"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(16), Unsupported, "version 4: 2 and 3"),
        (b"GGUF" + struct.pack("<I", 0) + bytes(16), Unsupported, "version 0: 2 and 3"),
    ],
)
def test_other_files(content: bytes, kind: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=rf"m\.gguf: .*{message}"):
        GGUFReader().read(path)
