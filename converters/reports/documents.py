"""The numbers of a report as JSON, with null for numbers that are not finite."""

from __future__ import annotations

from math import isfinite
from typing import Any

from nibblecast.converters.arithmetic.accuracy import Accuracy
from nibblecast.converters.reports.counts import CodeCounts, Spread
from nibblecast.converters.reports.statistics import Layer, ModelStatistics, TensorStatistics


def model_document(statistics: ModelStatistics) -> dict[str, Any]:
    """The numbers as JSON can hold them: null for what is not finite."""
    return {
        "source": statistics.source,
        "format": statistics.format,
        "producer": statistics.producer,
        "bytes": statistics.whole.bytes,
        "elements": statistics.whole.elements,
        "bits_per_weight": statistics.whole.bits_per_weight,
        "bits_per_quantized_weight": Layer("", statistics.quantized).bits_per_weight,
        "reference": statistics.reference,
        "not_in_reference": list(statistics.unmatched),
        "accuracy": _accuracy_document(statistics.accuracy),
        "layers": [
            {
                "name": layer.name,
                "tensors": len(layer.tensors),
                "elements": layer.elements,
                "bytes": layer.bytes,
                "bits_per_weight": layer.bits_per_weight,
            }
            for layer in statistics.layers
        ],
        "tensors": [_tensor_document(tensor) for tensor in statistics.tensors],
        "losses": [
            {"tensor": loss.tensor, "kind": loss.kind, "detail": loss.detail}
            for loss in statistics.losses
            if not loss.is_exact
        ],
        "notes": [loss.text for loss in statistics.losses if loss.is_exact],
    }


def _accuracy_document(accuracy: Accuracy | None) -> dict[str, float | None] | None:
    """An accuracy as JSON can hold it."""
    return (
        None
        if accuracy is None
        else {
            "max_error": _finite(accuracy.max_error),
            "mean_square_error": _finite(accuracy.mean_square_error),
            "signal_to_noise_db": _finite(accuracy.signal_to_noise),
        }
    )


def _tensor_document(tensor: TensorStatistics) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "granularity": tensor.granularity,
        "elements": tensor.elements,
        "bytes": tensor.bytes,
        "bits_per_weight": tensor.bits_per_weight,
        "codes": _codes_document(tensor.codes),
        "scale": _spread_document(tensor.scale),
        "zero_point": _spread_document(tensor.zero_point),
        "accuracy": _accuracy_document(tensor.accuracy),
    }


def _codes_document(codes: CodeCounts | None) -> dict[str, Any] | None:
    return (
        None
        if codes is None
        else {
            "values": list(codes.values),
            "counts": list(codes.counts),
            "unused": codes.unused,
            "share_at_lowest": codes.lowest_share,
            "share_at_highest": codes.highest_share,
            "not_finite": codes.not_finite,
        }
    )


def _spread_document(spread: Spread | None) -> dict[str, Any] | None:
    return (
        None
        if spread is None
        else {
            "count": spread.count,
            "lowest": _finite(spread.lowest),
            "highest": _finite(spread.highest),
            "mean": _finite(spread.mean),
            "zeros": spread.zeros,
            "negative": spread.negative,
            "not_finite": spread.not_finite,
            "quarter_octaves": [list(pair) for pair in spread.bins],
        }
    )


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
