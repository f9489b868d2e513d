"""What a format plugin implements: a `Reader`, a `Writer`, or both. The types here are all that they share.

A reader turns a path into a Model and reads headers only. A writer works in two passes. `plan` looks at names, shapes
and dtypes, and gives the shards: the files that there will be, how large each is, which tensors it takes. Then the
pipeline asks each shard to write itself. Files are temporary until the pipeline puts them in their place, all or none.

Why pull. A file has its own order: safetensors has wide elements first, C has its declarations before the data. A
pipeline that pushes tensors in the model's order makes such a writer seek, or hold what comes too early. A shard that
fetches its tensors itself writes front to back, through whichever stream there is, and lets go of each tensor when it
has written it.

Why one protocol. A file is a folder of one shard: resuming, running on several machines, progress, verification and
putting in place are the same for both, and no code asks which of them it has.
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

#: Told how many bytes of payload are done, and how many there are.
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
    """What a writer can hold as it is; the planner compares this with the model before any payload is read.
    `compute_dtype`: whether what reads the file rounds to another dtype than float32 where the quantization says so, by
    its `compute_dtype` or its `value_dtype`.
    `factor`: whether it multiplies by one at the end."""

    dtypes: frozenset[np.dtype[Any]]
    codebook: bool = True
    offset: bool = True
    group_index: bool = True
    nested_scale: bool = True
    compute_dtype: bool = True
    factor: bool = False


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that will be written: where, and how many bytes, exactly (None where only writing tells). A `shared` one
    is the same for every model, so that several outputs in one folder may all write it. `folder` is the output that it
    is a part of, where that is a folder."""

    path: Path
    nbytes: int | None
    shared: bool = False
    folder: Path | None = None


class Reader(Protocol):
    """Reads one format. Constructed without arguments.

    One that takes options, for what files may not say, has a class attribute `options`, a frozen dataclass of `option`
    fields that all have defaults, and a `read` with an instance of it as its second argument.
    """

    def read(self, path: Path) -> Model:
        """The model in `path`, headers only; raises nibblecast.Error for whatever is wrong with the file."""
        ...


@dataclass(frozen=True, slots=True)
class RunPort:
    """An input or output of a model that can be run; `scale` is that of its codes where it is quantized. Sizes that the
    model leaves open are 1."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scale: float | None = None


class Runner(Protocol):
    """Runs one model by its format's own runtime. Constructed with the model's path."""

    @property
    def inputs(self) -> Sequence[RunPort]: ...

    @property
    def outputs(self) -> Sequence[RunPort]: ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """The outputs by name, for inputs by name. Raises Unsupported when the runtime refuses."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shard(ABC):
    """A file that will be written: where, how large, and `tensors`, those that its payload is made of. They tell what
    several outputs have in common, and how far writing has come."""

    file: OutputFile
    tensors: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        """How many bytes of payload `write` tells of in the end."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """What tells two plans for it apart beyond the source, the options and the file's size, e.g. a hash of its
        header. A shard is kept when a run is resumed only where this is the same."""
        return ""

    @abstractmethod
    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the whole file to `stream`, front to back: there is no seeking. Takes payloads in pieces
        (`nibblecast.converters.output.streaming`, `Tensor.parts`), so that memory stays bounded, releases what it has
        written, and tells `wrote` how many bytes of payload each step has done."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A small file beside the shards: what is in it, or the file that it is a copy of."""

    file: OutputFile
    content: bytes | Path


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a writer will do with a model, known from headers alone: `shards` in the order in which they are written, of
    which the first is the file that the user named, and `companions`, which are written after them.

    With a `folder` all of them lie in it. It is complete or not there at all, and a run that breaks off keeps its
    complete shards for one that resumes it. `losses` are what the format does not keep; `notes` hints and warnings, a
    sentence each, by which nothing is lost; `report` lines to show when all is written, e.g. sizes. `expected` is the
    model that reading the files gives, where it is not the model that the writer got: tensors transposed, or under
    other names. Its `losses` are those of reading and of the stages that still hold.
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
        """Has the format's own checker, if there is one, look at the files that were written, of which `main` is the
        first, before they are put in their place (`--verify`); returns hints, a sentence each. Raises
        VerificationFailed."""
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
