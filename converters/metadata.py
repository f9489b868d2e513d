"""What a reader knows beside the tensors: where a model comes from, and which operators use a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


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

    `activation` and `result` are the operator's first input and its first output where the tensor is one of its weights
    and these are quantized: what fixed-point kernels compute their multipliers from.
    """

    operator: str
    input: int
    channel_axis: int | None = None
    activation: Activation | None = None
    result: Activation | None = None
