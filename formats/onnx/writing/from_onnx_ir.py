"""A graph that another format's reader makes with onnx_ir -> an `OnnxGraph`, as if it came from an ONNX file.

Its weights are not in it. They stay in their file and are kept beside the graph until they are written.

Such a graph is serialized and parsed again at once. That costs little without weights, and then one writer, which works
on bytes, serves both kinds of graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Model, Tensor, WeightPlace
from nibblecast.converters.storage import Computed, MappedFile
from nibblecast.formats.onnx.file.graph import CARRIED
from nibblecast.formats.onnx.file.parse import parse
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.writing.transposing import permuted

if TYPE_CHECKING:
    import onnx_ir

_LONGEST_REASON = 200


@runtime_checkable
class Lowerable(Protocol):
    """A graph of another format that can become an ONNX graph. Lowering happens only when a writer needs it."""

    @property
    def preferred_opset(self) -> int:
        """The operator set of the ONNX graph, unless the weights or the user need another."""
        ...

    def lowered(
        self,
        *,
        opset: int,
        signature: str = "",
        channels_first: bool = False,
        custom_domain: str = "",
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[onnx_ir.Model, Mapping[str, WeightPlace]]:
        """The graph with weights decoded to floats, and which of its initializers are the model's weights. Activations
        are floats too if `weights`, the weights after the stages, were dequantized."""
        ...


@runtime_checkable
class Missing(Protocol):
    """Stands for a graph that is not there but that the user could provide."""

    @property
    def missing(self) -> str:
        """What the user can do to get the graph."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OnnxIrGraph:
    """The graph, its weights as floats, and the model's tensors that these are made of."""

    graph: OnnxGraph
    places: Mapping[str, WeightPlace]

    def changed(self, model: Model) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The weights that are quantized or that a stage changed: the name of the initializer, the tensor as the graph
        takes it, and the tensor as the model has it."""
        for name, place in self.places.items():
            tensor = model.get(place.tensor.name)
            if tensor is not None and (tensor.quantization is not None or tensor.data is not place.tensor.data):
                yield name, permuted(tensor, place.permutation), tensor


def made_graph(made: onnx_ir.Model, places: Mapping[str, WeightPlace], path: Path) -> OnnxIrGraph:
    """Takes the weights out of a lowered graph; `path` is the path of the source, for messages."""
    import onnx_ir as ir

    carried: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in made.graph.initializers.items():
        if name not in places or value.const_value is None:
            continue
        tensor = carried[len(carried)] = tensors[name] = _lazy(name, value.const_value)
        shape, dtype = ir.Shape(tensor.shape), value.const_value.dtype
        value.const_value = ir.ExternalTensor(CARRIED, len(carried) - 1, tensor.nbytes, dtype, shape=shape, name=name)
    content = np.frombuffer(_serialized(made), np.uint8)
    payloads = PayloadTensors(MappedFile(path, content, None), carried)
    parsed = parse(payloads.view, path)
    headers = {header.name: header for header in parsed.graph.initializers if header.name in tensors}
    return OnnxIrGraph(OnnxGraph(parsed, payloads, tensors, headers), places)


def _serialized(made: onnx_ir.Model) -> bytes:
    """The bytes of the graph. Raises Unsupported if protobuf cannot hold it."""
    import onnx_ir as ir
    from google.protobuf.message import Error as ProtobufError  # type: ignore[import-untyped]

    try:
        content: bytes = ir.to_proto(made).SerializeToString()
    except (ArithmeticError, LookupError, ProtobufError, TypeError, ValueError) as error:
        # e.g. an integer of more than 64 bits, or constants of more than 2 GiB
        reason = str(error)[:_LONGEST_REASON]
        raise Unsupported(f"its graph does not go into an ONNX file ({type(error).__name__}: {reason})") from error
    return content


def _lazy(name: str, stored: onnx_ir.TensorProtocol) -> Tensor:
    """An initializer as a plain tensor that is computed when it is read."""

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(stored.numpy()).reshape(-1).view(np.uint8)[start:stop]

    shape = tuple(int(size) for size in stored.shape.numpy())
    dtype = np.dtype(stored.dtype.numpy())
    return Tensor(name, shape, dtype, Computed(prod(shape) * dtype.itemsize, compute))
