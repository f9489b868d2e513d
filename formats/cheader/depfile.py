"""A rule for make and ninja that says what generated files are made of, as compilers write it with -MD -MP."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from nibblecast.converters.errors import UsageError, brief

_ESCAPED = re.compile(r"(\\*)([ #:])")
_IMPOSSIBLE = re.compile(r"[\r\n\t%|;=*?]")


def dependency_file(outputs: Iterable[Path], inputs: Iterable[Path]) -> bytes:
    """The rule `outputs: inputs`, with the names as the user spelled them, and an empty one for each input, so that
    make goes on when one is no longer there. Raises UsageError for a name that cannot stand in a rule."""
    targets, sources = [list(map(_escaped, paths)) for paths in (outputs, inputs)]
    rules = [f"{' '.join(targets)}: {' '.join(sources)}".rstrip(), *(f"{source}:" for source in sources)]
    return os.fsencode("\n\n".join(rules) + "\n")


def _escaped(path: Path) -> str:
    """A name with the escapes that both make (GNU's 4.3, "Rule Syntax") and ninja (depfile_parser.in.cc) take."""
    name = str(path)
    if (wrong := _IMPOSSIBLE.search(name)) is not None:
        raise UsageError(f"a name with {brief(wrong[0])} cannot stand in a depfile: give it another name", path=path)
    return _ESCAPED.sub(r"\1\1\\\2", name.replace("$", "$$"))
