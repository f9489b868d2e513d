"""Exported programs (.pt2, of torch.export) -> tensors, read without PyTorch: a graph of JSON and raw storages.

Weights that the program dequantizes, or quantizes and dequantizes, come as codes with their parameters, under the name
that the float model has for them. `formats.pytorch.exported.program`, `.pt2_tensors`, `.dataflow` and
`.quantize_operators` say what is read how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.converters.metadata import Port
from nibblecast.formats.pytorch.exported.dataflow import Flow, ProgramWeight, flow_of
from nibblecast.formats.pytorch.exported.graph import ExportedGraph, MissingGraph, is_torch_installed
from nibblecast.formats.pytorch.exported.program import Program, program_of
from nibblecast.formats.pytorch.exported.pt2_tensors import ProgramTensors, payloads
from nibblecast.formats.pytorch.modules.tensors import take, tensor_of
from nibblecast.formats.pytorch.pickle.archive import Archive
from nibblecast.formats.pytorch.pickle.limits import LEAF, Limits
from nibblecast.formats.pytorch.pickle.records import StridedTensor, SubclassTensor

#: What folding and lifting call their constants, whatever they were before.
_NAMELESS = re.compile(r"(?:.*\.)?(?:_frozen_param|_?lifted_tensor_|_(?:lifted_)?tensor_constant|_param_constant)\d+")
_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*")


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """What an archive holds. `wrapped` are tensors of classes that wrap others, which the program does not take apart
    in a way that is known here; `graph` is there where the archive has one program; the rest is as
    `converters.ir.Metadata` has it."""

    tensors: Mapping[str, Tensor]
    wrapped: Mapping[str, SubclassTensor] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    producer: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    opsets: Mapping[str, int] = field(default_factory=dict)
    graph: ExportedGraph | MissingGraph | None = None


def read_exported(archive: Archive, limits: Limits) -> Exported:
    """The tensors of all programs of an archive, headers only. Raises CorruptFile where it is damaged, Unsupported for
    what is valid and not handled: AOTInductor's packages, sparse tensors, dtypes that are not known."""
    tensors: dict[str, Tensor] = {}
    wrapped: dict[str, SubclassTensor] = {}
    losses: list[Loss] = []
    operators: dict[str, int] = {}
    programs: list[Program] = []
    graph: ExportedGraph | MissingGraph | None = None
    found = list(payloads(archive, limits))
    for payload in found:
        for name, value in payload.tensors.items():
            take(limits, name, value)
        program = program_of(payload.program)
        limits.read += len(payload.program)
        prefix = f"{payload.model}/" if len(found) > 1 else ""
        flow = flow_of(program, payload.tensors, limits)
        decoded: dict[int, Tensor] = {}
        for name, tensor, weight in _named(payload, flow, limits):
            limits.spend(LEAF + len(prefix) + len(name))
            tensors[prefix + name] = replace(tensor, name=prefix + name)
            if weight is not None:
                decoded[id(weight)] = tensors[prefix + name]
        graph = _graph(program, payload, flow, decoded) if len(found) == 1 else None
        wrapped |= {prefix + name: value for name, value in _wrapped(payload, flow)}
        losses += [replace(loss, tensor=prefix + loss.tensor) for loss in (*payload.losses, *_losses(flow))]
        for operator, count in program.operators().items():
            operators[operator] = operators.get(operator, 0) + count
        programs.append(program)
    first = programs[0]
    return Exported(
        tensors, wrapped, tuple(losses), first.producer, operators, first.inputs, first.outputs, first.opsets, graph
    )


def _graph(
    program: Program, payload: ProgramTensors, flow: Flow, tensors: Mapping[int, Tensor]
) -> ExportedGraph | MissingGraph:
    """The graph, with the tensors of the model by the identity of their weights."""
    if not is_torch_installed():
        return MissingGraph()
    weights = {value: tensors[id(weight)] for value, weight in flow.decoded.items()}
    others: dict[str, Tensor] = {}
    for value, name in program.stored.items():
        stored = payload.tensors.get(name)
        if name in flow.plain:
            weights[value] = tensors[id(flow.plain[name])]
        elif isinstance(stored, StridedTensor):
            others[value] = tensor_of(name, stored)
    return ExportedGraph(program, weights, others)


def _losses(flow: Flow) -> Iterator[Loss]:
    for name, reason in flow.unresolved.items():
        yield Loss(name, "reinterpreted", f"{reason}: it is taken as plain codes, without quantization")


def _wrapped(payload: ProgramTensors, flow: Flow) -> Iterator[tuple[str, SubclassTensor]]:
    for name, value in payload.tensors.items():
        if isinstance(value, SubclassTensor) and name not in flow.consumed:
            yield name, value


def _named(payload: ProgramTensors, flow: Flow, limits: Limits) -> Iterator[tuple[str, Tensor, ProgramWeight | None]]:
    """All tensors by name, with the weights that they are, in the order of the state dict; a weight is where the float
    that it replaces was."""
    stored = {name: value for name, value in payload.tensors.items() if isinstance(value, StridedTensor)}
    plain = {name for name in stored if name in flow.plain or name not in flow.consumed}
    unused = {name for name in plain if name not in flow.plain and is_float(stored[name].dtype.numpy)}
    taken = plain - unused
    originals: dict[tuple[int, ...], set[str]] = {}
    for name in unused:
        originals.setdefault(stored[name].shape, set()).add(name)
    numbers: dict[str, int] = {}
    weights: dict[str, ProgramWeight] = {}
    places: dict[str, list[str]] = {}
    for weight in flow.weights:
        limits.spend(LEAF + 8 * len(weight.stored))  # several regular expressions go through it
        same = originals.get(weight.tensor.shape, set())
        own = next(name for name in _candidates(weight, stored, same, numbers) if name not in taken)
        taken.add(own)
        weights[own] = weight
        places.setdefault(own if own in unused else weight.stored, []).append(own)
    for name in payload.tensors:
        for own in places.get(name, ()):
            yield own, replace(weights[own].tensor, uses=tuple(weights[own].uses)), weights[own]
        if name in flow.plain and name in plain:
            yield name, replace(flow.plain[name].tensor, uses=tuple(flow.plain[name].uses)), flow.plain[name]
        elif name in plain and name not in weights:
            yield name, tensor_of(name, stored[name]), None


def _candidates(
    weight: ProgramWeight, stored: Mapping[str, StridedTensor], originals: Set[str], numbers: dict[str, int]
) -> Iterator[str]:
    """Names for a weight, the best one first, without an end. `originals` are the float tensors of its shape that the
    program does not use, `numbers` the next one for names that are taken."""
    parametrized = _PARAMETRIZED.fullmatch(weight.stored)
    if parametrized:
        yield f"{parametrized[1]}.{parametrized[2]}" if parametrized[1] else parametrized[2]
    elif not _NAMELESS.fullmatch(weight.stored):
        yield weight.stored
    else:
        # folding leaves the float weight behind, under its name
        yield from (name for name in weight.users if name in originals or name not in stored)
        if len(originals) == 1:
            yield from originals
    yield from weight.users
    yield weight.stored
    while True:
        number = numbers[weight.stored] = numbers.get(weight.stored, 0) + 1
        yield f"{weight.stored}:{number}"
