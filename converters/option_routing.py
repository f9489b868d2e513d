"""Which option goes where: to the source's reader, to the writers that have one of its name, or to the one it names.

Options are keyword arguments, or `--opt KEY=VALUE`; `FORMAT.KEY` is for that format only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nibblecast.converters import plugins
from nibblecast.converters.errors import UsageError
from nibblecast.converters.options import describe
from nibblecast.converters.pipeline import readable


def reader_and_writer_options(options: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the source's reader, and those of writers."""
    if not options:
        return {}, {}
    with readable(source):
        format = plugins.detect(source)
    known = {help.name for help in plugins.reader_options(format)}
    names = {key: key.removeprefix(f"{format.name}.") for key in options}
    read_with = {name: options[key] for key, name in names.items() if name.replace("_", "-") in known}
    return read_with, {key: options[key] for key, name in names.items() if name not in read_with}


def reader_options(options: Mapping[str, Any], paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The options of the reader of each file. Raises UsageError for one that none of them has."""
    read_with = {path: reader_and_writer_options(options, path)[0] for path in paths}
    if unknown := [key for key in options if not any(key.rpartition(".")[2] in own for own in read_with.values())]:
        raise UsageError(f"no reader of these files has an option '{unknown[0]}'")
    return read_with


def writer_options(options: Mapping[str, Any], formats: Sequence[plugins.Format]) -> list[dict[str, Any]]:
    """The options of each target: those that its writer has, or those given as `format.option`. Raises UsageError for
    one that no target's writer has."""
    known = {f.name: {help.name for help in describe(plugins.writer(f).options)} for f in formats}
    assigned: list[dict[str, Any]] = [{} for _ in formats]
    for key, value in options.items():
        prefix, _, rest = key.partition(".")
        wanted, name = ({prefix}, rest) if rest and prefix in known else (set(known), key)
        takers = [f for f in wanted if name.replace("_", "-") in known[f]]
        if not takers:
            have = "; ".join(f"{f} has {', '.join(sorted(names)) or 'none'}" for f, names in known.items())
            raise UsageError(f"no target has an option '{key}': {have}")
        for format, own in zip(formats, assigned, strict=True):
            if format.name in takers:
                own[name] = value
    return assigned


def options_of(options: Mapping[str, Any], format: str) -> dict[str, Any]:
    """The options as the format's writer calls them."""
    return {key.removeprefix(f"{format}."): value for key, value in options.items()}
