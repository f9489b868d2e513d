"""The public functions on one source: load, save, convert and verify. They put the pipeline's steps together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from nibblecast.converters import pipeline, plugins
from nibblecast.converters.compare.comparison import Comparison, compare
from nibblecast.converters.errors import UsageError, VerificationFailed, located
from nibblecast.converters.input.paths import AnyPath, input_path, output_path
from nibblecast.converters.interfaces import OutputFile, Progress
from nibblecast.converters.ir import Loss, Model
from nibblecast.converters.option_routing import reader_and_writer_options, reader_options, writer_options

if TYPE_CHECKING:  # quantization is imported when it is asked for
    from nibblecast.converters.arithmetic.accuracy import Accuracy
    from nibblecast.converters.stages.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did, or would do.

    `files` have their sizes (None: known once written). `losses` are what was not kept or has changed. `notes` are
    texts: hints, warnings, and exact changes of form. `report` are the writers' lines of text. With `quantize`,
    `quantized` has the quantization error of each tensor. With `verify`, `verified` has the comparison with what was
    re-read from each target (None: the format has no reader)."""

    source: Path
    files: tuple[OutputFile, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    quantized: tuple[Accuracy, ...] = ()
    verified: Mapping[Path, Comparison | None] = field(default_factory=dict)


def load(path: AnyPath, **options: Any) -> Model:
    """Opens a model file as a mapping of names to tensors, whose data are read on demand. `options` are the reader's
    own. Raises nibblecast.Error with one line that says what is wrong with the file."""
    return pipeline.read(input_path(path), options)


def save(
    model: Model, path: AnyPath, *, to: str | None = None, quantize: str | Scheme | None = None, **options: Any
) -> Conversion:
    """Writes a model to one file. The extension, or the format's name in `to`, selects the writer. `quantize` is as in
    `convert`."""
    return convert_model(model, [output_path(path)], to=to, quantize=as_scheme(quantize), options=options)


def convert(
    source: AnyPath,
    *targets: AnyPath,
    to: str | Sequence[str] | None = None,
    dequantize: DTypeLike | None = None,
    quantize: str | Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    verify: bool = False,
    fail_on_loss: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Converts a file to one or several targets in one read.

    `to` names one format for all targets or one for each; without it the extensions select. `dequantize` (float32,
    float16 or bfloat16) turns codes into plain floats. `quantize` (e.g. "int4,block=32") turns float weights into
    codes. `only` and `skip` are shell patterns of tensor names. `verify` re-reads what was written and compares every
    value, if the format can be read. `fail_on_loss` refuses a conversion that has losses (exact changes of form are
    notes). `dry_run` plans only. `resume` keeps the shards of a folder that an interrupted run has completed. Other
    keyword arguments are the reader's and the writers' own options. Raises nibblecast.Error.
    """
    read_with, write_with = reader_and_writer_options(options, input_path(source))
    return convert_model(
        load(source, **read_with),
        [output_path(target) for target in targets],
        to=to,
        dequantize=None if dequantize is None else np.dtype(dequantize),
        quantize=as_scheme(quantize),
        only=only,
        skip=skip,
        verify=verify,
        fail_on_loss=fail_on_loss,
        dry_run=dry_run,
        resume=resume,
        progress=progress,
        options=write_with,
    )


def verify(a: AnyPath | Model, b: AnyPath | Model, *, progress: Progress | None = None, **options: Any) -> Comparison:
    """Compares two models or files: code for code if both are quantized, else value for value. `options` are the
    readers' own; each applies to the files whose format has it."""
    read_with = reader_options(options, [input_path(path) for path in (a, b) if not isinstance(path, Model)])
    first, second = (model if isinstance(model, Model) else load(model, **read_with[Path(model)]) for model in (a, b))
    return compare(first, second, progress)


def write_shard(
    source: AnyPath,
    *targets: AnyPath,
    number: int,
    to: Sequence[str],
    dequantize: DTypeLike | None = None,
    quantize: str | Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    fail_on_loss: bool = False,
    **options: Any,
) -> int:
    """One part of a conversion that several processes share: begins the folders among the targets (`number` 0), or
    writes one of their shards (from 1) to a folder that was begun. `convert` with `resume` then writes what is missing
    and puts the folders in place. Returns the number of shards. Raises nibblecast.Error."""
    read_with, write_with = reader_and_writer_options(options, input_path(source))
    planned = _planned(
        load(source, **read_with),
        [output_path(target) for target in targets],
        to=to,
        dequantize=None if dequantize is None else np.dtype(dequantize),
        quantize=as_scheme(quantize),
        only=only,
        skip=skip,
        options=write_with,
    )
    if fail_on_loss:
        pipeline.refuse_losses(planned)
    return pipeline.run_part(planned, number)


def convert_model(
    model: Model,
    targets: Sequence[Path],
    *,
    to: str | Sequence[str] | None = None,
    dequantize: np.dtype[Any] | None = None,
    quantize: Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    verify: bool = False,
    fail_on_loss: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    options: Mapping[str, Any],
) -> Conversion:
    """Converts an open model; the arguments are as in `convert`, and `options` are the writers' own."""
    planned = _planned(
        model, targets, to=to, dequantize=dequantize, quantize=quantize, only=only, skip=skip, options=options
    )
    if fail_on_loss:
        pipeline.refuse_losses(planned)
    losses = tuple(dict.fromkeys(loss for output in planned for loss in output.losses))
    files = tuple(dict.fromkeys(pipeline.output_files(planned)))
    notes = tuple(dict.fromkeys(note for output in planned for note in output.notes))
    report = tuple(line for output in planned for line in output.plan.report)
    conversion = Conversion(model.metadata.source or Path(), files, losses, notes, report)
    if dry_run:
        return conversion
    verified: dict[Path, Comparison | None] = {}
    hints: list[str] = []

    def check(output: pipeline.PlannedOutput, main: Path) -> None:
        verified[output.target.path] = _verified(output, main)
        hints.extend(_hints(output, main))

    pipeline.run(planned, progress, resume=resume, check=check if verify else None)
    written = tuple(replace(file, nbytes=file.path.stat().st_size) for file in conversion.files)
    conversion = replace(conversion, files=written, verified=verified, notes=(*hints, *conversion.notes))
    if quantize is None:
        return conversion
    from nibblecast.converters.stages.quantize import accuracy

    return replace(conversion, quantized=accuracy(planned[0].model))


def _planned(
    model: Model,
    targets: Sequence[Path],
    *,
    to: str | Sequence[str] | None,
    dequantize: np.dtype[Any] | None,
    quantize: Scheme | None,
    only: Sequence[str],
    skip: Sequence[str],
    options: Mapping[str, Any],
) -> list[pipeline.PlannedOutput]:
    if not targets:
        raise UsageError("no target given: name at least one file to write")
    names = [to] * len(targets) if to is None or isinstance(to, str) else to
    if len(names) != len(targets):
        raise UsageError(f"{len(targets)} targets, but {len(names)} formats: give one format per target")
    formats = [
        plugins.format_named(name) if name else plugins.format_of_target(path)
        for path, name in zip(targets, names, strict=True)
    ]
    assigned = writer_options(options, formats)
    return pipeline.plan(
        model,
        [pipeline.Target(*each) for each in zip(targets, formats, assigned, strict=True)],
        dequantize=dequantize,
        quantize=quantize,
        only=only,
        skip=skip,
    )


def as_scheme(quantize: str | Scheme | None) -> Scheme | None:
    """The scheme that a text describes. Raises UsageError for any other text."""
    if not isinstance(quantize, str):
        return quantize
    from nibblecast.converters.stages.scheme import parse_scheme

    return parse_scheme(quantize)


def _verified(output: pipeline.PlannedOutput, main: Path) -> Comparison | None:
    """Compares what was written with what was planned, before it is put in place; `main` is the file or folder to read.
    None if the format has no reader. Raises VerificationFailed."""
    format, path = output.target.format, output.target.path
    if not format.reader:
        return None
    with pipeline.readable(path):
        expected, written = output.expected, plugins.reader(format).read(main)
    if expected is not output.model:  # changing a graph may add tensors that the model does not have
        written = replace(written, tensors={name: t for name, t in written.items() if name in expected})
    comparison = compare(expected, written)
    if not comparison.equal:
        more = f" (and {len(comparison.differences) - 1} more)" if len(comparison.differences) > 1 else ""
        raise VerificationFailed(
            f"is not written, because reading it back gave something else: {comparison.differences[0]}{more}", path=path
        )
    return comparison


def _hints(output: pipeline.PlannedOutput, main: Path) -> Sequence[str]:
    """The hints of the format's own checker. Raises VerificationFailed."""
    with located(path=output.target.path):
        return output.plan.validate(main)
