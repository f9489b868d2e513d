"""What `import nibblecast` offers: load, save, convert, verify, batch, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nibblecast.converters import pipeline, plugins
from nibblecast.converters.compare import running
from nibblecast.converters.compare.comparison import Comparison, compare
from nibblecast.converters.compare.running import OutputDifference
from nibblecast.converters.errors import UsageError, VerificationFailed
from nibblecast.converters.input.paths import input_path, output_path
from nibblecast.converters.interfaces import OutputFile, Progress, Validating
from nibblecast.converters.ir import Loss, Model
from nibblecast.converters.options import describe
from nibblecast.converters.storage import open_regular

if TYPE_CHECKING:  # quantization, batches and reports are imported when they are asked for
    from nibblecast.converters.arithmetic.accuracy import Accuracy
    from nibblecast.converters.batches.run import BatchResult, OnResult, OnRunning, Settings
    from nibblecast.converters.reports.run import Report
    from nibblecast.converters.stages.scheme import Scheme

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did, or would do: the files with their sizes (None: known once written), what was lost, the
    writers' notes (hints and warnings, a sentence each) and reports (lines of text), with `quantize` how well codes
    stand for the floats, tensor by tensor, and with `verify`, for each target, the comparison with what was re-read
    from it (None: the format has no reader)."""

    source: Path
    files: tuple[OutputFile, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    quantized: tuple[Accuracy, ...] = ()
    verified: Mapping[Path, Comparison | None] = field(default_factory=dict)


def load(path: AnyPath, **options: Any) -> Model:
    """Opens a model file: a mapping of names to tensors, whose data are read when they are asked for. `options` are the
    reader's own. Raises nibblecast.Error with one line that says what is wrong with the file."""
    return pipeline.read(input_path(path), options)


def save(
    model: Model, path: AnyPath, *, to: str | None = None, quantize: str | Scheme | None = None, **options: Any
) -> Conversion:
    """Writes a model to one file; the extension, or the format's name in `to`, picks the writer. `quantize` is as for
    `convert`."""
    return _convert(model, [output_path(path)], to=to, quantize=_scheme(quantize), options=options)


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

    `to` names the format when the extensions do not tell, or each target's; `dequantize` (float32, float16 or
    bfloat16) turns codes into plain floats; `quantize` ("int4,block=32", say) turns float weights into codes; `only`
    and `skip` are shell patterns of tensor names; `verify` re-opens what was written and compares every value, where
    its format can be read; `fail_on_loss` refuses what would lose anything; `dry_run` plans only; `resume` keeps what
    an interrupted run has completed of a folder; other keyword arguments are the reader's and the writers' own options.
    Raises nibblecast.Error.
    """
    read_with, write_with = _divided(options, input_path(source))
    return _convert(
        load(source, **read_with),
        [output_path(target) for target in targets],
        to=to,
        dequantize=None if dequantize is None else np.dtype(dequantize),
        quantize=_scheme(quantize),
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
    """Compares two models or files, code for code where both are quantized, value for value otherwise. `options` are
    the readers' own, each for the files whose format has it."""
    read_with = _reader_options(options, [input_path(path) for path in (a, b) if not isinstance(path, Model)])
    first, second = (model if isinstance(model, Model) else load(model, **read_with[Path(model)]) for model in (a, b))
    return compare(first, second, progress)


def batch(
    source: AnyPath,
    target: AnyPath,
    to: str | Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dequantize: DTypeLike | None = None,
    quantize: str | Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    verify: bool = False,
    fail_on_loss: bool = False,
    settings: Settings | None = None,
    on_result: OnResult | None = None,
    on_running: OnRunning | None = None,
    **options: Any,
) -> BatchResult:
    """Converts every model in a folder and below it, or those that a file lists ("-": standard input), to folder
    `target`, each on its own in a process of its own: what fails is a record, and the others go on. Both may be URLs.

    `to` are names of formats; `include` and `exclude` shell patterns of the sources' paths; `settings` says how many at
    a time, with which limits, whether to resume, and so on; `on_result` is told of each record with how many there are
    of how many, `on_running` of the names of those that are worked on; the other arguments are `convert`'s. The report
    is `nibblecast-report.jsonl` in the target. Raises nibblecast.Error for what concerns the batch as a whole, before
    anything is written.
    """
    from nibblecast.converters.batches.jobs import Request
    from nibblecast.converters.batches.remote import is_remote
    from nibblecast.converters.batches.run import Settings, run_batch

    request = Request(
        dequantize=None if dequantize is None else np.dtype(dequantize).name,
        quantize=None if quantize is None else str(_scheme(quantize)),
        only=tuple(only),
        skip=tuple(skip),
        verify=verify,
        fail_on_loss=fail_on_loss,
        options=options,
    )
    formats = [to] if isinstance(to, str) else list(to)
    if not is_remote(os.fspath(source)) and source != "-":
        _check_readable(input_path(source))
    if not is_remote(os.fspath(target)):
        output_path(target)
    try:
        return run_batch(
            source,
            target,
            formats,
            request,
            settings or Settings(),
            include=include,
            exclude=exclude,
            on_result=on_result,
            on_running=on_running,
        )
    except OSError as error:  # the report cannot be written, say
        raise UsageError(f"{error.filename or os.fspath(target)}: {error.strerror or error}") from error


def _check_readable(path: Path) -> None:
    """Raises CorruptFile for a folder or a list that is there and cannot be read."""
    with pipeline.readable(path), suppress(FileNotFoundError):
        if path.stat() and path.is_dir():
            next(path.iterdir(), None)
        elif path.is_file():
            open_regular(path).close()


def report(
    source: AnyPath,
    target: AnyPath | None = None,
    *,
    reference: AnyPath | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    title: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Measures a model, or sums up a batch (its target folder or its report), and writes a page about it to `target`,
    an HTML file, if there is one; `document()` of the result gives the numbers.

    `reference` is a model with the floats that the codes stand for, by the same names; `only` and `skip` are shell
    patterns of tensor names; `options` are the readers' own. Raises nibblecast.Error: MissingDependency where the page
    needs `pip install 'nibblecast[report]'`.
    """
    from nibblecast.converters.reports.run import make_report

    paths = [input_path(path) for path in (source, reference) if path is not None]
    return make_report(
        paths[0],
        None if target is None else output_path(target),
        reference=None if reference is None else paths[1],
        only=only,
        skip=skip,
        title=title,
        options=_reader_options(options, paths) if options else {},
        progress=progress,
    )


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
    """A part of a conversion, for several processes to share in: begins the folders among the targets (`number` 0), or
    writes one of their shards, from 1, to a folder that has been begun. `convert` with `resume` then writes what is
    missing and puts the folders in their places. Returns how many shards there are; raises nibblecast.Error."""
    read_with, write_with = _divided(options, input_path(source))
    planned = _planned(
        load(source, **read_with),
        [output_path(target) for target in targets],
        to=to,
        dequantize=None if dequantize is None else np.dtype(dequantize),
        quantize=_scheme(quantize),
        only=only,
        skip=skip,
        options=write_with,
    )
    if fail_on_loss:
        pipeline.refuse_losses(planned)
    return pipeline.run_part(planned, number)


def compare_outputs(
    a: AnyPath, b: AnyPath, *, inputs: AnyPath | Mapping[str, NDArray[Any]] | None = None, seed: int = 0
) -> list[OutputDifference]:
    """Runs two models, TFLite ones by LiteRT and ONNX ones by onnxruntime, on the same inputs and compares their
    outputs. `inputs` are arrays by the first model's names, or an .npz file of such; random where there are none.
    Raises nibblecast.Error, which names the package to install where a runtime is missing."""
    if inputs is None or isinstance(inputs, Mapping):
        return running.compare_outputs(input_path(a), input_path(b), inputs, seed)
    return running.compare_outputs(input_path(a), input_path(b), running.read_inputs(input_path(inputs)), seed)


def _convert(
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
    planned = _planned(
        model, targets, to=to, dequantize=dequantize, quantize=quantize, only=only, skip=skip, options=options
    )
    if fail_on_loss:
        pipeline.refuse_losses(planned)
    losses = tuple(dict.fromkeys(loss for output in planned for loss in output.losses))
    files = tuple(dict.fromkeys(pipeline.output_files(planned)))
    notes = tuple(dict.fromkeys(note for output in planned for note in output.plan.notes))
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
    conversion = replace(conversion, files=written, verified=verified, notes=(*conversion.notes, *hints))
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
        raise UsageError("there is no target: name at least one file to write")
    names = [to] * len(targets) if to is None or isinstance(to, str) else to
    if len(names) != len(targets):
        raise UsageError(f"there are {len(targets)} targets, but {len(names)} formats: one for each is needed")
    formats = [
        plugins.format_named(name) if name else plugins.format_of_target(path)
        for path, name in zip(targets, names, strict=True)
    ]
    assigned = _assigned(options, formats)
    return pipeline.plan(
        model,
        [pipeline.Target(*each) for each in zip(targets, formats, assigned, strict=True)],
        dequantize=dequantize,
        quantize=quantize,
        only=only,
        skip=skip,
    )


def _scheme(quantize: str | Scheme | None) -> Scheme | None:
    if not isinstance(quantize, str):
        return quantize
    from nibblecast.converters.stages.scheme import parse_scheme

    return parse_scheme(quantize)


def _divided(options: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the source's reader, and those of writers."""
    if not options:
        return {}, {}
    with pipeline.readable(source):
        format = plugins.detect(source)
    known = {help.name for help in plugins.reader_options(format)}
    names = {key: key.removeprefix(f"{format.name}.") for key in options}
    read_with = {name: options[key] for key, name in names.items() if name.replace("_", "-") in known}
    return read_with, {key: options[key] for key, name in names.items() if name not in read_with}


def _reader_options(options: Mapping[str, Any], paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The options of the reader of each file. Raises UsageError for one that none of them has."""
    read_with = {path: _divided(options, path)[0] for path in paths}
    if unknown := [key for key in options if not any(key.rpartition(".")[2] in own for own in read_with.values())]:
        raise UsageError(f"reading these files takes no option '{unknown[0]}'")
    return read_with


def _assigned(options: Mapping[str, Any], formats: Sequence[plugins.Format]) -> list[dict[str, Any]]:
    """The options of each target: those that its writer has, or those given as `format.option`. Raises UsageError for
    one that no target's writer has."""
    known = {f.name: {help.name for help in describe(plugins.writer(f).options)} for f in formats}
    assigned: list[dict[str, Any]] = [{} for _ in formats]
    for key, value in options.items():
        prefix, _, rest = key.partition(".")
        wanted, name = ({prefix}, rest) if rest and prefix in known else (set(known), key)
        takers = [f for f in wanted if name.replace("_", "-") in known[f]]
        if not takers:
            have = "; ".join(f"{f} has {', '.join(sorted(names)) or 'none'}" for f, names in known.items())
            raise UsageError(f"no target has an option '{key}': {have}")
        for format, own in zip(formats, assigned, strict=True):
            if format.name in takers:
                own[name] = value
    return assigned


def _verified(output: pipeline.PlannedOutput, main: Path) -> Comparison | None:
    """Compares what was written, which is not yet in its place, with what was to be; `main` is the file or folder to
    read. None where its format has no reader. Raises VerificationFailed."""
    format, path = output.target.format, output.target.path
    if not format.reader:
        return None
    with pipeline.readable(path):
        expected, written = output.expected, plugins.reader(format).read(main)
    if expected is not output.model:  # a graph that is changed may get tensors that the model has not
        written = replace(written, tensors={name: t for name, t in written.items() if name in expected})
    comparison = compare(expected, written)
    if not comparison.equal:
        more = f" (and {len(comparison.differences) - 1} more)" if len(comparison.differences) > 1 else ""
        raise VerificationFailed(
            f"is not written, for it would not hold what was to be: {comparison.differences[0]}{more}", path=path
        )
    return comparison


def _hints(output: pipeline.PlannedOutput, main: Path) -> Sequence[str]:
    """What the format's own checker says of it. Raises VerificationFailed."""
    if not isinstance(output.plan, Validating):
        return ()
    try:
        return output.plan.validate(main)
    except VerificationFailed as error:
        error.path = output.target.path
        raise
