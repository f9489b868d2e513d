"""Compares what two models compute: both run on the same inputs, each in its own format's runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from nibblecast.converters import plugins
from nibblecast.converters.errors import CorruptFile, UsageError
from nibblecast.converters.input.paths import AnyPath, input_path
from nibblecast.converters.interfaces import Runner, RunPort
from nibblecast.converters.pipeline import readable
from nibblecast.converters.storage import open_regular

_MOST_INDEX = 10  # integers that are no codes are as a rule indices: small ones are valid everywhere


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far an output of the second model is from the first one's: the largest and the mean difference, the largest
    value, and the largest difference in quantization steps where the first one's output is quantized. All in real
    values, codes decoded."""

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float
    scale_of_values: float
    steps: float | None

    @property
    def relative(self) -> float:
        """The largest difference in terms of the largest value."""
        return self.largest / self.scale_of_values if self.scale_of_values else (0.0 if not self.largest else np.inf)


def compare_outputs(
    a: AnyPath, b: AnyPath, *, inputs: AnyPath | Mapping[str, NDArray[Any]] | None = None, seed: int = 0
) -> list[OutputDifference]:
    """Runs two models, TFLite ones by LiteRT and ONNX ones by onnxruntime, on the same inputs and compares their
    outputs, those of one name, or else of one position. `inputs` are arrays by the first model's names, or an .npz file
    of such; random where there are none. Raises UsageError where the inputs do not fit, MissingDependency, which names
    the package to install, where a runtime is missing, Unsupported where it does not run a model."""
    first, second = input_path(a), input_path(b)
    given = dict(inputs or {}) if inputs is None or isinstance(inputs, Mapping) else read_inputs(input_path(inputs))
    runners = [_runner(path) for path in (first, second)]
    unknown = set(given) - {port.name for port in runners[0].inputs}
    if unknown:
        known = ", ".join(port.name for port in runners[0].inputs)
        raise UsageError(f"unknown input '{sorted(unknown)[0]}': the model has {known}", path=first)
    rng = np.random.default_rng(seed)
    values = [_fitting(given[p.name], p, first) if p.name in given else _random(p, rng) for p in runners[0].inputs]
    pairs = _paired(runners[0].inputs, runners[1].inputs, second)
    fed = {other.name: values[position] for position, other in pairs}
    results = [
        runners[0].run({port.name: value for port, value in zip(runners[0].inputs, values, strict=True)}),
        runners[1].run(fed),
    ]
    outputs = _paired(runners[0].outputs, runners[1].outputs, second, strict=False)
    return [
        _difference(runners[0].outputs[position], results[0][runners[0].outputs[position].name], results[1][other.name])
        for position, other in outputs
    ]


def read_inputs(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by their names. Raises CorruptFile."""
    try:
        with open_regular(path) as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files} if isinstance(loaded, NpzFile) else {}
    except Exception as error:  # those of ZIP, of deflate, of struct, of memory, and whatever else NumPy has
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CorruptFile(f"cannot be read as named arrays (.npz): {reason}", path=path) from error
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise CorruptFile(f"'{name}' is not a NumPy array", path=path)
    if not arrays:
        raise CorruptFile("contains no named arrays: write it with np.savez", path=path)
    return arrays


def _runner(path: Path) -> Runner:
    with readable(path):
        return plugins.runner(plugins.detect(path), path)


def _paired(
    ours: Sequence[RunPort], theirs: Sequence[RunPort], path: Path, *, strict: bool = True
) -> list[tuple[int, RunPort]]:
    """Positions in `ours` with what they are in `theirs`: of one name, where all names agree; else of one position."""
    by_name = {port.name: port for port in theirs}
    if all(port.name in by_name for port in ours):
        return [(position, by_name[port.name]) for position, port in enumerate(ours)]
    if len(theirs) < len(ours) or (strict and len(theirs) != len(ours)):
        raise UsageError(f"has {len(theirs)} inputs or outputs where the other model has {len(ours)}", path=path)
    return list(enumerate(theirs[: len(ours)]))


def _random(port: RunPort, rng: np.random.Generator) -> NDArray[Any]:
    if port.dtype.kind == "b":
        return rng.integers(0, 2, port.shape).astype(np.bool_)
    if port.dtype.kind in "iu" and port.scale is None and port.dtype.itemsize > 2:
        return rng.integers(0, _MOST_INDEX, port.shape).astype(port.dtype)
    if port.dtype.kind in "iu":
        limits = np.iinfo(port.dtype)
        return rng.integers(limits.min, limits.max + 1, port.shape).astype(port.dtype)
    if port.dtype == np.dtype(object):
        raise UsageError(f"input '{port.name}' is not numeric: give it with --input")
    return rng.standard_normal(port.shape).astype(port.dtype)


def _fitting(value: NDArray[Any], port: RunPort, path: Path) -> NDArray[Any]:
    if value.ndim != len(port.shape):
        raise UsageError(
            f"input '{port.name}' has {value.ndim} axes, but the model expects {len(port.shape)}", path=path
        )
    return value.astype(port.dtype, copy=False)


def _difference(port: RunPort, ours: NDArray[Any], theirs: NDArray[Any]) -> OutputDifference:
    if ours.shape != theirs.shape:
        raise UsageError(f"output '{port.name}' has shape {theirs.shape} where the other model's has {ours.shape}")
    a, b = np.asarray(ours).astype(np.float64), np.asarray(theirs).astype(np.float64)
    both_nan = np.isnan(a) & np.isnan(b)
    distance = np.where(both_nan, 0.0, np.abs(a - b))
    largest, mean = float(distance.max(initial=0.0)), float(distance.mean()) if distance.size else 0.0
    step = port.scale
    unit = 1.0 if step is None else step
    top = float(np.nanmax(np.abs(a), initial=0.0))
    return OutputDifference(
        port.name, ours.shape, largest * unit, mean * unit, top * unit, None if step is None else largest
    )
