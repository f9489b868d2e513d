"""Writes the files of a plan: shards first, in their order, then companions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from nibblecast.converters.interfaces import OutputFile, Plan, Shard
from nibblecast.converters.output.atomic import atomic_outputs
from nibblecast.converters.output.folders import atomic_folder
from nibblecast.converters.storage import open_regular

_COPIED_BYTES = 1 << 22


class Staged(Protocol):
    """Files that are written at temporary paths, and then put in place."""

    @property
    def main(self) -> Path:
        """The temporary path of the file or folder that the user named."""
        ...

    def has(self, file: OutputFile) -> bool:
        """Whether an earlier run has completed the file."""
        ...

    def file(self, file: OutputFile) -> AbstractContextManager[BinaryIO]:
        """A file to write; it is flushed to disk (fsync) when the block ends without an exception."""
        ...


def staging(plan: Plan, intended: Callable[[], str], *, resume: bool) -> AbstractContextManager[Staged]:
    """Temporary paths for a plan's files, which are put in place when the block ends without an exception. `intended`
    gives the run's intent (`folders.intent`)."""
    if plan.folder is None:
        return atomic_outputs([file.path for file in plan.files])
    return atomic_folder(plan.folder, plan, intended(), resume=resume)


def write_plan(plan: Plan, staged: Staged, wrote: Callable[[int], None]) -> None:
    """Writes the plan's files, except for complete shards; `wrote` is called with the bytes of payload."""
    for shard in plan.shards:
        write_shard(shard, staged, wrote)
    for companion in plan.companions:
        with staged.file(companion.file) as stream:
            if isinstance(companion.content, bytes):
                stream.write(companion.content)
            else:
                with open_regular(companion.content) as source:
                    shutil.copyfileobj(source, stream, _COPIED_BYTES)


def write_shard(shard: Shard, staged: Staged, wrote: Callable[[int], None]) -> None:
    """Writes a shard, unless it is complete already."""
    if staged.has(shard.file):
        wrote(shard.nbytes)
        return
    with staged.file(shard.file) as stream:
        shard.write(stream, wrote)
