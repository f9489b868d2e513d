"""What onnx's own checker says of a file: valid by the schema, and of consistent types and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.errors import VerificationFailed


def validate(path: Path, source: Path | None = None) -> Sequence[str]:
    """Has onnx check the model at `path` with shape inference; returns what a person should know of that. Raises
    VerificationFailed when onnx refuses it, unless it refuses `source`, the file that it was made of, as well."""
    reason = _refusal(path)
    if reason is None:
        return ()
    if source is not None and _refusal(source) is not None:
        return (f"onnx.checker refuses {path.name}, and {source.name} likewise: {reason}",)
    raise VerificationFailed(f"onnx.checker refuses it: {reason}", path=path)


def _refusal(path: Path) -> str | None:
    from onnx import checker, shape_inference

    try:
        checker.check_model(str(path), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        return " ".join(str(error).split())[:200]
    return None
