"""Reads ONNX models: initializers and Constants as tensors, those behind DequantizeLinear with their quantization.

Payloads stay in the mapped file, or in the mapped files of external data, until they are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.errors import CorruptFile, Error
from converters.ir import Loss, Metadata, Model, Tensor, Use
from converters.storage import MappedFile
from formats.onnx import schema
from formats.onnx.block_operators import BlockWeight, block_weights
from formats.onnx.dataflow import scopes_of
from formats.onnx.graph import Graph, Node, TensorHeader
from formats.onnx.kept_graph import OnnxGraph
from formats.onnx.lifting import Matcher, Pattern, Scope, Stored, quantization
from formats.onnx.parse import parse
from formats.onnx.payload import Payloads
from formats.onnx.rounding import RoundedCodes

#: The axis of an operator's weight along which its output channels run, by operator and input (ONNX operators).
_CHANNEL_AXES = {
    ("Conv", 1): 0,
    ("ConvTranspose", 1): 1,
    ("MatMul", 1): -1,
    ("QLinearConv", 3): 0,
    ("QLinearMatMul", 3): -1,
}


class OnnxReader:
    """Reads .onnx files."""

    def read(self, path: Path) -> Model:
        """The weights of the model in `path`, headers only, in the file's order, named as their initializers; those of
        a file that OnnxWriter wrote, as its outputs. Raises CorruptFile for what contradicts the format, Unsupported
        for element types that are not known, both naming the file."""
        file = MappedFile.open(path)
        try:
            return _Reading(path, file).model()
        except Error as error:
            error.path = error.path or path
            raise


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor of the file: its initializer, the name it gets, and the nodes, or the operator, that decode it."""

    name: str
    stored: Stored
    pattern: Pattern | None
    uses: tuple[Use, ...]
    block: BlockWeight | None = None


class _Reading:
    """One file on its way into a Model."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path = path
        self.payloads = Payloads(file)
        self.parsed = parse(self.payloads.view, path)
        self.losses: list[Loss] = []
        self.owners: dict[int, str] = {}

    def model(self) -> Model:
        scopes = [scope for graph in (self.parsed.graph, *self.parsed.functions) for scope in scopes_of(graph)]
        is_ours = self.parsed.properties.get(schema.LAYOUT) == schema.WEIGHTS_LAYOUT
        found = list(self._ours(scopes[0]) if is_ours else self._foreign(scopes))
        known = {id(one.stored.header): self._plain(one) for one in found if one.pattern is None and one.block is None}
        tensors: dict[str, Tensor] = {}
        headers: dict[str, TensorHeader] = {}
        repeated: Counter[str] = Counter()
        for one in found:
            tensor = self._decoded(one, known)
            while tensor.name in tensors:  # initializers of different subgraphs
                repeated[one.name] += 1
                tensor = replace(tensor, name=f"{one.name}:{repeated[one.name]}")
            tensors[tensor.name] = tensor
            headers[tensor.name] = one.stored.header
        operators = Counter(node.op_type for scope in scopes for node in scope.graph.nodes)
        metadata = Metadata(
            "onnx",
            self.parsed.producer,
            self.path,
            {} if is_ours else dict(operators),
            () if is_ours else self.parsed.inputs,
            () if is_ours else self.parsed.outputs,
            self.parsed.opsets,
        )
        graph = None if is_ours else OnnxGraph(self.parsed, self.payloads, tensors, headers)
        return Model(tensors, metadata, graph, losses=tuple(self.losses))

    def _decoded(self, one: _Found, known: Mapping[int, Tensor]) -> Tensor:
        if one.pattern is not None:
            return self._quantized(one, one.pattern, known)
        if one.block is None:
            return known[id(one.stored.header)]
        try:
            return replace(one.block.build(self.payloads), name=one.name, uses=one.uses)
        except Error as error:
            error.tensor = error.tensor or one.name
            raise

    def _ours(self, scope: Scope) -> Iterator[_Found]:
        """What our own writer wrote: each output is a tensor."""
        matcher = Matcher(scope, self.payloads)
        patterns = {name: self._understood(matcher.match(name), name) for name in scope.graph.outputs}
        self._note_owners((name, pattern) for name, pattern in patterns.items() if pattern)
        for name, pattern in patterns.items():
            header = pattern.codes.header if pattern else scope.header(name)
            if header is None:
                raise CorruptFile(
                    "the nodes that make this output decode no weight: the file was changed after nibblecast wrote it; "
                    f"remove its metadata entry {schema.LAYOUT} to read the initializers",
                    tensor=name,
                )
            yield _Found(name, pattern.codes if pattern else Stored(header), pattern, ())

    def _foreign(self, scopes: Sequence[Scope]) -> Iterator[_Found]:
        """Every initializer and Constant of the graphs, parameters of others excepted."""
        patterns: dict[int, Pattern] = {}
        blocks: dict[int, BlockWeight] = {}
        uses: dict[int, tuple[Use, ...]] = {}
        consumers = [_consumers(scope.graph) for scope in scopes]
        for scope, taken_by in zip(scopes, consumers, strict=True):
            matcher = Matcher(scope, self.payloads)
            for node in scope.graph.nodes:
                for block in block_weights(node, scope.header):
                    blocks.setdefault(id(block.codes), block)
                    axis = 1 if node.op_type == "QMoE" else 0
                    uses.setdefault(id(block.codes), (Use(node.op_type, block.position, axis),))
                pattern = matcher.weight(node)
                if pattern is None or id(pattern.codes.header) in patterns:
                    continue
                header = pattern.codes.header
                if self._understood(pattern, header.name):
                    patterns[id(header)] = pattern
                    uses[id(header)] = _uses(taken_by, pattern.value or header.name, len(header.dims))
        self._note_owners((pattern.codes.header.name, pattern) for pattern in patterns.values())
        for block in blocks.values():
            self.owners.update((id(header), block.codes.name) for header in block.parameters)
        for scope, taken_by in zip(scopes, consumers, strict=True):
            outputs = frozenset(scope.graph.outputs)
            names = scope.graph.sparse
            self.losses += [Loss(name, "dropped", "a sparse initializer, which cannot be read") for name in names]
            for header in scope.headers.values():
                pattern = patterns.get(id(header))
                if header.data_type == schema.STRING:
                    self.losses.append(Loss(header.name, "dropped", "strings, which are no weights"))
                elif id(header) in blocks:
                    yield _Found(header.name, Stored(header), None, uses[id(header)], blocks[id(header)])
                elif pattern or id(header) not in self.owners or header.name in outputs:
                    taken = uses[id(header)] if pattern else _uses(taken_by, header.name, len(header.dims))
                    yield _Found(header.name, pattern.codes if pattern else Stored(header), pattern, taken)

    def _understood(self, pattern: Pattern | None, name: str) -> Pattern | None:
        """The pattern, if it is one and decodes blocks. Raises CorruptFile, naming the tensor, if it is wrong."""
        if pattern is None or pattern.codes.header.data_type == schema.STRING:
            return None
        try:
            return pattern if quantization(pattern, self.payloads, {}) else None
        except Error as error:
            error.tensor = name
            raise

    def _note_owners(self, patterns: Iterable[tuple[str, Pattern]]) -> None:
        for name, pattern in patterns:
            self.owners.update((id(stored.header), name) for stored in pattern.parameters())

    def _plain(self, one: _Found) -> Tensor:
        owner = self.owners.get(id(one.stored.header))
        return replace(one.stored.tensor(self.payloads), name=one.name, uses=one.uses, parameter_of=owner)

    def _quantized(self, one: _Found, pattern: Pattern, known: Mapping[int, Tensor]) -> Tensor:
        lifted = quantization(pattern, self.payloads, known)
        if lifted is not None and pattern.codes.is_rounded and pattern.codes.dtype is not None:
            floats = pattern.codes.tensor(self.payloads)
            codes = RoundedCodes(floats, lifted, pattern.codes.dtype)
            return Tensor(one.name, floats.shape, codes.dtype, codes, lifted, one.uses)
        return replace(one.stored.tensor(self.payloads), name=one.name, quantization=lifted, uses=one.uses)


def _consumers(graph: Graph) -> Mapping[str, Sequence[Use]]:
    """What takes each value; a channel axis may be counted from the end."""
    consumers: dict[str, list[Use]] = {}
    for node in graph.nodes:
        for position, name in enumerate(node.inputs):
            if name:
                consumers.setdefault(name, []).append(Use(node.op_type, position, _channel_axis(node, position)))
    return consumers


def _uses(consumers: Mapping[str, Sequence[Use]], name: str, rank: int) -> tuple[Use, ...]:
    return tuple(
        use if use.channel_axis is None else replace(use, channel_axis=use.channel_axis % max(1, rank))
        for use in consumers.get(name, ())
    )


def _channel_axis(node: Node, position: int) -> int | None:
    if node.op_type == "Gemm" and position == 1:
        return 0 if node.integers.get("transB", 0) else 1
    return _CHANNEL_AXES.get((node.op_type, position))
