"""Runs ONNX models with onnxruntime, for comparing what models compute."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT32, FLOAT64
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import RunPort

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {
    "float": FLOAT32,
    "double": FLOAT64,
    "bfloat16": BFLOAT16,
} | {np.dtype(t).name: np.dtype(t) for t in ("f2", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?")}


class OnnxRuntimeRunner:
    """A model on onnxruntime's CPU. Optimizations are off: with them, products with 4-bit weights round activations to
    8 bits, and products with 2-bit weights are wrong (onnxruntime 1.32)."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = precise_session(path, options)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise Unsupported(f"onnxruntime does not load it: {_line(error)}", path=path) from error
        self._path = path

    @property
    def inputs(self) -> tuple[RunPort, ...]:
        """The graph's inputs, without those that have initial values."""
        return tuple(map(_port, self._session.get_inputs()))

    @property
    def outputs(self) -> tuple[RunPort, ...]:
        """The graph's outputs."""
        return tuple(map(_port, self._session.get_outputs()))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """The outputs by name."""
        names = [port.name for port in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise Unsupported(f"onnxruntime does not run it: {_line(error)}", path=self._path) from error


def precise_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on the CPU whose 8-bit products do not overflow. By default, processors without VNNI add them in 16
    bits (session.x64quantprecision in onnxruntime_session_options_config_keys.h). Raises what onnxruntime raises."""
    import onnxruntime

    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # this option's rewriting fails if two operators share a weight (onnxruntime 1.32)
        options.add_session_config_entry("session.x64quantprecision", "0")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _port(argument: Any) -> RunPort:
    found = re.fullmatch(r"tensor\((\w+)\)", argument.type)
    dtype = _DTYPES.get(found[1], np.dtype(object)) if found else np.dtype(object)
    return RunPort(argument.name, dtype, tuple(size if isinstance(size, int) else 1 for size in argument.shape))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
