"""Files are made, never taken over; outputs are files."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.errors import UsageError
from nibblecast.converters.output.atomic import atomic_outputs
from nibblecast.converters.output.creation import lock
from nibblecast.converters.output.large_files import new_file

INT4 = Path(__file__).parents[2] / "fixtures" / "tflite" / "mlp_int4_blockwise.tflite"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _folder(path: Path) -> None:
    path.mkdir()


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


KINDS = {
    _fifo: "is a FIFO, not a file",
    _device: "is a device, not a file",
    _socket: "is a socket, not a file",
    _folder: "is a folder",
    _link_to_a_device: "is a device, not a file",
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("make", "message"), KINDS.items(), ids=[each.__name__ for each in KINDS])
def test_an_output_that_is_no_file_is_refused(
    make: Callable[[Path], None], message: str, dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("out"))
    before = os.lstat("out")
    with pytest.raises(UsageError, match=message):
        nibblecast.convert(INT4, "out", to="onnx", dry_run=dry_run)
    after = os.lstat("out")
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert listing(Path()) == ["out"]


@pytest.mark.parametrize("make", [_fifo, _device, _folder])
def test_no_file_of_several_may_be_another_thing(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "w.c")
    with pytest.raises(UsageError, match=r"w\.c: is a"):
        nibblecast.convert(INT4, tmp_path / "w.h")
    assert listing(tmp_path) == ["w.c"]


@pytest.mark.parametrize("make", [_fifo, _device, _folder])
def test_a_report_is_a_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "page.html")
    with pytest.raises(UsageError, match=r"page\.html: is a"):
        nibblecast.report(INT4, tmp_path / "page.html")
    assert listing(tmp_path) == ["page.html"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "w.onnx").symlink_to("victim")
    nibblecast.convert(INT4, tmp_path / "w.onnx")
    assert not (tmp_path / "w.onnx").is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_permissions_of_the_file_before_are_kept(tmp_path: Path) -> None:
    for mode in (0o600, 0o644, 0o444):
        (tmp_path / "w.onnx").unlink(missing_ok=True)
        (tmp_path / "w.onnx").touch()
        (tmp_path / "w.onnx").chmod(mode)
        nibblecast.convert(INT4, tmp_path / "w.onnx")
        assert stat.S_IMODE((tmp_path / "w.onnx").stat().st_mode) == mode
        assert (tmp_path / "w.onnx").stat().st_size > 0


def test_the_permissions_of_a_new_file_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    nibblecast.convert(INT4, tmp_path / "w.onnx")
    assert (tmp_path / "w.onnx").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_are_made_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("file", "link", "dangling"):
        with pytest.raises(FileExistsError):
            new_file(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_a_lock_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to("victim")
    os.link(tmp_path / "victim", tmp_path / "hard link")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "hard link", "fifo"):
        with pytest.raises(OSError, match=r".+"):
            lock(tmp_path / name)
    assert (tmp_path / "victim").read_text() == "mine"
    with lock(tmp_path / "new"), pytest.raises(BlockingIOError):
        lock(tmp_path / "new")


def test_a_disk_that_is_full_at_the_last_flush_leaves_nothing(tmp_path: Path) -> None:
    """Closing a file flushes it again, and is refused again."""
    with suppress(OSError), atomic_outputs([tmp_path / "a", tmp_path / "b"]) as staged:
        for stream in staged.streams:
            stream.write(b"x")
            stream._write_all = _full  # type: ignore[attr-defined]
    assert listing(tmp_path) == []


def _full(_: object) -> int:
    raise OSError(28, "No space left on device")


def test_what_fails_verification_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecast.formats.cheader import arrays

    (tmp_path / "w.h").write_text("before")
    stored = arrays._stored
    monkeypatch.setattr(arrays, "_stored", lambda dtype, part: -stored(dtype, part))
    with pytest.raises(nibblecast.Error, match=r"w\.h: is not written"):
        nibblecast.convert(INT4, tmp_path / "w.h", tmp_path / "w.onnx", verify=True)
    assert listing(tmp_path) == ["w.h"]
    assert (tmp_path / "w.h").read_text() == "before"
