"""Reads ONNX models: initializers and Constants become tensors, with the quantization that nodes decode them with.

Payloads stay in the mapped file, or in the mapped files of external data, until they are read.

ONNX does not mark quantized weights: there are integer initializers, and nodes that happen to decode them. So the
reader finds weights by node patterns. Names or dtypes would be easier to test, but exporters agree on neither, and an
int8 initializer may just as well be a table of indices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nibblecast.converters.errors import CorruptFile, located
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.metadata import Metadata, Use
from nibblecast.converters.names import UniqueNames
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import TensorHeader
from nibblecast.formats.onnx.file.parse import parse
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.weights.block_operators import BlockWeight, block_weights
from nibblecast.formats.onnx.weights.dataflow import Dataflow, call_scopes
from nibblecast.formats.onnx.weights.parameters import quantization
from nibblecast.formats.onnx.weights.patterns import InitializerCodes, Matcher, Pattern, Scope
from nibblecast.formats.onnx.weights.rounding import rounded_codes
from nibblecast.formats.onnx.weights.uses import uses_of


class OnnxReader:
    """Reads .onnx files."""

    def read(self, path: Path) -> Model:
        """The weights of the model in `path`, in the file's order. Reads headers only. Weights have the names of their
        initializers, or of the graph outputs if OnnxWriter wrote the file. Raises CorruptFile if the file contradicts
        the format, Unsupported for unknown element types; both name the file."""
        file = MappedFile.open(path)
        with located(path=path):
            return _Reading(path, file).model()


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor of the file: its initializer, its name in the model, and the nodes or the operator that decode it."""

    name: str
    stored: InitializerCodes
    pattern: Pattern | None
    uses: tuple[Use, ...]
    block: BlockWeight | None = None

    def parameters(self) -> Sequence[TensorHeader]:
        """The initializers of its parameters."""
        if self.block is not None:
            return self.block.parameters
        return [] if self.pattern is None else [stored.header for stored in self.pattern.parameters()]


class _Reading:
    """One file on its way into a Model."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path = path
        self.payloads = PayloadTensors(file, allowance=Allowance(file.view.size))
        self.parsed = parse(self.payloads.view, path)
        self.losses: list[Loss] = []
        self.owners: dict[int, str] = {}

    def model(self) -> Model:
        is_ours = self.parsed.properties.get(schema.LAYOUT) == schema.WEIGHTS_LAYOUT
        flow = Dataflow.of(self.parsed)
        found = list(self._ours(flow.scopes[0]) if is_ours else self._foreign(flow))
        known = {id(one.stored.header): self._plain(one) for one in found if one.pattern is None and one.block is None}
        tensors: dict[str, Tensor] = {}
        headers: dict[str, TensorHeader] = {}
        names = UniqueNames(separator=":")  # initializers of different subgraphs may have the same name
        for one in found:
            tensor, name = self._decoded(one, known), names.fresh(one.name)
            tensor = tensor if tensor.name == name else replace(tensor, name=name)
            tensors[tensor.name] = tensor
            headers[tensor.name] = one.stored.header
        operators = Counter(node.op_type for scope in flow.scopes for node in scope.graph.nodes)
        metadata = Metadata(
            "onnx",
            self.parsed.producer,
            self.path,
            {} if is_ours else dict(operators),
            () if is_ours else self.parsed.inputs,
            () if is_ours else self.parsed.outputs,
            self.parsed.opsets,
        )
        self.payloads.allowance.hold_all(tensors)
        graph = None if is_ours else OnnxGraph(self.parsed, self.payloads, tensors, headers)
        return Model(tensors, metadata, graph, losses=tuple(self.losses))

    def _decoded(self, one: _Found, known: Mapping[int, Tensor]) -> Tensor:
        if one.pattern is not None:
            return self._quantized(one, one.pattern, known)
        if one.block is None:
            return known[id(one.stored.header)]
        with located(tensor=one.name):
            return replace(one.block.build(self.payloads), name=one.name, uses=one.uses)

    def _ours(self, scope: Scope) -> Iterator[_Found]:
        """The tensors of a file from our own writer, where each output is a tensor."""
        matcher = Matcher(scope, self.payloads, exact=True)
        patterns = {name: self._understood(matcher.match(name), name) for name in scope.graph.outputs}
        for name, pattern in patterns.items():
            parameters = pattern.parameters() if pattern else []
            self.owners.update((id(stored.header), name) for stored in parameters)
        for name, pattern in patterns.items():
            header = pattern.codes.header if pattern else scope.header(name)
            if header is None:
                raise CorruptFile(
                    "the nodes that make this output decode no weight: the file was changed after nibblecast wrote it; "
                    f"remove its metadata entry {schema.LAYOUT} to read the initializers",
                    tensor=name,
                )
            yield _Found(name, pattern.codes if pattern else InitializerCodes(header), pattern, ())

    def _foreign(self, flow: Dataflow) -> Iterator[_Found]:
        """Every initializer and Constant of the graphs, except the parameters of others."""
        weights = self._weights(flow)
        for one in weights.values():
            self.owners.update((id(header), one.name) for header in one.parameters())
        for scope in flow.scopes:
            names = scope.graph.sparse
            self.losses += [Loss(name, "dropped", "it is a sparse initializer, which cannot be read") for name in names]
            for header in scope.headers.values():
                if header.data_type == schema.STRING:
                    self.losses.append(Loss(header.name, "dropped", "it holds strings, not numbers"))
                elif id(header) in weights:
                    yield weights[id(header)]
                elif id(header) not in self.owners or header.name in scope.outputs:
                    uses = uses_of(flow, scope, header.name, len(header.dims))
                    yield _Found(header.name, InitializerCodes(header), None, uses)

    def _weights(self, flow: Dataflow) -> dict[int, _Found]:
        """Weights that nodes decode, or whose codes they take, by the identity of the initializer."""
        weights: dict[int, _Found] = {}
        for scope in (*flow.scopes, *call_scopes(self.parsed, flow.scopes, self.payloads.allowance)):
            matcher = Matcher(scope, self.payloads)
            for node in scope.graph.nodes:
                for block in block_weights(node, matcher.blob):
                    name = block.codes.name
                    found = weights.setdefault(
                        id(block.codes), _Found(name, InitializerCodes(block.codes), None, (), block)
                    )
                    use = Use(node.op_type, block.position, block.channel_axis)
                    if use not in found.uses:
                        weights[id(block.codes)] = replace(found, uses=(*found.uses, use))
                for pattern in matcher.weights(node):
                    header = pattern.codes.header
                    if id(header) not in weights and self._understood(pattern, header.name):
                        uses = uses_of(flow, scope, pattern.value or header.name, len(header.dims))
                        weights[id(header)] = _Found(header.name, pattern.codes, pattern, uses)
        return weights

    def _understood(self, pattern: Pattern | None, name: str) -> Pattern | None:
        """The pattern, or None if its parameters are not in blocks. Raises CorruptFile, naming the tensor, if its
        shapes or sizes contradict each other."""
        if pattern is None or pattern.codes.header.data_type == schema.STRING:
            return None
        with located(tensor=name, over=True):
            pattern.codes.tensor(self.payloads)  # checks the size of the payload before parameters are read for it
            return pattern if quantization(pattern, self.payloads, {}) else None

    def _plain(self, one: _Found) -> Tensor:
        owner = self.owners.get(id(one.stored.header))
        return replace(one.stored.tensor(self.payloads), name=one.name, uses=one.uses, parameter_of=owner)

    def _quantized(self, one: _Found, pattern: Pattern, known: Mapping[int, Tensor]) -> Tensor:
        lifted = quantization(pattern, self.payloads, known)
        if lifted is not None and pattern.codes.is_rounded and pattern.codes.dtype is not None:
            floats, dtype = pattern.codes.tensor(self.payloads), pattern.codes.dtype
            codes = rounded_codes(floats, lifted, dtype)
            return Tensor(one.name, floats.shape, dtype, codes, lifted, one.uses)
        return replace(one.stored.tensor(self.payloads), name=one.name, quantization=lifted, uses=one.uses)
