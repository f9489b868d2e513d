"""What a user can choose about an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nibblecast.converters.interfaces import Size, option

QuantizedLayout = Literal["", "qdq", "matmulnbits"]


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """Options of the ONNX writer."""

    opset: int | None = option(None, "operator set, 13 to 25; by default 21, or the first that has the model's types")
    external_data: Size | None = option(
        None, "weights of at least this many bytes go to FILE.data; by default only when the model would pass 1.5 GB"
    )
    layout: Literal["", "qdq", "matmulnbits", "nhwc", "nchw"] = option(
        "", "of a graph: what decodes weights, as `weights` says; or where images have channels at inputs and outputs"
    )
    weights: Literal["", "qdq", "matmulnbits"] = option(
        "", "what decodes the weights of a graph: qdq (DequantizeLinear), matmulnbits (com.microsoft); empty: as before"
    )
    custom: str = option("", "a domain for operators that ONNX has no like of; empty: they are an error")
    graph: bool = option(True, "false: only the weights, each decoded to an output, of a model of another format")
    signature: str = option("", "which signature of a TFLite model; empty: its first subgraph")
    ir_version: int | None = option(None, "IR version; by default the source's, or the first that has all types")

    @property
    def weight_layout(self) -> QuantizedLayout:
        """The nodes or operators that decode the weights of a graph."""
        return self.layout if self.layout in ("qdq", "matmulnbits") else self.weights
