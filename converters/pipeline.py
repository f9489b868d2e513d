"""The pipeline: one reader, stages, and one or several writers that share one read. First it plans, then it runs.

    model = select(read(path)) -> dequantize or quantize -> [fit to what each writer can hold -> plan] -> write

A stage is Model -> Model and lazy. Planning reads headers, not weights. It decides what each writer will write, how
large the files will be, and what will not be kept or will change. Running asks the shards of each output in turn to
write themselves; `converters.output.sharing` says what the outputs share.

Why planning is apart from running. Refusals, losses and a dry run need no weights, so they are fast for models of any
size, and nothing is written before all targets are known to be possible. The workers of a batch also rely on it:
each makes the same plan from the same headers, so they share a folder's shards without talking to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nibblecast.converters import plugins
from nibblecast.converters.arithmetic import compiled
from nibblecast.converters.arithmetic.dtypes import dtype_name
from nibblecast.converters.errors import CorruptFile, Error, RefusedLoss, Unsupported, UsageError
from nibblecast.converters.interfaces import Capabilities, OutputFile, Plan, Progress
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.options import parse
from nibblecast.converters.output.creation import refuse_special
from nibblecast.converters.output.folders import begin_folder, begun_folder, intent
from nibblecast.converters.output.private_folder import remove_left_behind, temporary_folders
from nibblecast.converters.output.sharing import shared, sharing
from nibblecast.converters.output.writing import staging, write_plan, write_shard
from nibblecast.converters.stages.dequantize import compute_in_float32, dequantize_model, flatten_scales, fold_factors
from nibblecast.converters.storage import MappedFile, truncated_file

if TYPE_CHECKING:  # quantization is imported when it is asked for
    from nibblecast.converters.stages.scheme import Scheme

#: Called with each output and the path of its main file (or folder), when all are complete but not yet in place.
Check = Callable[["PlannedOutput", Path], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A file to write: its format, its path, and the writer's own options as the user gave them (text or typed)."""

    path: Path
    format: plugins.Format
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedOutput:
    """One target with the model that its writer gets; `request` is what the user asked for."""

    target: Target
    model: Model
    plan: Plan
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> Model:
        """What reading the files will give."""
        return self.model if self.plan.expected is None else self.plan.expected

    @property
    def losses(self) -> tuple[Loss, ...]:
        """What will not be kept or will change for this target, including reading and stages; each loss once."""
        return tuple(loss for loss in self._records if not loss.is_exact)

    @property
    def notes(self) -> tuple[str, ...]:
        """The writer's notes, and the exact changes of form for this target."""
        return (*self.plan.notes, *(loss.text for loss in self._records if loss.is_exact))

    @property
    def _records(self) -> Iterator[Loss]:
        yield from dict.fromkeys((*self.expected.losses, *self.plan.losses))


@np.errstate(all="ignore")  # numbers out of files may be anything
def read(path: Path, options: Mapping[str, Any] | None = None) -> Model:
    """The model in a file, headers only. The format is detected by content, then by extension. `options` are the
    reader's own. Raises Error, and CorruptFile also where the system refuses to read."""
    with readable(path):
        return plugins.read(plugins.detect(path), path, options or {})


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A block that reads the file at `path`: its errors name the file, and errors of the system become CorruptFile (a
    name that is too long, a folder without permission)."""
    try:
        yield
    except Error as error:
        error.path = error.path or path
        raise
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str) else path
        raise CorruptFile(f"cannot be read: {error.strerror or error}", path=where) from error


def select(model: Model, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Model:
    """The tensors whose names match a pattern of `only` (all, if it is empty) and none of `skip` (shell patterns).
    Parameters that are tensors of their own stay with their owner. Raises UsageError when nothing is left."""
    if not only and not skip:
        return model

    def chosen(name: str) -> bool:
        return (not only or any(fnmatchcase(name, p) for p in only)) and not any(fnmatchcase(name, p) for p in skip)

    tensors = {
        name: tensor
        for name, tensor in model.items()
        if chosen(owner if (owner := tensor.parameter_of) is not None and owner in model.tensors else name)
    }
    if not tensors and model.tensors:
        raise UsageError(
            f"no tensor matches --only {list(only)} --skip {list(skip)}: `nibblecast inspect` lists their names",
            path=model.metadata.source,
        )
    losses = tuple(loss for loss in model.losses if not loss.tensor or chosen(loss.tensor))
    return replace(model, tensors=tensors, losses=losses)


@np.errstate(all="ignore")  # numbers out of files may be anything
def plan(
    model: Model,
    targets: Sequence[Target],
    *,
    dequantize: np.dtype[Any] | None = None,
    quantize: Scheme | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> list[PlannedOutput]:
    """What each target will get; this reads no payload. Raises UsageError, Unsupported or RefusedLoss when a target is
    impossible: an output that is an input, two outputs on one path, or something that a writer cannot hold."""
    if dequantize is not None and quantize is not None:
        raise UsageError(
            f"use either dequantize or quantize: '{quantize},requantize' quantizes what is quantized already"
        )
    model = chosen = select(model, only, skip)
    if not model.tensors:
        nothing = Loss("", "dropped", "it has no constant weights, so the output holds no tensors")
        model = replace(model, losses=(*model.losses, nothing))
    if dequantize is not None:
        model = dequantize_model(model, dequantize)
    if quantize is not None:
        from nibblecast.converters.stages.quantize import quantize_model

        model = quantize_model(model, quantize)
    if len(targets) > 1:
        model = shared(model, chosen)
    request = {"dequantize": dequantize, "quantize": quantize, "only": list(only), "skip": list(skip)}
    planned = []
    for target in targets:
        writer = plugins.writer(target.format)
        options = parse(writer.options, target.options, target.format.name)
        fitted = fit(model, writer.capabilities, target)
        try:
            made = writer.plan(fitted, target.path, options)
            planned.append(PlannedOutput(target, fitted, made, request | {"options": options}))
        except Error as error:
            error.path = error.path or target.path
            raise
        except OSError as error:
            about = "" if error.filename in (None, str(target.path)) else f" ({error.filename})"
            raise UsageError(f"cannot be written: {error.strerror or error}{about}", path=target.path) from error
    _refuse_clashes(model, planned)
    return planned


def fit(model: Model, capabilities: Capabilities, target: Target) -> Model:
    """The model in a form that the writer can hold. Stages that change values record a Loss. Raises Unsupported, with
    what to add to the command, where the user must choose first, e.g. `--dequantize`."""
    if not capabilities.factor:
        model = fold_factors(model)
    if not capabilities.nested_scale:
        model = flatten_scales(model)
    if not capabilities.compute_dtype:
        model = compute_in_float32(model)
    for tensor in model.values():
        missing = _missing(tensor, capabilities)
        if missing:
            raise Unsupported(
                f"format '{target.format.name}' cannot hold {missing[0]}: {missing[1]}",
                path=target.path,
                tensor=tensor.name,
            )
    return model


@np.errstate(all="ignore")  # numbers out of files may be anything
def run(
    planned: Sequence[PlannedOutput],
    progress: Progress | None = None,
    *,
    resume: bool = False,
    check: Check | None = None,
) -> None:
    """Writes every planned output, all or none of its files. Small computed tensors are computed once for all outputs.
    With `resume`, a folder keeps the shards that an interrupted run has completed. `check` may raise an exception to
    refuse what was written; then nothing is put in place. Raises UsageError when the system refuses (e.g. a full disk),
    and ChangedFile if an input was written to meanwhile."""
    try:
        for output in planned:
            # a batch always resumes, and has cleaned its target before: scanning a huge folder per model is slow
            if not resume or output.plan.folder is not None:
                remove_left_behind(temporary_folders(output.target.path.parent, output.target.path.name))
        _run(planned, progress, resume, check)
    except OSError as error:
        refuse_truncated()
        paths = ", ".join(str(output.target.path) for output in planned)
        folders = any(output.plan.folder is not None for output in planned)
        again = "; complete shards are kept: continue with --resume" if folders else ""
        raise UsageError(f"cannot write {paths}: {error.strerror or error}{again}") from error


def refuse_truncated() -> None:
    """Raises ChangedFile if an input was truncated. Writing from its lost pages also fails in the system, but the
    system's reason ("Bad address") does not tell the cause."""
    file = truncated_file()
    if file is not None:
        file.check_unchanged()


def _run(planned: Sequence[PlannedOutput], progress: Progress | None, resume: bool, check: Check | None) -> None:
    total = sum(shard.nbytes for output in planned for shard in output.plan.shards)
    compiled.expect(total)
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        stack.enter_context(sharing([output.plan for output in planned]))
        staged = [
            stack.enter_context(staging(output.plan, partial(_intended, output), resume=resume)) for output in planned
        ]
        for output, files in zip(planned, staged, strict=True):
            write_plan(output.plan, files, wrote)
        for output, files in zip(planned, staged, strict=True):
            for file in _mapped_files(output.model):
                file.check_unchanged()
            if check is not None:
                check(output, files.main)


@np.errstate(all="ignore")  # numbers out of files may be anything
def run_part(planned: Sequence[PlannedOutput], number: int) -> int:
    """Begins the folders among the outputs (`number` 0), or writes one of their shards (from 1) to a folder that was
    begun. `run` with `resume` completes them. Returns the number of shards. Raises UsageError as in `run`."""
    folders = [(output.plan.folder, output) for output in planned if output.plan.folder is not None]
    shards = [(folder, output, shard) for folder, output in folders for shard in output.plan.shards]
    try:
        if number == 0:
            for folder, output in folders:
                folder.parent.mkdir(parents=True, exist_ok=True)
                begin_folder(folder, output.plan, _intended(output))
        else:
            folder, output, shard = shards[number - 1]
            compiled.expect(shard.nbytes)
            with begun_folder(folder, output.plan, _intended(output)) as staged:
                write_shard(shard, staged, lambda _: None)
    except OSError as error:
        refuse_truncated()
        paths = ", ".join(str(folder) for folder, _ in folders)
        raise UsageError(f"cannot write {paths}: {error.strerror or error}") from error
    return len(shards)


def _intended(output: PlannedOutput) -> str:
    return intent(output.plan, {**output.request, "sources": _sources(output.model)})


def _sources(model: Model) -> list[list[Any]]:
    """The files that the model is read from, with size and time of modification, which show changes."""
    found = []
    for file in _mapped_files(model):
        status = file.path.stat()
        found.append([str(file.path.absolute()), status.st_size, status.st_mtime_ns])
    return found


def output_files(planned: Sequence[PlannedOutput]) -> Iterator[OutputFile]:
    """All files that the plan writes."""
    for output in planned:
        yield from output.plan.files


def refuse_losses(planned: Sequence[PlannedOutput]) -> None:
    """Raises RefusedLoss if anything would not be kept or would change (`--fail-on-loss`)."""
    for output in planned:
        if output.losses:
            more = f" (and {len(output.losses) - 1} more)" if len(output.losses) > 1 else ""
            raise RefusedLoss(
                f"refused by --fail-on-loss: {output.losses[0]}{more}; without the option this is only reported",
                path=output.target.path,
            )


def _missing(tensor: Tensor, capabilities: Capabilities) -> tuple[str, str] | None:
    """The first property of `tensor` that a writer cannot hold, and what the user can do."""
    quantization = tensor.quantization
    if tensor.dtype not in capabilities.dtypes:
        leave_out = "leave the tensor out with --skip"
        if quantization is not None:
            return f"{dtype_name(tensor.dtype)} codes", f"add --dequantize float32, or {leave_out}"
        return f"{dtype_name(tensor.dtype)} values", leave_out
    if quantization is None:
        return None
    for what, part, held in (
        ("a codebook", quantization.codebook, capabilities.codebook),
        ("an offset", quantization.offset, capabilities.offset),
        ("a group index", quantization.group_index, capabilities.group_index),
    ):
        if part is not None and not held:
            return f"{what} of quantization", "add --dequantize float32"
    return None


def refuse_input(model: Model, target: Path) -> None:
    """Raises UsageError if `target` is one of the files that the model is read from."""
    if _identity(target) in _inputs(model):
        raise UsageError("is both the input and the output: give the output another name", path=target)


def _inputs(model: Model) -> set[tuple[int, int] | Path]:
    inputs = {_identity(file.path) for file in _mapped_files(model)}
    return inputs if model.metadata.source is None else inputs | {_identity(model.metadata.source)}


def _refuse_clashes(model: Model, planned: Sequence[PlannedOutput]) -> None:
    inputs = _inputs(model)
    seen: dict[tuple[int, int] | Path, OutputFile] = {}
    for output in planned:
        folder = output.plan.folder
        if folder is not None and _identity(folder) in inputs:
            raise UsageError("is both the input and the output: name another folder", path=folder)
    for file in output_files(planned):
        if file.folder is None:
            refuse_special(file.path)
        identity = _identity(file.path)
        if identity in inputs:
            raise UsageError("is both the input and an output: give the output another name", path=file.path)
        if identity in seen and not (file.shared and seen[identity].shared):
            raise UsageError("would be written twice: give each output its own name", path=file.path)
        seen[identity] = file


def _identity(path: Path) -> tuple[int, int] | Path:
    """Device and inode, which are the same under all names of a file; the absolute path if it does not exist yet."""
    try:
        status = path.stat()
    except OSError:
        return path.absolute()
    return status.st_dev, status.st_ino


def _mapped_files(model: Model) -> Iterator[MappedFile]:
    """The files that hold the tensors' data (external data lies beside the source)."""
    seen: set[int] = set()
    for file in chain.from_iterable(data.files() for tensor in model.values() for data in tensor.stored()):
        if id(file) not in seen:
            seen.add(id(file))
            yield file
