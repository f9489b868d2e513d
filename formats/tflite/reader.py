"""TFLite models -> Model: every constant tensor, with its quantization and with what consumes it.

Format: schema.fbs 3d and what LiteRT 2.3 reads (`formats.tflite.schema`). Headers only: data stays in the mapped file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptFile, Error, Unsupported
from converters.ir import Loss, Metadata, Model, Quantization, Tensor, Use, is_integer
from converters.packing import SUB_BYTE, bits_of, packed_size
from converters.storage import Computed, Data, FileRange, InMemory, MappedFile
from formats.tflite import schema
from formats.tflite.containers import Section, sections
from formats.tflite.quantization import quantization_of
from formats.tflite.sparsity import sparse_layout

#: A tensor by subgraph and index.
Key = tuple[int, int]


class TFLiteReader:
    """Reads .tflite, .litertlm and .task files."""

    def read(self, path: Path) -> Model:
        """The constant tensors of all subgraphs of all models in the file, under their own names (duplicates get `:1`,
        `:2`, nameless ones `subgraph0/tensor5`; several models in a container: `<section>/<name>`)."""
        found = sections(MappedFile.open(path))
        files = [_ModelFile.open(section) for section in found]
        tensors: list[Tensor] = []
        losses: list[Loss] = []
        operators: Counter[str] = Counter()
        for file in files:
            prefix = f"{file.section.name}/" if len(files) > 1 else ""
            for tensor, tensor_losses in file.constants(prefix):
                tensors.append(tensor)
                losses += tensor_losses
            losses += file.unreadable(prefix)
            operators.update(file.operator_names)
        named, renamed = _unique_names(tensors)
        producer = next((file.model.description for file in files if file.model.description), "")
        metadata = Metadata("tflite", producer, path, dict(operators))
        return Model(named, metadata, losses=(*losses, *renamed))


@dataclass(frozen=True, slots=True, eq=False)
class _ModelFile:
    """One model: its root table with the vectors that are asked for again and again, all indices in them checked."""

    section: Section
    model: schema.Model
    buffers: list[schema.Buffer]
    subgraphs: list[list[schema.Tensor]]
    uses: dict[Key, tuple[Use, ...]]
    produced: set[Key]
    operator_names: Counter[str]
    external: dict[int, FileRange] = field(default_factory=dict)

    @classmethod
    def open(cls, section: Section) -> _ModelFile:
        """Parses the section's headers. Raises CorruptFile for a wrong identifier, offset, length or index."""
        content = section.data.read(0, section.data.nbytes)
        identifier = content[4:8].tobytes()
        if identifier != schema.IDENTIFIER:
            raise CorruptFile(f"has identifier {identifier!r} at byte 4; a TFLite model has {schema.IDENTIFIER!r}")
        model = schema.Model.root(content)
        if model.version != schema.VERSION:
            raise Unsupported(f"has schema version {model.version}; {schema.VERSION} is the one in use since 2017")
        subgraphs = model.subgraphs
        operators = [_operators(model, index, subgraph) for index, subgraph in enumerate(subgraphs)]
        return cls(
            section=section,
            model=model,
            buffers=model.buffers,
            subgraphs=[subgraph.tensors for subgraph in subgraphs],
            uses=_uses(operators),
            produced={key for graph in operators for operator in graph for key in operator.outputs}
            | {(index, i) for index, subgraph in enumerate(subgraphs) for i in _indices(subgraph.inputs)},
            operator_names=Counter(operator.name for graph in operators for operator in graph),
        )

    def constants(self, prefix: str) -> Iterator[tuple[Tensor, list[Loss]]]:
        """Every constant tensor that holds numbers, in order, and what reading it lost. A tensor that another one names
        as its parameter is the same object there, and says so in `parameter_of`."""
        plain: dict[Key, Tensor] = {}
        owners: dict[Key, str] = {}

        def parameter(subgraph: int, index: int, owner: str) -> Tensor:
            key = (subgraph, index)
            if not 0 <= index < len(self.subgraphs[subgraph]):
                raise CorruptFile(
                    f"names tensor {index} as a parameter; its subgraph has {len(self.subgraphs[subgraph])}"
                )
            if key not in plain:
                made = self._plain(key, prefix)
                if made is None:
                    raise CorruptFile(f"names tensor {index} as a parameter, which has no constant numbers")
                owners[key] = owner
                plain[key] = replace(made, parameter_of=owner)
            return plain[key]

        results: list[tuple[Key, Tensor, list[Loss]]] = []
        for subgraph, tensors in enumerate(self.subgraphs):
            for index, tensor in enumerate(tensors):
                key = (subgraph, index)
                name = self._name(key, tensor, prefix)
                try:
                    made = self._plain(key, prefix)
                    if made is None:
                        continue
                    quantization: Quantization | None = None
                    losses: list[Loss] = []
                    if is_integer(made.dtype):
                        quantization, losses = quantization_of(
                            name,
                            made.shape,
                            tensor.quantization,
                            lambda i, subgraph=subgraph, name=name: parameter(subgraph, i, name),  # type: ignore[misc]
                        )
                    if tensor.sparsity is not None:
                        losses.append(Loss(name, "expanded", "its sparse values are written with the zeros between"))
                    results.append((key, replace(made, quantization=quantization), losses))
                except Error as error:
                    error.tensor = error.tensor or name
                    raise
        for key, made, losses in results:
            yield plain.get(key, made), losses

    def unreadable(self, prefix: str) -> Iterator[Loss]:
        """The constant tensors that hold no numbers (strings)."""
        for subgraph, tensors in enumerate(self.subgraphs):
            for index, tensor in enumerate(tensors):
                kind = _type_name(tensor)
                if kind not in schema.DTYPES and self._data(tensor) is not None:
                    yield Loss(self._name((subgraph, index), tensor, prefix), "dropped", f"{kind} holds no numbers")

    def _name(self, key: Key, tensor: schema.Tensor, prefix: str) -> str:
        return prefix + (tensor.name or f"subgraph{key[0]}/tensor{key[1]}")

    def _plain(self, key: Key, prefix: str) -> Tensor | None:
        """The tensor without quantization; None when it is not constant or holds no numbers."""
        tensor = self.subgraphs[key[0]][key[1]]
        dtype = schema.DTYPES.get(_type_name(tensor))
        if dtype is None:
            return None
        shape = tuple(_indices(tensor.shape))
        data: Data | None = self._data(tensor)
        if data is None:
            # constants without elements have no bytes either; nothing computes them
            if 0 not in shape or key in self.produced or key not in self.uses:
                return None
            data = InMemory(np.zeros(0, np.uint8))
        name = self._name(key, tensor, prefix)
        if tensor.sparsity is not None:
            data = _expanded(tensor.sparsity, name, shape, dtype, data)
        uses = tuple(
            use if use.channel_axis is None or not shape else replace(use, channel_axis=use.channel_axis % len(shape))
            for use in self.uses.get(key, ())
        )
        return Tensor(name, shape, dtype, data, uses=uses)

    def _data(self, tensor: schema.Tensor) -> FileRange | None:
        """Where the tensor's bytes are; None when it has none (an activation, a variable)."""
        if tensor.external_buffer:
            return self._external_data(tensor.external_buffer)
        if tensor.buffer >= len(self.buffers):
            raise CorruptFile(
                f"has buffer {tensor.buffer} of {len(self.buffers)}: the file is damaged", tensor=tensor.name
            )
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
                    "the file is truncated",
                    tensor=tensor.name,
                )
            return base.file.range(base.offset + buffer.offset, buffer.size)
        return None

    def _external_data(self, identifier: int) -> FileRange:
        if identifier not in self.external:
            matching = [buffer for buffer in self.model.external_buffers if buffer.id == identifier]
            if len(matching) != 1:
                raise CorruptFile(f"refers to external buffer {identifier}, which the file lists {len(matching)} times")
            buffer = matching[0]
            if buffer.packing:
                raise Unsupported(f"has an external buffer with packing '{buffer.packing}', which is not documented")
            groups = self.model.external_buffer_groups
            if buffer.group >= len(groups):
                raise CorruptFile(f"refers to group {buffer.group} of {len(groups)} of external buffers")
            group = self._external_file(groups[buffer.group].name or "")
            if buffer.offset + buffer.length > group.nbytes:
                raise CorruptFile(
                    f"has an external buffer at bytes {buffer.offset} to {buffer.offset + buffer.length} of the "
                    f"{group.nbytes} bytes of '{groups[buffer.group].name}'"
                )
            self.external[identifier] = group.file.range(group.offset + buffer.offset, buffer.length)
        return self.external[identifier]

    def _external_file(self, name: str) -> FileRange:
        """A file beside the model, or the container's section of weights. It must not lead out of the folder."""
        if self.section.weights:
            return next(iter(self.section.weights.values()))
        folder = self.section.data.file.path.parent.resolve()
        relative = PurePosixPath(name)
        path = folder / relative
        outside = relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name or not name
        if outside or path.resolve() != path:
            raise CorruptFile(
                f"takes weights from '{name}'; a file below the model's own folder, reached without links, is needed"
            )
        file = MappedFile.open(path)
        return file.range(0, file.view.size)


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator with its tensors as keys; absent inputs are None."""

    name: str
    inputs: tuple[Key | None, ...]
    outputs: tuple[Key, ...]
    transposed: bool


def _operators(model: schema.Model, index: int, subgraph: schema.SubGraph) -> list[_Operator]:
    names = [_operator_name(code) for code in model.operator_codes]
    count = len(subgraph.tensors)
    operators = []
    for position, operator in enumerate(subgraph.operators):
        if operator.opcode_index >= len(names):
            raise CorruptFile(
                f"operator {position} of subgraph {index} has code {operator.opcode_index} of {len(names)}: "
                "the file is damaged"
            )
        name = names[operator.opcode_index]
        inputs, outputs = _indices(operator.inputs), _indices(operator.outputs)
        for tensor in (*inputs, *outputs):
            if not -1 <= tensor < count:
                raise CorruptFile(
                    f"operator {position} ({name}) of subgraph {index} refers to tensor {tensor} of {count}: "
                    "the file is damaged"
                )
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


def _uses(graphs: list[list[_Operator]]) -> dict[Key, tuple[Use, ...]]:
    """What consumes each tensor; operators that only change its storage pass their own consumers on."""
    uses: dict[Key, tuple[Use, ...]] = {}
    # operators are in execution order: from the last to the first, consumers are known before what they consume
    for operators in graphs:
        for operator in reversed(operators):
            for position, key in enumerate(operator.inputs):
                if key is None:
                    continue
                found: tuple[Use, ...] = ()
                if operator.name in schema.STORAGE_OPERATORS:
                    found = tuple(use for output in operator.outputs for use in uses.get(output, ()))
                uses[key] = (*(found or (_use(operator, position),)), *uses.get(key, ()))
    return uses


def _use(operator: _Operator, position: int) -> Use:
    if operator.name == "BATCH_MATMUL" and position == 1:
        # [.., K, N], or [.., N, K] with adj_y; counted from the end, as only the tensor knows its rank
        return Use(operator.name, position, -2 if operator.transposed else -1)
    weight_input, axis = schema.WEIGHT_INPUTS.get(operator.name, (None, None))
    return Use(operator.name, position, axis if position == weight_input else None)


def _operator_name(code: schema.OperatorCode) -> str:
    builtin = max(code.deprecated_builtin_code, code.builtin_code)
    if builtin == schema.CUSTOM:
        return f"CUSTOM:{code.custom_code or ''}"
    return schema.BUILTIN_OPERATORS[builtin] if 0 <= builtin < len(schema.BUILTIN_OPERATORS) else f"BUILTIN:{builtin}"


def _type_name(tensor: schema.Tensor) -> str:
    if not 0 <= tensor.type < len(schema.TENSOR_TYPES):
        raise Unsupported(f"has tensor type {tensor.type}, which this version does not know", tensor=tensor.name)
    return schema.TENSOR_TYPES[tensor.type]


def _expanded(
    sparsity: schema.SparsityParameters, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], stored: Data
) -> Data:
    """The dense data of a sparse tensor, expanded when it is read."""
    if dtype in SUB_BYTE:
        raise Unsupported(f"is sparse with {dtype} values, of which no producer is known", tensor=name)
    if stored.nbytes % dtype.itemsize:
        raise CorruptFile(f"has {stored.nbytes} bytes of {dtype} values", tensor=name)
    if any(size < 0 for size in shape):
        raise CorruptFile(f"shape {shape} has a negative size", tensor=name)
    elements = int(np.prod(shape, dtype=object))
    nbytes = packed_size(elements, bits_of(dtype))
    layout = sparse_layout(sparsity, shape, stored.nbytes, nbytes)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        try:
            dense = layout.expand(stored.read(0, stored.nbytes).view(dtype))
        except CorruptFile as error:
            error.tensor = name
            raise
        return dense.reshape(-1).view(np.uint8)[start:stop]

    return Computed(nbytes, compute)


def _unique_names(tensors: list[Tensor]) -> tuple[dict[str, Tensor], list[Loss]]:
    """Tensors by name; the second of a name becomes `name:1`, and so on, past names that there are already."""
    taken = {tensor.name for tensor in tensors}
    named: dict[str, Tensor] = {}
    losses = []
    for tensor in tensors:
        name, number = tensor.name, 0
        while name in named or (number and name in taken):
            number += 1
            name = f"{tensor.name}:{number}"
        if number:
            losses.append(Loss(name, "renamed", f"another tensor is named '{tensor.name}' too"))
            tensor = replace(tensor, name=name)
        named[name] = tensor
    return named, losses


def _indices(values: NDArray[Any] | None) -> list[int]:
    return [] if values is None else values.tolist()
