"""Weights as C: a header and a source file (or one header) that a firmware engineer includes and compiles as they are.

What the C looks like is in templates/; the header that is written says how it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from nibblecast.converters.errors import RefusedLoss, UsageError, brief
from nibblecast.converters.interfaces import Capabilities, OutputFile, Size
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.formats.cheader.arrays import BYTES, Arrangement, Array, Style, check
from nibblecast.formats.cheader.device import kernels
from nibblecast.formats.cheader.identifiers import checked_prefix, fits_string, includable, prefix_of
from nibblecast.formats.cheader.literals.notation import NOTATIONS
from nibblecast.formats.cheader.literals.text import InitialiserText, text_size
from nibblecast.formats.cheader.options import CHeaderOptions
from nibblecast.formats.cheader.provenance import Provenance
from nibblecast.formats.cheader.render import (
    PLACEHOLDER,
    Document,
    Entry,
    arrays_with,
    entries_of,
    placed,
    runtime_header,
)

RUNTIME_HEADER = "nibblecast.h"

_SLOW_TO_COMPILE = 1 << 20  # bytes of data; gcc takes 1.5 s and 145 MB for as many


@dataclass(frozen=True, slots=True)
class CHeaderPlan:
    """The files that will be written, by role in the order of `files`, and what of the model they do not hold as it
    is."""

    document: Document
    outputs: Mapping[str, OutputFile]
    losses: Sequence[Loss]
    notes: Sequence[str]
    provenance: Provenance
    dependencies: bytes = b""

    @property
    def report(self) -> Sequence[str]:
        """What the arrays cost on a device."""
        return self.document.flash.lines()

    @property
    def files(self) -> Sequence[OutputFile]:
        return tuple(self.outputs.values())

    def open(self, streams: Sequence[BinaryIO]) -> CHeaderSink:
        """Writes what comes before the arrays; reads the source file for its SHA-256."""
        provenance = self.provenance.with_digest()
        by_role = dict(zip(self.outputs, streams, strict=True))
        _write(by_role["header"], self.document.header(provenance))
        if "source" in by_role:
            _write(by_role["source"], self.document.source_opening(self.outputs["source"].path.name, provenance))
            _write(by_role["runtime"], runtime_header())
        arrays = by_role.get("source", by_role["header"])
        if "depfile" in by_role:
            by_role["depfile"].write(self.dependencies)
        return CHeaderSink(self.document, arrays, by_role.get("payload"))


class CHeaderSink:
    """Writes the arrays of each tensor as it comes, and the table of tensors at the end."""

    def __init__(self, document: Document, stream: BinaryIO, payload: BinaryIO | None) -> None:
        self._document = document
        self._stream = stream
        self._payload = payload
        self._entries = {entry.tensor.name: entry for entry in document.entries}

    def write(self, tensor: Tensor) -> None:
        """Writes the tensor's arrays; nothing for one that is only a parameter of another."""
        entry = self._entries.get(tensor.name)
        if entry is None:
            return
        arrays = arrays_with(tensor, self._document.arrangement, fixed_point=entry.fixed_point)
        self._write_arrays(entry, arrays)

    def close(self) -> None:
        """Writes the source file, where it is wanted, and the table of tensors."""
        if self._document.model is not None:
            self._write_arrays(self._document.model, self._document.model.arrays)
        _write(self._stream, self._document.table())

    def _write_arrays(self, entry: Entry, arrays: Sequence[Array]) -> None:
        for array in arrays:
            before, after = self._document.array_text(entry, array)
            _write(self._stream, before)
            self._write_elements(entry, array)
            _write(self._stream, after)

    def _write_elements(self, entry: Entry, array: Array) -> None:
        if not array.elements:
            _write(self._stream, PLACEHOLDER)
        elif array.style.in_file and self._payload is not None:
            self._payload.write(bytes(entry.offset - self._payload.tell()))
            for elements in array.chunks():
                self._payload.write(elements.data)
        else:
            text = InitialiserText(self._stream, array.notation, array.elements)
            for elements in array.chunks():
                text.write(elements)
            text.finish()


class CHeaderWriter:
    """Writes .h and .c files. Codes stay packed as they are; parameters become float and int32_t."""

    options: ClassVar[type] = CHeaderOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=frozenset(NOTATIONS), nested_scale=False, compute_dtype=False
    )

    def plan(self, model: Model, target: Path, options: CHeaderOptions) -> CHeaderPlan:
        """Names every tensor and every file. Raises UsageError for a prefix or a file name that C has no use for,
        Unsupported for a tensor that C cannot hold, and RefusedLoss where one array takes more than `max_array`, or all
        more than the budget."""
        static = options.layout == "header"
        arrangement = options.arrangement()
        _check_target(target, static, arrangement.style)
        prefix = checked_prefix(options.prefix) if options.prefix else prefix_of(target.stem)
        only_file = options.model_array == "only"
        tensors = [] if only_file else [tensor for tensor in model.values() if not _is_parameter(tensor, model)]
        for tensor in tensors:
            check(tensor)
        entries = entries_of(prefix, tensors, arrangement, fixed_point=options.fixed_point)
        whole = None if options.model_array == "no" else _whole_file(model, prefix, entries, arrangement)
        document = Document(target.name, prefix, entries, static, arrangement, whole)
        _refuse_long_arrays(document, options.max_array)
        document.flash.refuse_above(options.budget)
        provenance = Provenance.of(model.metadata, options.described(prefix))
        outputs, dependencies = _outputs(document, target, provenance), b""
        if options.depfile:
            dependencies = _dependencies(model, outputs)
            outputs["depfile"] = OutputFile(_depfile(options.depfile), len(dependencies))
        return CHeaderPlan(
            document,
            outputs,
            () if only_file else tuple(_losses(model, document)),
            (*_kernel_notes(tensors, arrangement, options), *_style_notes(document)),
            provenance,
            dependencies,
        )


def _whole_file(model: Model, prefix: str, entries: Sequence[Entry], arrangement: Arrangement) -> Entry:
    from nibblecast.formats.cheader.sources import model_array

    array = model_array(model, arrangement)
    return placed(Entry(array.tensor, prefix, (array,)), max((entry.end for entry in entries), default=0))


def _depfile(name: str) -> Path:
    path = Path(name)
    if not path.name or "\0" in name or path.is_dir():
        raise UsageError(f"depfile={brief(name)}: the name of a file is needed, which is no folder")
    return path


def _dependencies(model: Model, outputs: Mapping[str, OutputFile]) -> bytes:
    """The rule for all outputs but the one that other models share: ninja stops at an output that its build statement
    does not declare, and two statements cannot declare the same."""
    from nibblecast.formats.cheader.depfile import dependency_file
    from nibblecast.formats.cheader.sources import source_files

    own = [file.path for file in outputs.values() if not file.shared]
    return dependency_file(own, source_files(model))


def _refuse_long_arrays(document: Document, longest: Size | None) -> None:
    for entry in document.everything:
        for array in entry.arrays:
            if longest is not None and array.nbytes > longest:
                raise RefusedLoss(
                    f"its {array.role.replace('_', ' ')} would be an array of {array.nbytes} bytes, and max-array is "
                    f"{longest}: leave it out with --skip, make it smaller in the model (fewer bits, a split layer), "
                    "or raise max-array",
                    tensor=entry.tensor.name,
                )


def _is_parameter(tensor: Tensor, model: Mapping[str, Tensor]) -> bool:
    owner = None if tensor.parameter_of is None else model.get(tensor.parameter_of)
    return owner is not None and owner.quantization is not None


def _check_target(target: Path, static: bool, style: Style) -> None:
    if target.name.lower() == RUNTIME_HEADER:
        raise UsageError(f"'{target.name}' is the name of the file that all models share: choose another", path=target)
    if not static and target.suffix.lower() == ".c":
        raise UsageError("the .c file is written beside the header: name the header, weights.h say", path=target)
    if (style.in_file or not static) and not includable(target.name):
        way_out = "" if style.in_file else ", or --opt layout=header"
        raise UsageError(
            f"'{target.name}' is no name that every compiler can #include: letters of ASCII are needed{way_out}",
            path=target,
        )


def _outputs(document: Document, target: Path, provenance: Provenance) -> dict[str, OutputFile]:
    """The files by their roles, the one that the user named first."""
    header = len(document.header(provenance))
    arrays = sum(_text_nbytes(document, entry) for entry in document.everything) + len(document.table())
    if document.static:
        outputs = {"header": OutputFile(target, header + arrays)}
    else:
        source = target.with_suffix(".c")
        opening = len(document.source_opening(source.name, provenance))
        outputs = {
            "header": OutputFile(target, header),
            "source": OutputFile(source, opening + arrays),
            "runtime": OutputFile(target.with_name(RUNTIME_HEADER), len(runtime_header()), shared=True),
        }
    if document.arrangement.style.in_file:
        outputs["payload"] = OutputFile(target.with_name(document.payload_file), document.payload_nbytes)
    return outputs


def _text_nbytes(document: Document, entry: Entry) -> int:
    """Bytes of text that the entry's arrays take."""
    return sum(sum(map(len, document.array_text(entry, array))) + _elements_nbytes(array) for array in entry.arrays)


def _elements_nbytes(array: Array) -> int:
    if not array.elements:
        return len(PLACEHOLDER)
    return 0 if array.style.in_file else text_size(array.notation, array.elements)


def _style_notes(document: Document) -> Iterator[str]:
    literals = sum(
        array.nbytes
        for entry in document.everything
        for array in entry.arrays[:1]
        if array.style is BYTES and array.notation.nbytes == 1
    )
    if literals > _SLOW_TO_COMPILE:
        yield (
            f"{literals / _SLOW_TO_COMPILE:.1f} MB of data as a literal for each byte are slow to compile: "
            "--opt style=words64 takes a quarter of the time and a third of the memory, style=incbin next to none"
        )


def _kernel_notes(tensors: Sequence[Tensor], arrangement: Arrangement, options: CHeaderOptions) -> tuple[str, ...]:
    found = kernels.notes(tensors, arrangement.packing)
    if not options.fixed_point:
        return found
    from nibblecast.formats.cheader.device import fixed_point

    return (*found, *fixed_point.notes(tensors))


def _losses(model: Model, document: Document) -> Iterator[Loss]:
    for entry in document.entries:
        name = entry.tensor.name
        for array in entry.arrays[1:]:
            stored = str(array.tensor.dtype)
            if array.notation.c_type == "float" and stored != "float32" and array.tensor.quantization is None:
                detail = f"its {array.role.replace('_', ' ')} is written as float ({stored} before)"
                yield Loss(name, "rounded" if stored == "float64" else "widened", detail)
        if not fits_string(name, document.longest_string):
            yield Loss(name, "dropped", "the end of its name in the table: C limits the length of strings")


def _write(stream: BinaryIO, text: str) -> None:
    stream.write(text.encode("ascii"))
