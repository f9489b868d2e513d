"""Weights as C: a header and a source file (or one header) that a firmware engineer includes and compiles as they are.

What the C looks like is in templates/; the header that is written says how it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from converters.errors import UsageError
from converters.interfaces import Capabilities, OutputFile, Size, option
from converters.ir import Loss, Model, Tensor
from formats.cheader import kernels
from formats.cheader.arrays import Array, arrays_of, check
from formats.cheader.identifiers import checked_prefix, fits_string, includable, prefix_of
from formats.cheader.notation import NOTATIONS
from formats.cheader.provenance import Provenance
from formats.cheader.render import ARRAY_CLOSING, PLACEHOLDER, Document, Entry, entries_of, runtime_header
from formats.cheader.text import InitialiserText, text_size

RUNTIME_HEADER = "nibblecast.h"


@dataclass(frozen=True, slots=True)
class CHeaderOptions:
    """How the C is laid out."""

    layout: Literal["split", "header"] = option(
        "split", "split: weights.h, weights.c and nibblecast.h; header: everything static in one weights.h"
    )
    prefix: str = option("", "what all identifiers begin with; empty: made of the output's name")
    fixed_point: bool = option(
        False,
        "also the Q31 multipliers, shifts and offsets with which int8 kernels requantize, as in TFLite Micro",
    )
    budget: Size | None = option(None, "the most bytes of flash that all arrays may take; above it nothing is written")


@dataclass(frozen=True, slots=True)
class CHeaderPlan:
    """The files that will be written, and what of the model they do not hold as it is."""

    document: Document
    files: Sequence[OutputFile]
    losses: Sequence[Loss]
    provenance: Provenance
    notes: Sequence[str]

    @property
    def report(self) -> Sequence[str]:
        """What the arrays cost on a device."""
        return self.document.flash.lines()

    def open(self, streams: Sequence[BinaryIO]) -> CHeaderSink:
        """Writes what comes before the arrays; reads the source file for its SHA-256."""
        provenance = self.provenance.with_digest()
        _write(streams[0], self.document.header(provenance))
        if self.document.static:
            return CHeaderSink(self.document, streams[0])
        _write(streams[1], self.document.source_opening(self.files[1].path.name, provenance))
        _write(streams[2], runtime_header())
        return CHeaderSink(self.document, streams[1])


class CHeaderSink:
    """Writes the arrays of each tensor as it comes, and the table of tensors at the end."""

    def __init__(self, document: Document, stream: BinaryIO) -> None:
        self._document = document
        self._stream = stream
        self._entries = {entry.tensor.name: entry for entry in document.entries}

    def write(self, tensor: Tensor) -> None:
        """Writes the tensor's arrays; nothing for one that is only a parameter of another."""
        entry = self._entries.get(tensor.name)
        if entry is None:
            return
        for array in replace(entry, tensor=tensor).arrays:
            _write(self._stream, self._document.array_opening(entry.base, array))
            if array.count:
                self._write_elements(array)
            else:
                _write(self._stream, PLACEHOLDER)
            _write(self._stream, ARRAY_CLOSING)

    def close(self) -> None:
        """Writes the table of tensors."""
        _write(self._stream, self._document.table())

    def _write_elements(self, array: Array) -> None:
        text = InitialiserText(self._stream, array.notation, array.count)
        for elements in array.chunks():
            text.write(elements)
        text.finish()


class CHeaderWriter:
    """Writes .h and .c files. Codes stay packed as they are; parameters become float and int32_t."""

    options: ClassVar[type] = CHeaderOptions
    capabilities: ClassVar[Capabilities] = Capabilities(dtypes=frozenset(NOTATIONS), nested_scale=False)

    def plan(self, model: Model, target: Path, options: CHeaderOptions) -> CHeaderPlan:
        """Names every tensor and every file. Raises UsageError for a prefix or a file name that C has no use for,
        Unsupported for a tensor that C cannot hold, and RefusedLoss where the arrays take more than the budget."""
        static = options.layout == "header"
        _check_target(target, static)
        prefix = checked_prefix(options.prefix) if options.prefix else prefix_of(target.stem)
        tensors = [tensor for tensor in model.values() if not _is_parameter(tensor, model)]
        for tensor in tensors:
            check(tensor)
        entries = entries_of(prefix, tensors, fixed_point=options.fixed_point)
        document = Document(target.name, prefix, entries, static)
        document.flash.refuse_above(options.budget)
        provenance = Provenance.of(model.metadata, _chosen(options) | {"prefix": prefix})
        losses, notes = tuple(_losses(model, tensors)), _notes(tensors, options)
        return CHeaderPlan(document, _files(document, target, provenance), losses, provenance, notes)


def _is_parameter(tensor: Tensor, model: Mapping[str, Tensor]) -> bool:
    owner = None if tensor.parameter_of is None else model.get(tensor.parameter_of)
    return owner is not None and owner.quantization is not None


def _check_target(target: Path, static: bool) -> None:
    if target.name.lower() == RUNTIME_HEADER:
        raise UsageError(f"'{target.name}' is the name of the file that all models share: choose another", path=target)
    if not static and target.suffix.lower() == ".c":
        raise UsageError("the .c file is written beside the header: name the header, weights.h say", path=target)
    if not static and not includable(target.name):
        raise UsageError(
            f"'{target.name}' is no name that every compiler can #include: "
            "letters of ASCII are needed, or --opt layout=header",
            path=target,
        )


def _files(document: Document, target: Path, provenance: Provenance) -> tuple[OutputFile, ...]:
    header = len(document.header(provenance))
    arrays = sum(_text_nbytes(document, entry) for entry in document.entries) + len(document.table())
    if document.static:
        return (OutputFile(target, header + arrays),)
    source = target.with_suffix(".c")
    opening = len(document.source_opening(source.name, provenance))
    return (
        OutputFile(target, header),
        OutputFile(source, opening + arrays),
        OutputFile(target.with_name(RUNTIME_HEADER), len(runtime_header()), shared=True),
    )


def _text_nbytes(document: Document, entry: Entry) -> int:
    """Bytes of text that the entry's arrays take."""
    return sum(
        len(document.array_opening(entry.base, array))
        + (text_size(array.notation, array.count) or len(PLACEHOLDER))
        + len(ARRAY_CLOSING)
        for array in entry.arrays
    )


def _chosen(options: CHeaderOptions) -> dict[str, Any]:
    """The options to name in the output: those that are set."""
    return {name.replace("_", "-"): value for name, value in asdict(options).items() if value not in (None, False)}


def _notes(tensors: Sequence[Tensor], options: CHeaderOptions) -> tuple[str, ...]:
    found = kernels.notes(tensors)
    if not options.fixed_point:
        return found
    from formats.cheader import fixed_point

    return (*found, *fixed_point.notes(tensors))


def _losses(model: Model, tensors: Sequence[Tensor]) -> list[Loss]:
    losses = [] if model.graph is None else [Loss("", "dropped", "C arrays hold weights: the graph is left out")]
    for tensor in tensors:
        for array in arrays_of(tensor)[1:]:
            stored = str(array.tensor.dtype)
            if array.notation.c_type == "float" and stored != "float32" and array.tensor.quantization is None:
                detail = f"its {array.role.replace('_', ' ')} of {stored} is written as float"
                losses.append(Loss(tensor.name, "rounded" if stored == "float64" else "widened", detail))
        if not fits_string(tensor.name):
            losses.append(Loss(tensor.name, "renamed", "its name is cut in the table to the longest string C allows"))
    return losses


def _write(stream: BinaryIO, text: str) -> None:
    stream.write(text.encode("ascii"))
