"""Writes a model that has an ONNX graph: its file, with the changes that the stages and the layout make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path

from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.converters.errors import UsageError, located
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.pieces import ExternalData, Pieces
from nibblecast.formats.onnx.file.rewrite import Rewriting
from nibblecast.formats.onnx.onnx_graph import OnnxGraph
from nibblecast.formats.onnx.options import OnnxOptions
from nibblecast.formats.onnx.writing.files import EXTERNAL_FROM, LARGEST_IN_ONE_FILE, OnnxPlan, onnx_plan
from nibblecast.formats.onnx.writing.from_onnx_ir import Lowerable, made_graph
from nibblecast.formats.onnx.writing.graph_changes import GraphChanges, Owner
from nibblecast.formats.onnx.writing.opset import raised, required_opset
from nibblecast.formats.onnx.writing.transposing import permuted


def plan_kept(model: Model, graph: OnnxGraph, target: Path, options: OnnxOptions) -> OnnxPlan:
    """The plan for a model whose graph is an ONNX file. Raises Unsupported if a change has no place in the graph,
    UsageError for an operator set that is not possible."""
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
    weights = {id(header) for name, header in graph.headers.items() if name in model}
    return _planned(changes, model, weights, target, options, notes)


def plan_made(model: Model, source: Lowerable, target: Path, options: OnnxOptions) -> OnnxPlan:
    """The plan for a model whose graph another format's reader makes. Raises Unsupported for operators that ONNX cannot
    express."""
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
        changes.apply(name, tensor, Owner(owner, arrange))
    plan = _planned(changes, model, set(), target, options, [])
    taken = {place.tensor.name for place in made.places.values()}
    unused = [n for n, t in model.items() if n not in taken and t.parameter_of not in model and _is_weight(t)]
    return replace(plan, losses=[Loss(n, "dropped", "no operator of the graph uses it") for n in unused])


def _is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is more than a shape or an axis, which become part of the operators."""
    return tensor.quantization is not None or is_float(tensor.dtype)


def _planned(
    changes: GraphChanges,
    model: Model,
    weights: Set[int],
    target: Path,
    options: OnnxOptions,
    notes: Sequence[str],
) -> OnnxPlan:
    pieces, external = _laid_out(changes, weights, options, f"{target.name}.data")
    expected = Model(_expected(changes), model.metadata)
    source = changes.graph.payloads.file
    return onnx_plan(target, pieces, external, source, notes=[*notes, *changes.notes], expected=expected)


def _laid_out(
    changes: GraphChanges, weights: Set[int], options: OnnxOptions, location: str
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
        weights,
        opsets,
        _ir_version(graph, changes, options),
        changes.allowance,
    )
    with located(path=graph.payloads.file.path):
        pieces = rewriting.model()
    if pieces.nbytes > LARGEST_IN_ONE_FILE and options.external_data is None:
        rewriting = replace(rewriting, external=ExternalData(location, EXTERNAL_FROM, True))
        pieces = rewriting.model()
    return pieces, rewriting.external


def _ir_version(graph: OnnxGraph, changes: GraphChanges, options: OnnxOptions) -> int:
    """The file's IR version, or the first that has the types of new initializers and fits the operator set."""
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
