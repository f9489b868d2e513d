"""Checks a file with onnx's own checker: valid by the schema, with consistent types and shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nibblecast.converters.errors import VerificationFailed
from nibblecast.converters.names import is_unicode
from nibblecast.converters.storage import read_regular

_HANDLES = Path("/proc/self/fd")


def validate(path: Path, source: Path | None = None) -> Sequence[str]:
    """Checks the model at `path` with onnx and its shape inference; returns notes for the user. Raises
    VerificationFailed if onnx refuses it, unless onnx also refuses `source`, the file that it was made from."""
    reason = _refusal(path)
    if reason is None:
        return ()
    if source is not None and _refusal(source) is not None:
        return (f"onnx.checker refuses {path.name}, and {source.name} likewise: {reason}",)
    raise VerificationFailed(f"onnx.checker refuses it: {reason}", path=path)


def _refusal(path: Path) -> str | None:
    from onnx import checker, shape_inference

    try:
        with _as_onnx_takes_it(path) as model:
            checker.check_model(model, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        return " ".join(str(error).split())[:200]
    return None


@contextmanager
def _as_onnx_takes_it(path: Path) -> Iterator[str | bytes]:
    """The path if it is UTF-8, because onnx takes no other. If only the folder's name is not UTF-8, the folder is
    opened. If the file's name is not, this is the file's content: such a file cannot have external data, because they
    would have its name."""
    if is_unicode(str(path)):
        yield str(path)
    elif is_unicode(path.name) and _HANDLES.is_dir():
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            yield str(_HANDLES / str(handle) / path.name)
        finally:
            os.close(handle)
    else:
        yield read_regular(path)
