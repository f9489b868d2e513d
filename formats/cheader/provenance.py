"""Where generated C comes from, as the lines of a comment: the same input gives the same lines, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.metadata import Metadata
from nibblecast.converters.storage import open_regular
from nibblecast.converters.version import __version__
from nibblecast.formats.cheader.identifiers import comment

_UNKNOWN_DIGEST = "0" * hashlib.sha256().digest_size * 2


@dataclass(frozen=True, slots=True)
class Provenance:
    """The source, its SHA-256 in hexadecimal (None where it is no file), the options."""

    source: Path | None
    options: Mapping[str, object]
    digest: str | None

    @classmethod
    def of(cls, metadata: Metadata, options: Mapping[str, object]) -> Provenance:
        """All but the digest, in whose place there are zeros: for planning, which reads no payload."""
        source = metadata.source
        is_file = source is not None and source.is_file()
        return cls(source, options, _UNKNOWN_DIGEST if is_file else None)

    def with_digest(self) -> Provenance:
        """The same with the digest, which takes reading the source. Raises CorruptFile when that fails."""
        if self.source is None or self.digest is None:
            return self
        return replace(self, digest=_digest_of(self.source))

    def lines(self) -> str:
        """The lines, each beginning with " * "."""
        origin = "a model in memory" if self.source is None else f'"{comment(self.source.name)}"'
        digest = [] if self.digest is None else [f"SHA-256 of that file: {self.digest}"]
        options = ", ".join(f"{name}={comment(str(value))}" for name, value in self.options.items())
        written = [f"Written by nibblecast {__version__} from {origin}.", *digest, f"Options: {options}"]
        return "\n".join(f" * {line}" for line in written)


def _digest_of(source: Path) -> str:
    try:
        with open_regular(source) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptFile(f"cannot be read: {error.strerror or error}", path=source) from error
