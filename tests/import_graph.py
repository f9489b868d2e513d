"""Which of our modules import which, as their text says: at the top and inside functions alike.

What is imported for annotations only (`if TYPE_CHECKING:`) counts as well: two files whose types need each other cannot
be read apart. `import_module` with a name out of a table does not count: that is how plugins are found.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"nibblecast.converters": "converters", "nibblecast.formats": "formats", "nibblecast": "nibblecast"}


@cache
def files() -> Mapping[str, Path]:
    """The file of each module by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).glob("*.py" if package == "nibblecast" else "**/*.py")):
            parts = (*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """Everything that each module imports, ours or not; ours by the names of modules."""
    return {module: frozenset(_imported(path)) for module, path in files().items()}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in files() else node.module


def cycles() -> list[list[str]]:
    """The groups of modules that import each other, directly or through others of the group."""
    reached = {module: _reached(module) for module in imports()}
    groups = {
        tuple(sorted({module, *(other for other in reached[module] if module in reached[other])}))
        for module in imports()
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def _reached(start: str) -> set[str]:
    """All modules of ours that a module imports, and those that they import, and so on; itself if there is a circle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = {name for name in imports()[waiting.pop()] if name in files()} - found
        found |= new
        waiting += new
    return found
