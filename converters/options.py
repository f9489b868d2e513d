"""Typed options of writers, from the text of `--opt key=value` or from keyword arguments.

A writer declares them as a frozen dataclass of `converters.interfaces.option` fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Size

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class OptionHelp:
    """What to tell a person about one option."""

    name: str
    values: str
    default: str
    help: str


@cache
def _hints(options: type) -> Mapping[str, Any]:
    """The types of its fields; evaluating annotations takes a while."""
    return get_type_hints(options)


def describe(options: type) -> list[OptionHelp]:
    """The options of a writer's dataclass, in its order."""
    hints = _hints(options)
    return [
        OptionHelp(
            _spelled(field), _values(hints[field.name]), _text(field.default), str(field.metadata.get("help", ""))
        )
        for field in fields(options)
    ]


def parse(options: type, given: Mapping[str, Any], format_name: str) -> Any:
    """An instance of the dataclass `options`. Values may be text or of the right type already; names may have hyphens.
    Raises UsageError, with what is possible, for an unknown name or an impossible value."""
    if not given:
        return options()
    hints = _hints(options)
    known = {_spelled(field): field for field in fields(options)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = known.get(name.replace("_", "-"))
        if field is None:
            raise UsageError(f"format '{format_name}' has no option '{name}': it has {', '.join(known) or 'none'}")
        values[field.name] = _value(hints[field.name], value, f"option {name} of format '{format_name}'")
    return options(**values)


def parse_size(text: str, what: str) -> Size:
    """Bytes from 1000, 256K, 1.5M, 2G (powers of 1024). Raises UsageError naming `what` for anything else."""
    matched = _SIZE.fullmatch(text.strip())
    if matched is None:
        raise UsageError(f"{what}: '{text}' is not a size (e.g. 1000, 256K, 1.5M or 2G)")
    return Size(float(matched[1]) * _UNITS[matched[2].upper()])


def _spelled(field: Field[Any]) -> str:
    return field.name.replace("_", "-")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _value(hint: Any, value: Any, what: str) -> Any:
    alternatives = _alternatives(hint)
    if value is None and NoneType in alternatives:
        return None
    wanted = next(alternative for alternative in alternatives if alternative is not NoneType)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise UsageError(f"{what}: '{value}' is not one of {', '.join(map(str, get_args(wanted)))}")
        return value
    if wanted is bool:
        parsed = value if isinstance(value, bool) else _BOOLS.get(str(value).lower())
        if parsed is None:
            raise UsageError(f"{what}: '{value}' is neither true nor false")
        return parsed
    if wanted is Size:
        return parse_size(str(value), what)
    try:
        return wanted(value)
    except ValueError:
        raise UsageError(f"{what}: '{value}' is not a valid {wanted.__name__}") from None


def _values(hint: Any) -> str:
    wanted = next(alternative for alternative in _alternatives(hint) if alternative is not NoneType)
    if get_origin(wanted) is Literal:
        return "|".join(map(str, get_args(wanted)))
    names: dict[Any, str] = {bool: "true|false", Size: "SIZE", int: "NUMBER", str: "TEXT"}
    return names[wanted]


def _text(default: Any) -> str:
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)
