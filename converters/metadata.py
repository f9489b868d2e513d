"""Facts beside the tensors: where a model comes from, which operators use a tensor, and what was not kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from nibblecast.converters.errors import line

LossKind = Literal["dropped", "rounded", "requantized", "reinterpreted", "widened", "expanded", "renamed"]
#: What a person is told about each kind. A note is an exact change of form: the same values, bit for bit.
_WORDS: Mapping[LossKind, Literal["not kept", "changed", "note"]] = MappingProxyType(
    {
        "dropped": "not kept",  # left out
        "rounded": "changed",  # values round differently than in the source's library
        "requantized": "changed",  # other codes for values that had codes already
        "reinterpreted": "changed",  # read under an assumption: the file does not say enough
        "widened": "note",  # elements or parameters in a wider type that holds them exactly
        "expanded": "note",  # elements or parameters repeated, or zeros written out
        "renamed": "note",  # another name for the same tensor
    }
)


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of a model's graph: the name of its dtype (empty where it is no tensor), and its shape,
    None where even the number of axes is open; a size that is open is its name, or empty."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True)
class Metadata:
    """Where a model comes from: the format's name, the program that made it (as the file says), the file itself, and
    what the format says about the model as a whole: its graph's operators counted, its inputs and outputs, the
    operator sets that it is written in, by domain."""

    format: str = ""
    producer: str = ""
    source: Path | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    opsets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Activation:
    """A quantized tensor that is computed at run time: real = (code - zero_point) * scale, one scale for all of it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class Use:
    """An operator that consumes a tensor: its name in the source's vocabulary, the position among its inputs, and the
    axis of the tensor along which the operator's output channels run (None where the operator has no such axis).

    `sum_axes` are the tensor's axes that the operator sums products over, the inputs' channels first, where the tensor
    is a weight that may as well be quantized; () where rows of it are looked up and nothing is summed, or where the
    axes are not known; None for all that is no such weight: biases, other data, weights of operators that take codes.
    The reader says so, because only a format knows its operators: whatever has sum axes can be quantized, an operator
    of a third party's format too.

    `activation` and `result` are the operator's first input and its first output where the tensor is one of its weights
    and these are quantized: what fixed-point kernels compute their multipliers from.
    """

    operator: str
    input: int
    channel_axis: int | None = None
    activation: Activation | None = None
    result: Activation | None = None
    sum_axes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """What an operator does with one of its inputs, as a format's table of operators says: `Use`'s axes, where negative
    ones count from the end, and those that a tensor does not have are left out."""

    channel_axis: int | None = None
    sum_axes: tuple[int, ...] | None = None

    def use(self, operator: str, position: int, axes: Sequence[int] | None) -> Use:
        """The use of a tensor whose `axes`, in this order, are those that the operator sees (None: not known)."""
        seen = axes or ()

        def own(wanted: Iterable[int]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(seen[axis] for axis in wanted if -len(seen) <= axis < len(seen)))

        channels = own(() if self.channel_axis is None else (self.channel_axis,))
        sums = None if self.sum_axes is None else own(self.sum_axes)
        return Use(operator, position, channels[0] if channels else None, sum_axes=sums)


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that a conversion did not carry over as it was; `tensor` is empty when it concerns the whole model.

    Readers, stages and writers report exact changes of form by the same record, because only its kind tells them apart:
    `is_exact` ones are shown as notes, and `--fail-on-loss` lets them pass. `detail` says what becomes of the tensor.
    """

    tensor: str
    kind: LossKind
    detail: str

    @property
    def word(self) -> Literal["not kept", "changed", "note"]:
        """The first word of a message: something is left out, is changed, or only has another form."""
        return _WORDS[self.kind]

    @property
    def is_exact(self) -> bool:
        """Whether this is only a change of form, with the same values bit for bit."""
        return self.word == "note"

    @property
    def text(self) -> str:
        """The tensor, its name shortened where it is long, and what becomes of it."""
        return f"{line(self.tensor) or 'the model'}: {self.detail}"

    def __str__(self) -> str:
        return f"{self.word}: {self.text}"
