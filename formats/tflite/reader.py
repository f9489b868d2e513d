"""TFLite models -> Model: every constant tensor, with its quantization and its consumers.

Format: schema.fbs 3d and what LiteRT 2.3 reads (`formats.tflite.schema`). Reads headers only; data stay in the mapped
file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported, brief, located
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.containment import contained_file
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import Loss, Model, Quantization, Tensor
from nibblecast.converters.metadata import Activation, Metadata, OperatorInput, Port, Use
from nibblecast.converters.names import UniqueNames
from nibblecast.converters.storage import Data, FileRange, InMemory, MappedFile
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.containers import Section, sections
from nibblecast.formats.tflite.graph import TFLiteGraph
from nibblecast.formats.tflite.operators import OPERATORS, STORAGE_OPERATORS, TRANSPOSED_BATCH_MATMUL, UNKNOWN
from nibblecast.formats.tflite.quantization import quantization_of
from nibblecast.formats.tflite.sparsity import SparseData, sparse_layout

#: A tensor by subgraph and index.
Key = tuple[int, int]


class TFLiteReader:
    """Reads .tflite, .litertlm and .task files."""

    def read(self, path: Path) -> Model:
        """The constant tensors of all subgraphs of all models in the file, under their own names. Duplicates get `:1`,
        `:2`; nameless tensors are called `subgraph0/tensor5`; models in a container get the prefix `<section>/`."""
        container = MappedFile.open(path)
        found, allowance = sections(container), Allowance(container.view.size)
        files = [_ModelFile.open(section, f"{section.name}/" if len(found) > 1 else "") for section in found]
        losses: list[Loss] = []
        constants: list[list[_Constant]] = []
        for file in files:
            numbers, dropped = file.constants()
            constants.append(numbers)
            losses += dropped
        names = iter(_unique_names([constant.name for numbers in constants for constant in numbers]))
        tensors: dict[str, Tensor] = {}
        graphs: list[TFLiteGraph] = []
        for file, numbers in zip(files, constants, strict=True):
            by_key: dict[Key, Tensor] = {}
            for constant in numbers:
                name = next(names)
                if name != constant.name:
                    losses.append(
                        Loss(
                            name,
                            "renamed",
                            f"has a number in its name, because another tensor is named '{constant.name}'",
                        )
                    )
                    constant.name = name
            for constant, (tensor, its_losses) in zip(numbers, file.tensors(numbers), strict=True):
                tensors[tensor.name] = by_key[constant.key] = tensor
                losses += its_losses
            names_of_codes = [_operator_name(code) for code in file.model.operator_codes]
            graphs.append(TFLiteGraph(file.model, names_of_codes, by_key, allowance))
            for beside in file.external_files.values():
                allowance.include(beside.nbytes if beside.file is not container else 0)
        allowance.hold_all(tensors)
        operators: Counter[str] = Counter()
        for file in files:
            operators.update(file.operator_names)
        producer = next((file.model.description for file in files if file.model.description), "")
        graph = graphs[0] if len(graphs) == 1 else None
        inputs, outputs = files[0].ports() if len(files) == 1 else ((), ())
        metadata = Metadata("tflite", producer, path, dict(operators), inputs, outputs)
        return Model(tensors, metadata, graph, tuple(losses))


@dataclass(slots=True, eq=False)
class _Constant:
    """A constant tensor that holds numbers: its name and where its bytes are."""

    key: Key
    name: str
    table: schema.Tensor
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: Data


@dataclass(frozen=True, slots=True, eq=False)
class _ModelFile:
    """One model: its root table, and the vectors that are used often, with all their indices checked."""

    section: Section
    prefix: str
    model: schema.Model
    buffers: list[schema.Buffer]
    subgraphs: list[list[schema.Tensor]]
    uses: dict[Key, list[Use]]
    produced: set[Key]
    operator_names: Counter[str]
    external_buffers: dict[int, list[schema.ExternalBuffer]]
    external_groups: list[schema.ExternalBufferGroup]
    external_files: dict[str, FileRange] = field(default_factory=dict)

    @classmethod
    def open(cls, section: Section, prefix: str) -> _ModelFile:
        """Parses the section's headers. Raises CorruptFile for wrong identifiers, offsets, lengths or indices."""
        content = section.data.read(0, section.data.nbytes)
        identifier = content[4:8].tobytes()
        if identifier != schema.IDENTIFIER:
            known = brief(schema.IDENTIFIER)
            raise CorruptFile(f"has identifier {brief(identifier)} at byte 4; a TFLite model has {known}")
        model = schema.Model.root(content)
        if model.version != schema.VERSION:
            raise Unsupported(f"has schema version {model.version}; {schema.VERSION} is the one in use since 2017")
        graphs = model.subgraphs
        subgraphs = [graph.tensors for graph in graphs]
        names = [_operator_name(code) for code in model.operator_codes]
        operators = [_operators(names, index, graph, len(subgraphs[index])) for index, graph in enumerate(graphs)]
        produced = {key for graph in operators for operator in graph for key in operator.outputs}
        for index, graph in enumerate(graphs):
            inputs, outputs = _indices(graph.inputs), _indices(graph.outputs)
            _check_tensors(f"subgraph {index}", (*inputs, *outputs), len(subgraphs[index]), least=0)
            produced.update((index, tensor) for tensor in inputs)
        external: dict[int, list[schema.ExternalBuffer]] = {}
        for buffer in model.external_buffers:
            external.setdefault(buffer.id, []).append(buffer)
        return cls(
            section=section,
            prefix=prefix,
            model=model,
            buffers=model.buffers,
            subgraphs=subgraphs,
            uses=_uses(operators, subgraphs),
            produced=produced,
            operator_names=Counter(operator.name for graph in operators for operator in graph),
            external_buffers=external,
            external_groups=model.external_buffer_groups,
        )

    def constants(self) -> tuple[list[_Constant], list[Loss]]:
        """Every constant tensor that holds numbers, in order. Others (strings) are dropped, with a loss for each."""
        found: list[_Constant] = []
        losses: list[Loss] = []
        for subgraph, tensors in enumerate(self.subgraphs):
            for index, table in enumerate(tensors):
                key = (subgraph, index)
                name = self.prefix + (table.name or f"subgraph{subgraph}/tensor{index}")
                with located(tensor=name):
                    kind, data = _type_name(table), self._data(key, table)
                    if data is not None and kind in schema.DTYPES:
                        found.append(_Constant(key, name, table, _shape(table), schema.DTYPES[kind], data))
                    elif data is not None and data.nbytes:
                        losses.append(Loss(name, "dropped", f"its {kind} elements, which are not numbers"))
        return found, losses

    def ports(self) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """The inputs and outputs of the main subgraph."""
        if not self.subgraphs:
            return (), ()
        graph, tensors = self.model.subgraphs[0], self.subgraphs[0]
        inputs, outputs = (
            tuple(_port(tensors[index]) for index in _indices(found)) for found in (graph.inputs, graph.outputs)
        )
        return inputs, outputs

    def tensors(self, constants: list[_Constant]) -> Iterator[tuple[Tensor, list[Loss]]]:
        """The tensors, with the losses of reading each. A tensor that is a parameter of another is the same object
        there, and has the other's name in `parameter_of`."""
        plain: dict[Key, Tensor] = {}
        for constant in constants:
            with located(tensor=constant.name):
                plain[constant.key] = self._plain(constant)
        results: list[tuple[Key, Tensor, list[Loss]]] = []
        for constant in constants:
            key, name = constant.key, constant.name
            with located(tensor=name):
                quantization: Quantization | None = None
                losses: list[Loss] = []
                if is_integer(constant.dtype):
                    source = _Parameters(plain, key, name)
                    quantization, losses = quantization_of(name, constant.shape, constant.table.quantization, source)
                if constant.table.sparsity is not None:
                    losses.append(
                        Loss(name, "expanded", "its sparse values are written out with the zeros between them")
                    )
                results.append((key, replace(plain[key], quantization=quantization), losses))
        for key, made, losses in results:
            yield made if plain[key].parameter_of is None else plain[key], losses

    def _plain(self, constant: _Constant) -> Tensor:
        """The tensor without quantization."""
        data = constant.data
        if constant.table.sparsity is not None:
            data = _expanded(constant, constant.table.sparsity, self.section.data.file.path)
        uses = tuple(self.uses.get(constant.key, ()))
        return Tensor(constant.name, constant.shape, constant.dtype, data, uses=uses)

    def _data(self, key: Key, tensor: schema.Tensor) -> Data | None:
        """The tensor's bytes; None if it has none (an activation, a variable)."""
        if tensor.external_buffer:
            return self._external_data(tensor.external_buffer)
        if tensor.buffer >= len(self.buffers):
            raise CorruptFile(f"has buffer {tensor.buffer} of {len(self.buffers)}: the file is damaged")
        buffer = self.buffers[tensor.buffer]
        content = buffer.data
        base = self.section.data
        if content is not None and content.size:
            start = content.__array_interface__["data"][0] - base.file.view.__array_interface__["data"][0]
            return base.file.range(start, content.size)
        if buffer.offset > 1 and buffer.size:
            if buffer.offset + buffer.size > base.nbytes:
                raise CorruptFile(
                    f"has its data at bytes {buffer.offset} to {buffer.offset + buffer.size} of {base.nbytes}: "
                    "the file is truncated"
                )
            return base.file.range(base.offset + buffer.offset, buffer.size)
        if 0 in _indices(tensor.shape) and key not in self.produced:
            return InMemory(np.zeros(0, np.uint8))  # no operator computes it, so it is a constant without elements
        return None

    def _external_data(self, identifier: int) -> FileRange:
        matching = self.external_buffers.get(identifier, [])
        if len(matching) != 1:
            raise CorruptFile(f"refers to external buffer {identifier}, which the file lists {len(matching)} times")
        buffer = matching[0]
        if buffer.packing:
            raise Unsupported(f"has an external buffer with packing '{buffer.packing}', which is not documented")
        if buffer.group >= len(self.external_groups):
            raise CorruptFile(f"refers to group {buffer.group} of {len(self.external_groups)} of external buffers")
        name = self.external_groups[buffer.group].name or ""
        if name not in self.external_files:
            self.external_files[name] = self._external_file(name)
        group = self.external_files[name]
        if buffer.offset + buffer.length > group.nbytes:
            raise CorruptFile(
                f"has an external buffer at bytes {buffer.offset} to {buffer.offset + buffer.length} of the "
                f"{group.nbytes} bytes of '{name}'"
            )
        return group.file.range(group.offset + buffer.offset, buffer.length)

    def _external_file(self, name: str) -> FileRange:
        """A file beside the model, or the container's section of weights. The name must not lead out of the folder."""
        if self.section.weights:
            return next(iter(self.section.weights.values()))
        file = MappedFile.open(contained_file(self.section.data.file.path.parent, name))
        return file.range(0, file.view.size)


@dataclass(frozen=True, slots=True, eq=False)
class _Parameters:
    """The constant tensors of a subgraph, for the tensor at `key` that has others as its parameters."""

    plain: dict[Key, Tensor]
    key: Key
    name: str

    def look(self, index: int) -> Tensor:
        key = (self.key[0], index)
        if key not in self.plain or key == self.key:
            raise CorruptFile(f"names tensor {index} as a parameter, which holds no constant numbers for it")
        return self.plain[key]

    def take(self, index: int) -> Tensor:
        key = (self.key[0], index)
        if self.plain[key].parameter_of is None:
            self.plain[key] = replace(self.plain[key], parameter_of=self.name)
        return self.plain[key]


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator with its tensors as keys; absent inputs are None."""

    name: str
    inputs: tuple[Key | None, ...]
    outputs: tuple[Key, ...]
    transposed: bool


def _operators(names: list[str], index: int, subgraph: schema.SubGraph, count: int) -> list[_Operator]:
    """The operators of a subgraph with `count` tensors; `names` are the names of the operator codes."""
    operators = []
    for position, operator in enumerate(subgraph.operators):
        if operator.opcode_index >= len(names):
            raise CorruptFile(
                f"operator {position} of subgraph {index} has code {operator.opcode_index} of {len(names)}: "
                "the file is damaged"
            )
        name = names[operator.opcode_index]
        inputs, outputs = _indices(operator.inputs), _indices(operator.outputs)
        _check_tensors(f"operator {position} ({name}) of subgraph {index}", (*inputs, *outputs), count)
        options = operator.batch_matmul_options
        transposed = operator.builtin_options_type == schema.BatchMatMulOptions.TYPE and options is not None
        operators.append(
            _Operator(
                name,
                tuple((index, tensor) if tensor >= 0 else None for tensor in inputs),
                tuple((index, tensor) for tensor in outputs if tensor >= 0),
                transposed and options is not None and bool(options.adj_y),
            )
        )
    return operators


def _check_tensors(who: str, tensors: tuple[int, ...], count: int, *, least: int = -1) -> None:
    """Raises CorruptFile for an index that is not a tensor's. An absent tensor of an operator is -1."""
    for tensor in tensors:
        if not least <= tensor < count:
            raise CorruptFile(f"{who} refers to tensor {tensor} of {count}: the file is damaged")


def _uses(graphs: list[list[_Operator]], tensors: list[list[schema.Tensor]]) -> dict[Key, list[Use]]:
    """The consumers of each tensor. Operators that only change its storage pass their own consumers on."""
    uses: dict[Key, list[Use]] = {}
    # operators are in execution order, so going backwards, consumers are known before the tensors that they take
    for operators in graphs:
        for operator in reversed(operators):
            passed: list[Use] = []
            if operator.name in STORAGE_OPERATORS and operator.outputs:
                # popped, not copied: in a damaged file one tensor can be the output of many operators
                passed = uses.pop(operator.outputs[0], [])
            for position, key in reversed(list(enumerate(operator.inputs))):
                if key is not None:
                    found, passed = passed or [_use(operator, position, key, tensors)], []
                    if key in uses:
                        uses[key] += found
                    else:
                        uses[key] = found
    for found in uses.values():
        found.reverse()
    return uses


def _use(operator: _Operator, position: int, key: Key, tensors: list[list[schema.Tensor]]) -> Use:
    known = OPERATORS.get(operator.name, UNKNOWN)
    weight = known.weights.get(position)
    if weight is not None and operator.transposed:
        weight = TRANSPOSED_BATCH_MATMUL
    shape = tensors[key[0]][key[1]].shape
    use = (weight or OperatorInput()).use(operator.name, position, range(0 if shape is None else len(shape)))
    if known.data is None or (weight is None and position != known.bias):
        return use
    data = operator.inputs[known.data] if known.data < len(operator.inputs) else None
    result = operator.outputs[0] if operator.outputs else None
    return replace(use, activation=_activation(data, tensors), result=_activation(result, tensors))


def _activation(key: Key | None, tensors: list[list[schema.Tensor]]) -> Activation | None:
    """What kernels need to know about the tensor at `key`; None if it does not have one scale as a whole."""
    if key is None:
        return None
    table = tensors[key[0]][key[1]]
    parameters = table.quantization
    if parameters is None or parameters.details_type:
        return None
    with located(tensor=table.name):
        dtype, shape = schema.DTYPES.get(_type_name(table)), _shape(table)
    if dtype is None or not is_integer(dtype):
        return None
    scale, zero_point = parameters.scale, parameters.zero_point
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1 or not np.isfinite(scale).all():
        return None
    return Activation(dtype, shape, float(scale[0]), int(zero_point[0]))


def _operator_name(code: schema.OperatorCode) -> str:
    builtin = max(code.deprecated_builtin_code, code.builtin_code)
    if builtin == schema.CUSTOM:
        return f"CUSTOM:{code.custom_code or ''}"
    return schema.BUILTIN_OPERATORS[builtin] if 0 <= builtin < len(schema.BUILTIN_OPERATORS) else f"BUILTIN:{builtin}"


def _type_name(tensor: schema.Tensor) -> str:
    if not 0 <= tensor.type < len(schema.TENSOR_TYPES):
        raise Unsupported(f"has tensor type {tensor.type}, which this version does not know")
    return schema.TENSOR_TYPES[tensor.type]


def _port(tensor: schema.Tensor) -> Port:
    """What the file says of an input or output. A size of -1 in its signature is open."""
    known = 0 <= tensor.type < len(schema.TENSOR_TYPES)
    kind = schema.TENSOR_TYPES[tensor.type] if known else ""
    dtype = schema.DTYPES[kind].name if kind in schema.DTYPES else kind.lower()
    sizes = _indices(tensor.shape if tensor.shape_signature is None else tensor.shape_signature)
    checked_shape([max(size, 0) for size in sizes], tensor=tensor.name)
    shape = tuple("" if size < 0 else size for size in sizes)
    return Port(tensor.name or "", dtype, shape)


def _shape(tensor: schema.Tensor) -> tuple[int, ...]:
    return checked_shape(_indices(tensor.shape))


def _expanded(constant: _Constant, sparsity: schema.SparsityParameters, path: Path) -> Data:
    """The dense data of a sparse tensor, expanded when they are read."""
    dtype, stored = constant.dtype, constant.data
    if dtype in SUB_BYTE:
        raise Unsupported(f"is sparse with {dtype} values, of which no producer is known")
    if stored.nbytes % dtype.itemsize:
        raise CorruptFile(f"has {stored.nbytes} bytes of {dtype} values")
    layout = sparse_layout(sparsity, constant.shape)
    return SparseData(path, constant.name, layout, dtype, stored)


def _unique_names(names: list[str]) -> list[str]:
    """Unique names: the second `name` becomes `name:1`, and so on, skipping names that already exist."""
    free, seen = UniqueNames(names, separator=":"), set[str]()
    unique = []
    for name in names:
        unique.append(free.fresh(name) if name in seen else name)
        seen.add(name)
    return unique


def _indices(values: NDArray[Any] | None) -> list[int]:
    return [] if values is None else values.tolist()
