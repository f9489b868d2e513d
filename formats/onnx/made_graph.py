"""A graph that a reader of another format makes with onnx_ir -> the same kind of graph that an ONNX file has.

Its weights are not in it: they stay where they are, carried along beside it until they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from converters.ir import Model, Tensor, WeightPlace
from converters.storage import Computed, MappedFile
from formats.onnx.graph import CARRIED
from formats.onnx.kept_graph import OnnxGraph
from formats.onnx.parse import parse
from formats.onnx.payload import Payloads
from formats.onnx.repacking import permuted

if TYPE_CHECKING:
    import onnx_ir


@runtime_checkable
class Lowerable(Protocol):
    """A graph of another format that becomes an ONNX graph when it is asked for."""

    def lowered(self, signature: str, opset: int) -> tuple[onnx_ir.Model, Mapping[str, WeightPlace]]:
        """The graph, and which of its initializers are the model's weights, decoded to floats."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MadeGraph:
    """The graph, its weights as floats, and which of the model's tensors these are."""

    graph: OnnxGraph
    places: Mapping[str, WeightPlace]

    def arranged(self, model: Model) -> Mapping[str, tuple[str, Tensor]]:
        """The model's tensors as the graph takes them, by the names of the initializers, with their own names."""
        found = {}
        for name, place in self.places.items():
            if place.name in model:
                found[name] = (place.name, permuted(model[place.name], place.permutation))
        return found


def made_graph(source: Lowerable, model: Model, signature: str, opset: int, path: Path) -> MadeGraph:
    """Has the graph made and takes its weights out of it; `path` is the source's, for messages."""
    import onnx_ir as ir

    made, places = source.lowered(signature, opset)
    carried: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in made.graph.initializers.items():
        place = places.get(name)
        if place is None or value.const_value is None:
            continue
        tensor = _plain(name, model[place.name], place.permutation)
        carried[len(carried)] = tensors[name] = tensor
        shape, dtype = ir.Shape(tensor.shape), value.const_value.dtype
        value.const_value = ir.ExternalTensor(CARRIED, len(carried) - 1, tensor.nbytes, dtype, shape=shape, name=name)
    content = np.frombuffer(ir.to_proto(made).SerializeToString(), np.uint8)
    payloads = Payloads(MappedFile(path, content, None), carried)
    parsed = parse(payloads.view, path)
    headers = {header.name: header for header in parsed.graph.initializers if header.name in tensors}
    return MadeGraph(OnnxGraph(parsed, payloads, tensors, headers), places)


def _plain(name: str, tensor: Tensor, permutation: tuple[int, ...] | None) -> Tensor:
    """The tensor as plain numbers, which are computed when they are read."""
    turned = permuted(tensor, permutation)
    return replace(turned if turned.quantization is None else _decoded(turned), name=name)


def _decoded(tensor: Tensor) -> Tensor:
    dtype: np.dtype[Any] = np.dtype(np.float32)

    def compute(start: int, stop: int) -> Any:
        return tensor.dequantize(np.float32).reshape(-1).view(np.uint8)[start:stop]

    return Tensor(tensor.name, tensor.shape, dtype, Computed(tensor.size * 4, compute))
