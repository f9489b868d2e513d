"""The graph that the ONNX reader gives with the weights, so that a writer can change the file instead of making one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nibblecast.converters.ir import Tensor
from nibblecast.formats.onnx.file.graph import ParsedModel, TensorHeader
from nibblecast.formats.onnx.file.payload import PayloadTensors

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True, slots=True, eq=False)
class OnnxGraph:
    """The file that a model was read from. `tensors` are the model's tensors as they were read, `headers` their
    initializers, both by the tensors' names.

    The graph stays the file and is not turned into a graph language of our own. A conversion changes weights only, so
    most nodes never have to be understood, and operators that this code does not know survive."""

    parsed: ParsedModel
    payloads: PayloadTensors
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, TensorHeader]

    def onnx_ir(self) -> onnx_ir.Model:
        """The graph with onnx_ir's classes."""
        import onnx_ir

        return onnx_ir.load(self.payloads.file.path)
