"""Writes a model whose graph is an ONNX file's: that file with the changes that the stages and the layout make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.converters.interfaces import OutputFile
from nibblecast.converters.ir import Loss, Model, Tensor, is_float
from nibblecast.converters.output.streaming import pieces
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.rewrite import ExternalData, Payload, Pieces, Rewriting
from nibblecast.formats.onnx.file.serialize import LARGEST_MODEL, go_to
from nibblecast.formats.onnx.file.validation import validate
from nibblecast.formats.onnx.file.wire import Range
from nibblecast.formats.onnx.writing.from_onnx_ir import Lowerable, made_graph
from nibblecast.formats.onnx.writing.graph_changes import GraphChanges, OnnxGraph, Owner
from nibblecast.formats.onnx.writing.opset import raised, required_opset
from nibblecast.formats.onnx.writing.transposing import permuted

if TYPE_CHECKING:
    from nibblecast.formats.onnx.writer import OnnxOptions

#: Above this, payloads go to a second file unasked: tools need room below protobuf's 2 GiB to add to a model.
LARGEST_IN_ONE_FILE = 1_500_000_000
EXTERNAL_FROM = 1024  # onnx's own default
_PIECE_BYTES = 1 << 20
_COPIED_BYTES = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class KeptPlan:
    """The pieces of the model file, and what lies in the file of external data, with its offsets. `expected` is the
    model that reading the result gives."""

    report: ClassVar[Sequence[str]] = ()

    files: Sequence[OutputFile]
    notes: Sequence[str]
    expected: Model
    source: MappedFile
    pieces: Pieces
    external: Sequence[tuple[int, Payload]]
    losses: Sequence[Loss] = ()

    def validate(self, main: Path) -> Sequence[str]:
        """What onnx.checker says of the file."""
        return validate(main, None if self.source.mapping is None else self.source.path)

    def open(self, streams: Sequence[BinaryIO]) -> KeptSink:
        """Writes all but payloads; the second stream, where there are two, is the external data's."""
        places = [*_written(self.pieces, self.source, streams[0])]
        places += [_Span(payload, streams[1], offset) for offset, payload in self.external]
        return KeptSink(places)


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """Where a payload goes."""

    payload: Payload
    stream: BinaryIO
    position: int

    def write(self, tensor: Tensor) -> None:
        """Writes the payload, made of its owner."""
        made = self.payload.make(tensor)
        go_to(self.stream, self.position)
        for piece in pieces(made, _PIECE_BYTES):
            self.stream.write(piece.data)


class KeptSink:
    """Writes the payloads of each tensor as it comes, and those that are no tensor's at the end."""

    def __init__(self, places: Sequence[_Span]) -> None:
        self._owned: dict[str, list[_Span]] = {}
        self._others: list[_Span] = []
        for place in places:
            owner = place.payload.owner
            self._others.append(place) if owner is None else self._owned.setdefault(owner, []).append(place)

    def write(self, tensor: Tensor) -> None:
        """Writes whatever is made of the tensor."""
        for place in self._owned.pop(tensor.name, ()):
            place.write(tensor)

    def close(self) -> None:
        """Writes the rest: parameters, and tensors that were not chosen."""
        for place in (*self._others, *(place for places in self._owned.values() for place in places)):
            place.write(place.payload.tensor)
            place.payload.tensor.release()


def plan_kept(model: Model, graph: OnnxGraph, target: Path, options: OnnxOptions) -> KeptPlan:
    """What will be written of a model whose graph is an ONNX file's. Raises Unsupported where a change has no place in
    the graph, UsageError for an operator set that cannot be had."""
    notes: list[str] = []
    opset = graph.parsed.opsets.get("", 0)
    wanted = options.opset or max(opset, required_opset(model, graph, options.weight_layout))
    if wanted != opset:
        graph = raised(graph, wanted)
        if options.opset is None:
            notes.append(f"opset {opset} lacks what the weights need: the model is written in opset {wanted}")
    changes = GraphChanges.of(graph, wanted, options.weight_layout)
    for name, tensor in model.items():
        changes.apply(name, tensor)
    owners = {id(header): (name, model[name]) for name, header in graph.headers.items() if name in model}
    return _planned(changes, model, owners, target, options, notes)


def plan_made(model: Model, source: Lowerable, target: Path, options: OnnxOptions) -> KeptPlan:
    """What will be written of a model whose graph another format's reader makes. Raises Unsupported for operators that
    ONNX cannot express."""
    opset = options.opset or max(
        (schema.ELEMENT_TYPES[t.dtype].opset for t in model.values() if t.quantization), default=0
    )
    opset = max(opset, source.preferred_opset) if options.opset is None else opset
    lowered = source.lowered(
        opset=opset,
        signature=options.signature,
        channels_first=options.layout == "nchw",
        custom_domain=options.custom,
        weights=model,
    )
    made = made_graph(*lowered, model.metadata.source or target)
    changes = GraphChanges.of(made.graph, opset, options.weight_layout)
    for name, tensor, owner in made.changed(model):
        arrange = partial(permuted, permutation=made.places[name].permutation)
        changes.apply(name, tensor, Owner(owner.name, owner, arrange))
    plan = _planned(changes, model, {}, target, options, [])
    taken = {place.tensor.name for place in made.places.values()}
    unused = [n for n, t in model.items() if n not in taken and t.parameter_of not in model and _is_weight(t)]
    return replace(plan, losses=[Loss(n, "dropped", "no operator of the graph uses it") for n in unused])


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is more than a shape or an axis, which become part of the operators."""
    return tensor.quantization is not None or is_float(tensor.dtype)


def _planned(
    changes: GraphChanges,
    model: Model,
    owners: Mapping[int, tuple[str, Tensor]],
    target: Path,
    options: OnnxOptions,
    notes: Sequence[str],
) -> KeptPlan:
    location = f"{target.name}.data"
    pieces, external = _laid_out(changes, owners, options, location)
    files = [OutputFile(target, pieces.nbytes)]
    if external.placed:
        files.append(OutputFile(target.with_name(location), external.nbytes))
    expected = Model(_expected(changes), model.metadata)
    source = changes.graph.payloads.file
    return KeptPlan(files, [*notes, *changes.notes], expected, source, pieces, external.placed)


def _laid_out(
    changes: GraphChanges, owners: Mapping[int, tuple[str, Tensor]], options: OnnxOptions, location: str
) -> tuple[Pieces, ExternalData]:
    graph = changes.graph
    headers = [header for scope in changes.editor.flow.scopes for header in scope.headers.values()]
    has_any = any(header.is_external for header in headers)
    opsets = {"": changes.opset} | dict.fromkeys(changes.editor.domains - set(graph.parsed.opsets), 1)
    rewriting = Rewriting(
        graph.parsed,
        graph.payloads,
        changes.editor.edits,
        ExternalData(location, options.external_data, has_any),
        owners,
        opsets,
        _ir_version(graph, changes, options),
        changes.allowance,
    )
    try:
        pieces = rewriting.model()
    except CorruptFile as error:
        error.path = graph.payloads.file.path
        raise
    if pieces.nbytes > LARGEST_IN_ONE_FILE and options.external_data is None:
        rewriting = replace(rewriting, external=ExternalData(location, EXTERNAL_FROM, True))
        pieces = rewriting.model()
    if pieces.nbytes > LARGEST_MODEL:
        raise Unsupported(
            f"an ONNX file of {pieces.nbytes} bytes is more than protobuf's {LARGEST_MODEL}: "
            "put weights into a second file with --opt external_data=1M"
        )
    return pieces, rewriting.external


def _ir_version(graph: OnnxGraph, changes: GraphChanges, options: OnnxOptions) -> int:
    """The file's own, or the first that has the types of new initializers and goes with the operator set."""
    added = [new for edit in changes.editor.edits.values() for new in edit.added]
    needed = [schema.ELEMENT_TYPES[new.dtype].opset for new in added]
    if changes.opset != graph.parsed.opsets.get("", 0):
        needed.append(changes.opset)
    least = max((schema.IR_VERSIONS[max(opset, min(schema.IR_VERSIONS))] for opset in needed), default=0)
    if options.ir_version is None:
        return max(graph.parsed.ir_version, least)
    if options.ir_version < least:
        raise UsageError(f"ir-version {options.ir_version} has not the model's types: {least} or higher is needed")
    return options.ir_version


def _expected(changes: GraphChanges) -> Mapping[str, Tensor]:
    dropped = {key for edit in changes.editor.edits.values() for key in edit.dropped}
    headers = changes.graph.headers
    return {
        name: tensor
        for name, tensor in changes.expected.items()
        if tensor.parameter_of is None or id(headers[name]) not in dropped
    }


def _written(pieces: Pieces, source: MappedFile, stream: BinaryIO) -> Iterator[_Span]:
    """Writes what is no payload; gives the places of those."""
    position = 0
    for piece in pieces.items:
        if isinstance(piece, Payload):
            yield _Span(piece, stream, position)
            position += piece.nbytes
            continue
        go_to(stream, position)
        if isinstance(piece, Range):
            for start in range(piece.start, piece.stop, _COPIED_BYTES):
                stop = min(start + _COPIED_BYTES, piece.stop)
                copied = source.range(start, stop - start)
                stream.write(copied.read(0, stop - start).data)
                copied.release(0, stop - start)
            position += piece.nbytes
        else:
            stream.write(piece)
            position += len(piece)
