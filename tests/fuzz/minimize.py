"""Makes an input smaller that does the same: by leaving out parts, and by making what is left plainer.

Delta debugging (Zeller and Hildebrandt, 2002) over bytes; where several files belong together, over each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

from tests.fuzz import case as cases
from tests.fuzz.exercise import ALL
from tests.fuzz.findings import Finding
from tests.fuzz.limits import Limits
from tests.fuzz.readers import Reader
from tests.fuzz.worker import Runner, Worker

#: Whether bytes do the same as those before.
Does = Callable[[bytes], bool]
_FILLERS = (b"\0", b" ", b"0")
#: Seconds of the processor that an input which hangs is given.
_HANGS_AFTER = 2.0


def minimized(reader: Reader, finding: Finding, limits: Limits, seconds: float) -> Finding:
    """The finding with the smallest input that was found within so many seconds. What cannot be seen again stays as it
    was found."""
    until = time.monotonic() + seconds
    shorter = replace(limits, processor=min(limits.processor, _HANGS_AFTER))
    with Repeater(reader, shorter if finding.kind == "hang" else limits) as repeater:

        def does(blob: bytes) -> bool:
            if time.monotonic() > until:
                return False
            again = repeater.run(blob)
            return again is not None and again.key == finding.key

        if not does(finding.blob):
            return finding
        case = cases.divided(finding.blob, reader.file_name)
        for name in list(case):
            without = {key: content for key, content in case.items() if key != name}
            if without and does(cases.joined(without)):
                case = without
        for name in case:
            case[name] = smaller(case[name], lambda content, name=name: does(cases.joined({**case, name: content})))
        return replace(finding, blob=cases.joined(case))


def smaller(content: bytes, does: Does) -> bytes:
    """Leaves out ever smaller parts, as long as that leaves less; then fills what is left with plain bytes."""
    size = 0
    while size != len(content):
        size = len(content)
        content = _reduced(content, does, b"")
    for filler in _FILLERS:
        content = _reduced(content, does, filler)
    return content


def _reduced(content: bytes, does: Does, filler: bytes) -> bytes:
    """Without the parts that are not needed, or with `filler` in their place."""
    length = len(content) // 2
    while length:
        at = 0
        while at < len(content):
            part = content[at : at + length]
            tried = content[:at] + filler * len(part) + content[at + length :]
            is_plain = bool(filler) and len(set(part)) == 1 and part[:1] in _FILLERS
            if tried != content and not is_plain and does(tried):
                content = tried
                at += length if filler else 0
            else:
                at += length
        length //= 2
    return content


class Repeater:
    """Runs inputs one by one in a worker, and begins another one where an input has ended it."""

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self._reader, self._limits = reader, limits
        self._worker: Worker | None = None

    def run(self, blob: bytes) -> Finding | None:
        """What is wrong with the input, whichever way it is written."""
        if self._worker is None:
            self._worker = Worker(self._reader, _serve, self._limits)
        try:
            self._worker.pipe.send_bytes(blob)
            found: Finding | None = self._worker.pipe.recv()
        except (EOFError, OSError):
            found = self._worker.end()
            self._worker = None
        return found

    def __enter__(self) -> Repeater:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()


def _serve(runner: Runner, pipe: Connection) -> None:
    while True:
        pipe.send(runner.run(pipe.recv_bytes(), pick=ALL))
