"""Runs TFLite models with LiteRT, for comparing what models compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import RunPort
from nibblecast.formats.tflite.reader import TFLiteReader

_WRONG_REFERENCES = frozenset({"LOCAL_RESPONSE_NORMALIZATION", "SUM"})
_NO_KERNEL = "Didn't find op"


class LiteRTRunner:
    """A model in LiteRT's interpreter with the reference kernels, which define the right results. The default kernels
    are used where the reference kernels of LiteRT 2.3 are wrong or missing. They take weights in blocks for zeros, omit
    a channel in LOCAL_RESPONSE_NORMALIZATION, and return the zero point as SUM of integers; there is none for CEIL."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        model = TFLiteReader().read(path)
        in_blocks = any(tensor.granularity.startswith("blockwise") for tensor in model.values())
        is_wrong = in_blocks or not _WRONG_REFERENCES.isdisjoint(getattr(model.graph, "operators", ()))
        default, reference = OpResolverType.AUTO, OpResolverType.BUILTIN_REF
        for resolver in (default,) if is_wrong else (reference, default):
            try:
                self._interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver)
                self._interpreter.allocate_tensors()
                break
            except (RuntimeError, ValueError) as error:
                if resolver is default or _NO_KERNEL not in str(error):
                    raise Unsupported(f"LiteRT does not run it: {_line(error)}", path=path) from error
        self._path = path

    @property
    def inputs(self) -> tuple[RunPort, ...]:
        """The inputs of the first subgraph."""
        return tuple(map(_port, self._interpreter.get_input_details()))

    @property
    def outputs(self) -> tuple[RunPort, ...]:
        """The outputs of the first subgraph."""
        return tuple(map(_port, self._interpreter.get_output_details()))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """The outputs by name."""
        details = self._interpreter.get_input_details()
        try:
            for detail in details:
                self._interpreter.resize_tensor_input(detail["index"], inputs[detail["name"]].shape)
            self._interpreter.allocate_tensors()
            for detail in details:
                self._interpreter.set_tensor(detail["index"], inputs[detail["name"]])
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise Unsupported(f"LiteRT does not run it: {_line(error)}", path=self._path) from error
        found = self._interpreter.get_output_details()
        return {detail["name"]: self._interpreter.get_tensor(detail["index"]) for detail in found}


def _port(detail: Mapping[str, Any]) -> RunPort:
    scales = detail["quantization_parameters"]["scales"]
    dtype = np.dtype(detail["dtype"])
    shape = tuple(int(size) for size in detail["shape"])
    return RunPort(detail["name"], dtype, shape, float(scales[0]) if len(scales) == 1 and dtype.kind in "iu" else None)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
