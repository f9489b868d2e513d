"""What a finding is: any other end of an input than being read, or being refused in one line."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: No line for a person is longer.
MOST_OF_LINE = 10_000
_PACKAGES = ("nibblecast",)


class Odd(Exception):
    """Something that must not happen, found by looking: `kind` is what, `where` in which place of the code."""

    def __init__(self, kind: str, detail: str, where: str = "") -> None:
        super().__init__(detail)
        self.kind, self.detail, self.where = kind, detail, where


@dataclass(frozen=True)
class Finding:
    """An input with what it does. Findings of one reader, kind and place count as one."""

    reader: str
    kind: str
    where: str
    detail: str = field(compare=False)
    blob: bytes = field(compare=False, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """What has to stay the same while it is made smaller."""
        return self.kind, self.where

    def __str__(self) -> str:
        return f"{self.reader}: {self.kind} in {self.where or 'an unknown place'}: {self.detail[:300]}"


def described(error: BaseException) -> tuple[str, str, str]:
    """Kind, place and detail of an exception that ended an input."""
    if isinstance(error, Odd):
        return error.kind, error.where or place_of(error.__cause__ or error), error.detail
    kind = "memory" if isinstance(error, MemoryError) else f"exception {type(error).__name__}"
    return kind, place_of(error), _text(error)


def place_of(error: BaseException) -> str:
    """The innermost function of this project that an exception came through."""
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    return next((place for file, name in reversed(frames) if (place := _place(file, name))), "")


def place_in_dump(text: str) -> str:
    """The same out of what faulthandler writes, where the innermost function comes first."""
    for line in text.splitlines():
        if line.startswith('  File "'):
            file, _, rest = line.removeprefix('  File "').partition('"')
            place = _place(file, rest.rpartition(" in ")[2])
            if place:
                return place
    return ""


def _place(file: str, function: str) -> str:
    path = Path(file)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in _PACKAGES:
        return ""
    return f"{path.relative_to(ROOT)}:{function}"


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:1000]}"
    except Exception as other:  # an error whose own text fails is still a finding
        return f"{type(error).__name__}, whose text is a {type(other).__name__}"
