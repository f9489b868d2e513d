"""Files of which large parts go past the system's cache hold what was written to them, whatever the order."""

from __future__ import annotations

import errno
import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.output import large_files
from nibblecast.converters.output.large_files import new_file

pytestmark = pytest.mark.slow

_BLOCK = 1 << 14


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large is some KiB here."""
    monkeypatch.setattr(large_files, "_BLOCK", _BLOCK)
    monkeypatch.setattr(large_files, "_LARGE_PIECE", 9000)
    monkeypatch.setattr(large_files, "_LARGE_FILE", 10_000)
    monkeypatch.setattr(large_files, "_MOST_AT_ONCE", 1000)
    monkeypatch.setattr(large_files, "_ON_ITS_WAY", 30_000)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what was written directly."""
    lengths: list[int] = []
    write = large_files._LargeFile._write_directly

    def counted(self: large_files._LargeFile, data: memoryview, position: int) -> int:
        assert position % 4096 == len(data) % 4096 == 0
        count = write(self, data, position)
        lengths.append(count)
        return count

    monkeypatch.setattr(large_files._LargeFile, "_write_directly", counted)
    return lengths


def content(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def test_large_pieces_go_directly(direct: list[int], tmp_path: Path) -> None:
    whole = content(200_123)
    with new_file(tmp_path / "file") as file:
        for start in range(0, len(whole), 12_000):
            file.write(whole[start : start + 12_000])
        assert file.tell() == len(whole)
    assert (tmp_path / "file").read_bytes() == whole
    assert sum(direct) > 90_000


def test_small_files_and_small_pieces_do_not(direct: list[int], tmp_path: Path) -> None:
    with new_file(tmp_path / "small") as file:
        file.write(content(9_999))
    with new_file(tmp_path / "pieces") as file:
        for _ in range(100):
            file.write(content(900))
    assert not direct
    assert (tmp_path / "pieces").stat().st_size == 90_000


def test_who_has_the_handle_finds_everything(direct: list[int], tmp_path: Path) -> None:
    whole = content(100_001)
    with new_file(tmp_path / "file") as file:
        file.write(whole[:50_000])
        file.write(whole[50_000:])
        file.flush()
        assert os.fstat(file.fileno()).st_size == len(whole)
        assert (tmp_path / "file").read_bytes() == whole
        file.write(b"more")
    assert (tmp_path / "file").read_bytes() == whole + b"more"
    assert direct


@given(st.lists(st.tuples(st.sampled_from(["write", "tell", "flush", "handle"]), st.integers(0, 60_000)), max_size=30))
@settings(max_examples=200)
def test_they_are_as_files_in_memory(tmp_path: Path, steps: list[tuple[str, int]]) -> None:
    expected = io.BytesIO()
    (tmp_path / "file").unlink(missing_ok=True)
    with new_file(tmp_path / "file") as file:
        for number, (step, argument) in enumerate(steps):
            match step:
                case "write":
                    data = content(argument, number)
                    assert file.write(data) == expected.write(data)
                case "flush":
                    file.flush()
                case "handle":
                    assert os.fstat(file.fileno()).st_size == expected.tell()
                case _:
                    assert file.tell() == expected.tell()
    assert (tmp_path / "file").read_bytes() == expected.getvalue()


def test_nothing_seeks_in_them(tmp_path: Path) -> None:
    with new_file(tmp_path / "file") as file:
        assert not file.seekable()
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)


def test_a_file_system_that_cannot_do_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused: list[object] = []

    def refusing(*arguments: object) -> int:
        refused.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(large_files.os, "open", refusing)
    whole = content(150_000)
    with new_file(tmp_path / "file") as file:
        for start in range(0, len(whole), 12_000):
            file.write(whole[start : start + 12_000])
    assert (tmp_path / "file").read_bytes() == whole
    assert len(refused) == 1


def test_small_writes_follow_large_ones_that_are_on_their_way(direct: list[int], tmp_path: Path) -> None:
    expected = bytearray()
    with new_file(tmp_path / "file") as file:
        for number in range(40):
            expected += content(4 * _BLOCK, number) + b"small"
            file.write(expected[-4 * _BLOCK - 5 : -5])
            file.flush()
            file.write(b"small")
    assert (tmp_path / "file").read_bytes() == expected
    assert direct


def test_a_short_direct_write_is_gone_on_with(
    direct: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = os.pwrite

    def short(handle: int, data: bytes, position: int) -> int:
        return write(handle, data[:8192], position)

    monkeypatch.setattr(large_files.os, "pwrite", short)
    whole = content(150_000)
    with new_file(tmp_path / "file") as file:
        for start in range(0, len(whole), 12_000):
            file.write(whole[start : start + 12_000])
    assert (tmp_path / "file").read_bytes() == whole
    assert set(direct) == {8192}


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = os.pwrite

    def full(handle: int, data: bytes, position: int) -> int:
        if position > 80_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data, position)

    monkeypatch.setattr(large_files.os, "pwrite", full)
    file = new_file(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"):
        file.writelines(content(12_000) for _ in range(20))
    with suppress(OSError):
        file.close()
    assert file.closed
