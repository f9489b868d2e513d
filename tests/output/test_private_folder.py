"""Folders that are only continued or removed where it is certain that this program made them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nibblecast.converters.output.private_folder import (
    MARK,
    NotOurs,
    hidden_name,
    make_temporary,
    open_resumable,
    remove_left_behind,
    temporary_folders,
)

SUFFIX = ".nibblecast-part"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_behind(parent: Path) -> Path:
    """A temporary folder whose maker was killed."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from nibblecast.converters.output.private_folder import make_temporary\n"
        f"made = make_temporary(Path(sys.argv[1]), '.x.', {SUFFIX!r})\n(made.path / 'data').touch()\n"
        "print(made.path, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(parent)], stdout=subprocess.PIPE, text=True, check=False)
    return Path(done.stdout.strip())


def test_a_temporary_folder_is_private_and_of_another_name_each_time(tmp_path: Path) -> None:
    made = [make_temporary(tmp_path, ".x.", SUFFIX) for _ in range(3)]
    assert len({each.path.name for each in made}) == 3
    assert {each.path.stat().st_mode & 0o777 for each in made} == {0o700}
    for each in made:
        each.remove()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = left_behind(tmp_path)
    assert names(left) == [MARK, "data"]
    remove_left_behind(temporary_folders(tmp_path))
    assert names(tmp_path) == []


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    made = make_temporary(tmp_path, ".x.", SUFFIX)
    remove_left_behind(temporary_folders(tmp_path))
    assert made.path.is_dir()
    made.remove()


def _without_mark(left: Path) -> None:
    (left / MARK).unlink()


def _with_a_mark_of_another_folder(left: Path) -> None:
    (left / MARK).write_text(f"temporary {left.stat().st_ino + 1}\n")


def _of_another_user(left: Path) -> None:
    os.chown(left, 12345, -1)


def _with_a_mark_of_another_user(left: Path) -> None:
    os.chown(left / MARK, 12345, -1)


def _with_a_mark_that_is_a_link(left: Path) -> None:
    (left / MARK).rename(left / "real")
    (left / MARK).symlink_to("real")


def _with_a_mark_that_is_a_fifo(left: Path) -> None:
    (left / MARK).unlink()
    os.mkfifo(left / MARK)


def _as_a_copy(left: Path) -> None:
    """As an archive or a checkout would bring it: all files, but another inode."""
    left.rename(left.with_name("moved"))
    left.mkdir()
    for path in left.with_name("moved").iterdir():
        (left / path.name).write_bytes(path.read_bytes())


def _behind_a_link(left: Path) -> None:
    left.rename(left.with_name("moved"))
    left.symlink_to("moved")


@pytest.mark.parametrize(
    "change",
    [
        _without_mark,
        _with_a_mark_of_another_folder,
        _of_another_user,
        _with_a_mark_of_another_user,
        _with_a_mark_that_is_a_link,
        _with_a_mark_that_is_a_fifo,
        _as_a_copy,
        _behind_a_link,
    ],
)
def test_what_cannot_be_proved_to_be_ours_stays(change: Callable[[Path], None], tmp_path: Path) -> None:
    left = left_behind(tmp_path)
    change(left)
    remove_left_behind(temporary_folders(tmp_path))
    assert (left / "data").exists()


def test_a_resumable_folder_is_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / f".out{SUFFIX}"
    open_resumable(path, shared=False).close()
    remove_left_behind(temporary_folders(tmp_path))
    assert names(path) == [MARK]
    open_resumable(path, shared=False).close()
    with pytest.raises(FileNotFoundError):
        open_resumable(tmp_path / ".none", shared=True)


def test_a_resumable_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / f".out{SUFFIX}"
    path.mkdir()
    (path / "thesis.tex").touch()
    for shared in (False, True):
        with pytest.raises(NotOurs):
            open_resumable(path, shared=shared)
    assert names(path) == ["thesis.tex"]


def test_several_share_a_resumable_folder_or_one_has_it(tmp_path: Path) -> None:
    path = tmp_path / f".out{SUFFIX}"
    open_resumable(path, shared=False).close()
    sharing = [open_resumable(path, shared=True) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        open_resumable(path, shared=False)
    for each in sharing:
        each.close()
    open_resumable(path, shared=False).close()


@pytest.mark.parametrize("name", ["a", "x" * 255, "中" * 85])
def test_hidden_names_are_names(name: str, tmp_path: Path) -> None:
    made = make_temporary(tmp_path, hidden_name(name), SUFFIX)
    assert list(temporary_folders(tmp_path, name)) == [made.path]
    made.remove()


def test_only_folders_for_that_output_are_found(tmp_path: Path) -> None:
    for name in ("a.h", "a.h.b", "ba.h", "a"):
        make_temporary(tmp_path, hidden_name(name), SUFFIX).close()
    found = [path.name for path in temporary_folders(tmp_path, "a.h")]
    assert len(found) == 1
    assert found[0].startswith(".a.h.")


def test_what_an_interruption_left_is_removed_at_the_end(tmp_path: Path) -> None:
    """One that comes amid the removal itself; and a child that was forked leaves its parent's folders."""
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from nibblecast.converters.output.private_folder import make_temporary\n"
        f"made = make_temporary(Path(sys.argv[1]), '.x.', {SUFFIX!r})\n(made.path / 'data').touch()\n"
        "if not (child := os.fork()):\n    sys.exit()\n"
        "os.waitpid(child, 0)\nprint((made.path / 'data').exists())\nraise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n"
    assert "KeyboardInterrupt" in done.stderr
    assert names(tmp_path) == []
