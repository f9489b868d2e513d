"""JSON from a file: an object, or an error that says what was found instead."""

from __future__ import annotations

import json
from typing import Any

from nibblecast.converters.errors import CorruptFile, brief

_LONGEST_REASON = 120


def json_object(content: str | bytes, what: str, *, tensor: str | None = None, unique: bool = False) -> dict[str, Any]:
    """Parses `content` as a JSON object. `what` names it in the message, e.g. "its header". Raises CorruptFile for any
    other text, and with `unique` for a duplicate key: the parser would drop the first value."""
    try:
        found = json.loads(content, object_pairs_hook=_without_duplicates if unique else None)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what} is not a JSON object: {str(error)[:_LONGEST_REASON]}", tensor=tensor) from None
    if not isinstance(found, dict):
        raise CorruptFile(f"{what} is not a JSON object: it is {brief(found)}", tensor=tensor)
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {brief(name)} is there twice")
        found[name] = value
    return found
