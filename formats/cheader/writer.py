"""Weights as C: a header and a source file (or one header) that a firmware engineer includes and compiles as they are.

What the C looks like is in templates/; the header that is written says how it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, ClassVar

from nibblecast.converters.errors import RefusedLoss, UsageError, brief
from nibblecast.converters.interfaces import Capabilities, Companion, OutputFile, Plan, Shard, Size
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
    entries_of,
    placed,
    runtime_header,
)

RUNTIME_HEADER = "nibblecast.h"

_SLOW_TO_COMPILE = 1 << 20  # bytes of data; gcc takes 1.5 s and 145 MB for as many


@dataclass(frozen=True, slots=True, eq=False)
class CFile(Shard):
    """Text: what comes first, and the arrays with the table of tensors, where `has_arrays`. What comes first says where
    the model is from, the source's SHA-256 included; so it is made when it is written."""

    document: Document
    opening: Callable[[], str]
    has_arrays: bool

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the file; reads the source for its SHA-256."""
        _write(stream, self.opening())
        if not self.has_arrays:
            return
        for entry in self.document.everything:
            for array in entry.arrays:
                before, after = self.document.array_text(entry, array)
                _write(stream, before)
                _write_elements(stream, array)
                _write(stream, after)
            if not entry.is_in_file:
                wrote(entry.tensor.nbytes)
            entry.tensor.release()
        _write(stream, self.document.table())


@dataclass(frozen=True, slots=True, eq=False)
class PayloadFile(Shard):
    """The data that the compiler reads as they are."""

    entries: Sequence[Entry]

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the data of each tensor, and zeros up to where they begin."""
        for entry in self.entries:
            stream.write(bytes(entry.offset - stream.tell()))
            for elements in entry.arrays[0].chunks():
                stream.write(elements.data)
            wrote(entry.tensor.nbytes)
            entry.tensor.release()


class CHeaderWriter:
    """Writes .h and .c files. Codes stay packed as they are; parameters become float and int32_t."""

    options: ClassVar[type] = CHeaderOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        dtypes=frozenset(NOTATIONS), nested_scale=False, compute_dtype=False
    )

    def plan(self, model: Model, target: Path, options: CHeaderOptions) -> Plan:
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
        shards = _shards(document, target, provenance)
        runtime = runtime_header().encode("ascii")
        companions = [] if static else [_companion(target.with_name(RUNTIME_HEADER), runtime, shared=True)]
        if options.depfile:
            rule = _dependencies(model, [shard.file.path for shard in shards])
            companions.append(_companion(_depfile(options.depfile), rule))
        return Plan(
            shards,
            () if only_file else tuple(_losses(model, document)),
            (*_kernel_notes(tensors, arrangement, options), *_style_notes(document)),
            document.flash.lines(),
            companions,
        )


def _whole_file(model: Model, prefix: str, entries: Sequence[Entry], arrangement: Arrangement) -> Entry:
    from nibblecast.formats.cheader.sources import model_array

    array = model_array(model, arrangement)
    return placed(Entry(array.tensor, prefix, (array,)), max((entry.end for entry in entries), default=0))


def _depfile(name: str) -> Path:
    path = Path(name)
    if not path.name or "\0" in name or path.is_dir():
        raise UsageError(f"depfile={brief(name)}: must be the name of a file without a folder")
    return path


def _dependencies(model: Model, outputs: Sequence[Path]) -> bytes:
    """The rule for all outputs but the one that other models share: ninja stops at an output that its build statement
    does not declare, and two statements cannot declare the same."""
    from nibblecast.formats.cheader.depfile import dependency_file
    from nibblecast.formats.cheader.sources import source_files

    return dependency_file(outputs, source_files(model))


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
            f"'{target.name}' is not a name that every compiler can #include: letters of ASCII are needed{way_out}",
            path=target,
        )


def _shards(document: Document, target: Path, provenance: Provenance) -> list[Shard]:
    """The files that are the model's own, the one that the user named first."""
    with_digest = cache(provenance.with_digest)  # which takes reading the source: once for both files

    def header() -> str:
        return document.header(with_digest())

    def opening() -> str:
        return document.source_opening(source.name, with_digest())

    source = target.with_suffix(".c")
    tensors = [entry.tensor for entry in document.everything if not entry.is_in_file]
    arrays = sum(_text_nbytes(document, entry) for entry in document.everything) + len(document.table())
    nbytes = len(document.header(provenance))
    if document.static:
        shards: list[Shard] = [CFile(OutputFile(target, nbytes + arrays), tensors, document, header, has_arrays=True)]
    else:
        source_nbytes = len(document.source_opening(source.name, provenance)) + arrays
        shards = [
            CFile(OutputFile(target, nbytes), (), document, header, has_arrays=False),
            CFile(OutputFile(source, source_nbytes), tensors, document, opening, has_arrays=True),
        ]
    if document.arrangement.style.in_file:
        entries = [entry for entry in document.everything if entry.is_in_file]
        file = OutputFile(target.with_name(document.payload_file), document.payload_nbytes)
        shards.append(PayloadFile(file, [entry.tensor for entry in entries], entries))
    return shards


def _companion(path: Path, content: bytes, *, shared: bool = False) -> Companion:
    return Companion(OutputFile(path, len(content), shared=shared), content)


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


def _write_elements(stream: BinaryIO, array: Array) -> None:
    if not array.elements:
        _write(stream, PLACEHOLDER)
    elif not array.style.in_file:
        text = InitialiserText(stream, array.notation, array.elements)
        for elements in array.chunks():
            text.write(elements)
        text.finish()


def _write(stream: BinaryIO, text: str) -> None:
    stream.write(text.encode("ascii"))
