"""Removes secrets from URLs.

A URL may contain a password (`https://user:password@host/`) or a signature (`?X-Amz-Signature=…`), which any reader of
a report, a log or an error could use. Messages come from everywhere; libraries quote the URL that they could not reach.
So whole texts are searched for URLs where they leave the program. Otherwise each part of the program would have to know
its own secrets. In doubt text is hidden: hiding too much costs only a few letters of a message.
"""

from __future__ import annotations

import re

HIDDEN = "***"

_BETWEEN = re.compile(r'([\s"<>]+)')  # characters that no URL contains
# Path() turns "//" into "/"; one letter is a drive of Windows
_BEGINNING = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,31}:/+")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_QUERY_OR_FRAGMENT = re.compile(r"[?#]")
_PUNCTUATION = ":,.;)]}'"
_KEY = re.compile(r"[\w.-]{1,64}")


def without_secrets(text: str) -> str:
    """`text` with *** in its URLs in place of user and password, the values of the query, and the fragment. The time is
    proportional to the length of the text."""
    if ":/" not in text:
        return text
    return "".join(_hidden(piece) if ":/" in piece else piece for piece in _BETWEEN.split(text))


def without_credentials(url: str) -> str:
    """The URL without user, password, query and fragment."""
    place = _QUERY_OR_FRAGMENT.split(url, maxsplit=1)[0]
    return _without_users(place, in_rest="@" in url[len(place) :]).replace(f"{HIDDEN}@", "")


def _hidden(piece: str) -> str:
    """A text without white space, with secrets hidden. A URL may begin anywhere in it, and ends at its end."""
    first = _BEGINNING.search(piece)
    if first is None:
        return piece
    found = _QUERY_OR_FRAGMENT.search(piece, first.end())
    end = len(piece) if found is None else found.start()
    rest = piece[end:].rstrip(_PUNCTUATION)
    after = piece[end + len(rest) :]
    return _without_users(piece[:end], in_rest="@" in rest) + _without_values(rest) + after


def _without_users(address: str, *, in_rest: bool) -> str:
    """The address without user and password. fsspec chains URLs: zip://a.tflite::https://user:password@host/a.zip."""
    last = address.rfind("@")
    parts, done = [], 0
    for beginning in _BEGINNING.finditer(address):
        start = beginning.end()
        if start < done:
            continue
        slash = address.find("/", start)
        host = address[start : len(address) if slash < 0 else slash]
        if host.endswith(":") and "::" in host:  # the next URL of a chain
            host = host[: host.rfind("::")]
        end = start + len(host)
        parts.append(address[done:start])
        if "@" in host:
            parts.append(f"{HIDDEN}@{host.rpartition('@')[2]}")
        elif _HOST.fullmatch(host) or not (last > end or in_rest):
            parts.append(host)
        elif last > end:  # a password with a slash in it
            parts.append(f"{HIDDEN}@")
            end = last + 1
        else:
            parts.append(HIDDEN)
        done = end
    return "".join(parts) + address[done:]


def _without_values(rest: str) -> str:
    """A query and a fragment, of which only the query's keys are kept."""
    query, hash, fragment = rest.removeprefix("?").partition("#")
    pairs = []
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        known = _KEY.fullmatch(key) and value.strip("=")
        pairs.append(f"{key}={HIDDEN}" if known else HIDDEN if pair else "")
    return "?" * rest.startswith("?") + "&".join(pairs) + hash + HIDDEN * bool(fragment)
