"""What a format plugin implements: a `Reader`, a `Writer`, or both. Plugins share nothing but the types here.

A reader turns a path into a Model and reads headers only. A writer works in two passes. `plan` looks at names, shapes
and dtypes, and returns the shards: each output file with its exact size and its tensors. Then the pipeline asks each
shard to write itself. Files are temporary until the pipeline puts them in place, all or none.

Why plan first. Writing a large model takes minutes. Exact sizes show before that what will be lost, what is impossible,
and what a dry run should list. They also fix all offsets, so that a header can be written before its data, and they
tell which shards of an interrupted run are complete.

Why pull. A file has its own order: safetensors has wide elements first, C has its declarations before the data. A
pipeline that pushes tensors in the model's order makes such a writer seek, or hold what comes too early. A shard that
fetches its tensors itself writes front to back, through whichever stream there is, and releases each tensor when it
has written it.

Why one protocol. A file is a folder of one shard. Resuming, running on several machines, progress, verification and
putting in place are the same for both, so no code needs to ask which one it has.

Why readers of our own, not the official libraries. Those load whole models (onnx, torch), execute code from the file
(pickle), or are large to install. A file's author may be hostile: our readers check every length, execute nothing, and
name the tensor that is wrong. The official libraries serve in the tests, as the reference that results must equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Loss, Model, Tensor

#: Called with the bytes of payload that are done, and their total.
Progress = Callable[[int, int], None]


def option(default: Any, help: str) -> Any:
    """A field of a writer's options dataclass: its default, and the line that `nibblecast formats NAME` shows.
    Types understood on the command line: bool, int, str, Size and Literal[...] of strings."""
    return field(default=default, metadata={"help": help})


class Size(int):
    """A number of bytes; on the command line also 256K, 1.5M, 2G (powers of 1024)."""


@dataclass(frozen=True, slots=True)
class NoOptions:
    """For writers without any."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a format can hold unchanged; the planner compares this with the model before any payload is read.
    `compute_dtype`: whether readers of the file round to the quantization's `compute_dtype` and `value_dtype` where
    these are not float32.
    `factor`: whether they multiply by the quantization's `factor` at the end."""

    dtypes: frozenset[np.dtype[Any]]
    codebook: bool = True
    offset: bool = True
    group_index: bool = True
    nested_scale: bool = True
    compute_dtype: bool = True
    factor: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that will be written: its path and its exact size (None where only writing tells). A `shared` file is the
    same for every model, so several outputs in one folder may all write it. `folder` is the output folder that it
    belongs to, if the output is a folder."""

    path: Path
    nbytes: int | None
    shared: bool = False
    folder: Path | None = None


class Reader(Protocol):
    """Reads one format. Constructed without arguments.

    A reader may take options, for facts that files may not state. It then has a class attribute `options`, a frozen
    dataclass of `option` fields that all have defaults, and its `read` takes an instance of it as second argument.
    """

    def read(self, path: Path) -> Model:
        """The model in `path`, headers only. Raises nibblecast.Error for anything wrong with the file."""
        ...


@dataclass(frozen=True, slots=True)
class RunPort:
    """An input or output of a model that can be run; `scale` is the scale of its codes if it is quantized. Sizes that
    the model leaves open are 1."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scale: float | None = None


class Runner(Protocol):
    """Runs one model in its format's own runtime. Constructed with the model's path."""

    @property
    def inputs(self) -> Sequence[RunPort]: ...

    @property
    def outputs(self) -> Sequence[RunPort]: ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """The outputs by name, for inputs by name. Raises Unsupported when the runtime refuses."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shard(ABC):
    """A file that will be written: its path, its size, and the `tensors` that its payload is made of. The pipeline uses
    them for progress and to find what several outputs have in common."""

    file: OutputFile
    tensors: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        """The bytes of payload that `write` reports in total."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """What else identifies the content beside the source, the options and the file's size, e.g. a hash of the
        header. A resumed run keeps a shard only if this is unchanged."""
        return ""

    @abstractmethod
    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the whole file to `stream`, front to back: the stream cannot seek. Payloads are taken in pieces, so
        that memory stays bounded (`nibblecast.converters.output.streaming`, `Tensor.parts`). It releases what it has
        written, and calls `wrote` with the bytes of payload of each step."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A small file beside the shards: its content, or the file that it is a copy of."""

    file: OutputFile
    content: bytes | Path


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a writer will do with a model, known from headers alone. `shards` are in the order of writing; the first is
    the file that the user named. `companions` are written after them.

    With a `folder` all files lie in it. The folder appears complete or not at all, and an interrupted run leaves its
    complete shards for a run that resumes it. `losses` are what the format does not keep. `notes` are hints and
    warnings, a sentence each, that report no loss. `report` are lines to show at the end, e.g. sizes. `expected` is the
    model that reading the files gives, if it differs from the writer's model: tensors transposed, or under other names.
    Its `losses` are the losses of reading and of the stages that still apply.
    """

    shards: Sequence[Shard]
    losses: Sequence[Loss] = ()
    notes: Sequence[str] = ()
    report: Sequence[str] = ()
    companions: Sequence[Companion] = ()
    folder: Path | None = None
    expected: Model | None = None

    @property
    def files(self) -> Sequence[OutputFile]:
        """All files, the one that the user named first."""
        return (*(shard.file for shard in self.shards), *(companion.file for companion in self.companions))

    def validate(self, main: Path) -> Sequence[str]:
        """Runs the format's own checker, if there is one, on the written files before they are put in place
        (`--verify`). `main` is the first of them. Returns hints, a sentence each. Raises VerificationFailed."""
        return ()


class Writer(Protocol):
    """Writes one format. Constructed without arguments."""

    options: ClassVar[type]
    """A frozen dataclass of the writer's own options, made of `option` fields that all have defaults."""

    capabilities: ClassVar[Capabilities]

    def plan(self, model: Model, target: Path, options: Any) -> Plan:
        """What will be written for `model` to `target`; reads no payload. `options` is an instance of `options`.
        Raises Unsupported or RefusedLoss, naming the tensor and what to add to the command."""
        ...
