"""Which other files a model may refer to: one rule for all formats.

A model names other files: external data, shards, a configuration. With a path or a link out of its folder, a model's
author could have any file of this machine read, and its content written to an output. So such a file must lie in the
model's folder, and so must the target of a link. There is one exception. Hugging Face's cache keeps the files of a
model in `REPOSITORY/blobs/`, with links to them in `REPOSITORY/snapshots/REVISION/`. A model in such a snapshot may use
the blobs of its own repository.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from nibblecast.converters.errors import CorruptFile

_MOST_SHOWN = 200


def contained_file(folder: Path, location: str) -> Path:
    """The path of the file at `location`, as a model in `folder` names it: relative, with forward slashes. Raises
    CorruptFile if it leads out of the folder. The file need not exist."""
    parts, on_windows = PurePosixPath(location).parts, PureWindowsPath(location)
    if not parts or "\0" in location or ".." in on_windows.parts or location.startswith("/") or on_windows.anchor:
        raise CorruptFile(f"refers to '{location[:_MOST_SHOWN]}': it must be the path of a file inside its folder")
    path = folder.joinpath(*parts)
    refuse_outside(path, folder)
    return path


def refuse_outside(path: Path, folder: Path) -> None:
    """Raises CorruptFile if `path`, which is in `folder` by its name, is a link out of it or lies behind one."""
    try:
        if is_inside(path, folder):
            return
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a link to itself
        reason = getattr(error, "strerror", None) or error
        raise CorruptFile(f"is beside a model, but cannot be found: {reason}", path=path) from error
    raise CorruptFile(
        f"is a link out of the folder {folder}, or lies behind one: files beside a model must lie in its folder, so "
        "copy the file there",
        path=path,
    )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with all links followed, lies in `folder`, or among the blobs of its repository in Hugging Face's
    cache. Raises OSError or RuntimeError for links to themselves."""
    found, home = path.resolve(), folder.resolve()
    return found.is_relative_to(home) or found.parent == _blobs(home)


def _blobs(home: Path) -> Path | None:
    """The folder of blobs that a snapshot of Hugging Face's cache, or a folder in it, links to."""
    for snapshot in (home, *home.parents):
        if snapshot.parent.name == "snapshots":
            return snapshot.parent.parent / "blobs"
    return None
