"""The numbers of a model: each tensor's codes and parameters are read once, in pieces, and only counts are kept.

Plain tensors are read only where there is a reference to compare them with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from nibblecast.converters.arithmetic.accuracy import Accuracy, errors
from nibblecast.converters.arithmetic.dtypes import dtype_name, is_integer
from nibblecast.converters.compare.comparison import common_rows
from nibblecast.converters.errors import UsageError
from nibblecast.converters.interfaces import Progress
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.reports.counts import CodeCounts, Spread, codes_of, spread_of
from nibblecast.converters.sizes import bits_per_weight, stored_bytes, weights_of

_FIRST_NUMBER = re.compile(r"(?:[^./]*[./])*?[0-9]{1,9}(?=[./]|$)")
_LAST_NUMBER = re.compile(r"(?<![^./])[0-9]{1,9}$")


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What is known of a tensor. `bytes` and `bits_per_weight` include the parameters. `codes` is None for plain
    tensors and for codes wider than 8 bits, `accuracy` where there is nothing to compare the values with."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    granularity: str
    elements: int
    bytes: int
    bits_per_weight: float
    codes: CodeCounts | None = None
    scale: Spread | None = None
    zero_point: Spread | None = None
    zero_point_codes: CodeCounts | None = None
    accuracy: Accuracy | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the elements are codes."""
        return self.scale is not None


@dataclass(frozen=True, slots=True)
class Layer:
    """Tensors of one layer, by their names."""

    name: str
    tensors: tuple[TensorStatistics, ...]

    @property
    def elements(self) -> int:
        """Of all its tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Of all its tensors, parameters included."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def quantized_bytes(self) -> int:
        """Of its quantized tensors."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.is_quantized)

    @property
    def bits_per_weight(self) -> float:
        """Of all its tensors; 0 where it has no elements."""
        return 8 * self.bytes / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """A model's numbers. `reference` is the name of what it was compared with, `unmatched` says which tensors have no
    counterpart of the same name and shape there."""

    source: str
    format: str
    producer: str
    tensors: tuple[TensorStatistics, ...]
    losses: tuple[Loss, ...] = ()
    reference: str | None = None
    unmatched: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[TensorStatistics, ...]:
        """The quantized tensors."""
        return tuple(tensor for tensor in self.tensors if tensor.is_quantized)

    @property
    def whole(self) -> Layer:
        """All tensors together."""
        return Layer("", self.tensors)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The tensors by layer, in the order of the file; numbered ones by their numbers, from where the first is."""
        grouped: dict[str, list[TensorStatistics]] = {}
        places: dict[str, int] = {}
        for tensor in self.tensors:
            grouped.setdefault(layer_of(tensor.name), []).append(tensor)
        for name in grouped:
            places.setdefault(_LAST_NUMBER.sub("", name), len(places))

        def place(name: str) -> tuple[int, int]:
            number = _LAST_NUMBER.search(name)
            return places[_LAST_NUMBER.sub("", name)], 0 if number is None else int(number[0])

        return tuple(Layer(name, tuple(grouped[name])) for name in sorted(grouped, key=place))

    @property
    def accuracy(self) -> Accuracy | None:
        """Of all tensors that were compared."""
        compared = [tensor.accuracy for tensor in self.tensors if tensor.accuracy is not None]
        return Accuracy.total(compared) if compared else None


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name as far as the first part that is a number (model.layers.3), or else
    without its last part. Parts are separated by dots or slashes."""
    numbered = _FIRST_NUMBER.match(name)
    if numbered is not None:
        return numbered[0]
    end = max(name.rfind("."), name.rfind("/"))
    return name[:end] if end > 0 else name


@np.errstate(all="ignore")  # numbers out of files may be anything
def measure(model: Model, reference: Model | None = None, progress: Progress | None = None) -> ModelStatistics:
    """The numbers of `model`; `progress` is told of its bytes. `reference` has the floats that the codes stand for, by
    the same names. Raises UsageError where it has no tensor of the same name and shape."""
    weights = weights_of(model)
    floats = {} if reference is None else weights_of(reference)
    matched = {name for name in weights if name in floats and _is_comparable(weights[name], floats[name])}
    if reference is not None and weights and not matched:
        raise UsageError(
            "the reference has no tensor of the same name and shape: `nibblecast inspect` lists both",
            path=reference.metadata.source,
        )
    total, done = sum(tensor.nbytes for tensor in weights.values()), 0
    measured = []
    for name, tensor in weights.items():
        measured.append(_tensor_statistics(tensor, floats[name] if name in matched else None))
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        tensor.release()
        if name in matched:
            floats[name].release()
    metadata = model.metadata
    return ModelStatistics(
        source=_source_name(model),
        format=metadata.format,
        producer=metadata.producer,
        tensors=tuple(measured),
        losses=model.losses,
        reference=None if reference is None else _source_name(reference),
        unmatched=() if reference is None else tuple(name for name in weights if name not in matched),
    )


def _source_name(model: Model) -> str:
    source = model.metadata.source
    return "" if source is None else source.absolute().name


def _is_comparable(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not any(t.dtype.kind == "c" or t.dtype.names for t in (a, b))


def _tensor_statistics(tensor: Tensor, reference: Tensor | None) -> TensorStatistics:
    quantization = tensor.quantization
    scale = zero_point = zero_point_codes = None
    if quantization is not None:
        scale = spread_of(quantization.scale)
        if quantization.zero_point is not None:
            zero_point = spread_of(quantization.zero_point)
            zero_point_codes = codes_of(quantization.zero_point) if is_integer(quantization.zero_point.dtype) else None
    return TensorStatistics(
        name=tensor.name,
        shape=tensor.shape,
        dtype=dtype_name(tensor.dtype),
        granularity=tensor.granularity,
        elements=tensor.size,
        bytes=stored_bytes(tensor),
        bits_per_weight=bits_per_weight(tensor),
        codes=None if quantization is None else codes_of(tensor),
        scale=scale,
        zero_point=zero_point,
        zero_point_codes=zero_point_codes,
        accuracy=None if reference is None else accuracy_against(reference, tensor),
    )


def accuracy_against(reference: Tensor, tensor: Tensor) -> Accuracy:
    """How near the values of `tensor`, as float32, are to those of `reference`, which has the same shape."""
    parts: list[Accuracy] = []
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite makes an error that is not
        for _, wanted, got in common_rows(reference, tensor):
            if wanted.size:
                found = errors(wanted.dequantize(np.float32).reshape(-1), got.dequantize(np.float32).reshape(-1))
                parts.append(Accuracy(tensor.name, "", wanted.size, *found))
    total = Accuracy.total(parts)
    return Accuracy(tensor.name, "", total.elements, total.max_error, total.squared_error, total.squared_values)
