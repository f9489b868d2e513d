"""What a format plugin implements: a `Reader`, a `Writer`, or both. The types here are all that they share.

A reader turns a path into a Model and reads headers only. A writer works in two passes: `plan` looks at names, shapes
and dtypes, and says which files there will be and how large; the plan's `open` gives a sink, which gets the tensors one
by one, in the model's order, and writes each payload as it comes. Files are temporary until the pipeline puts them in
their place, all or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, runtime_checkable

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


class Sink(Protocol):
    """Receives a planned model's tensors, in order, each once."""

    def write(self, tensor: Tensor) -> None:
        """Writes one tensor. Takes its payload in pieces (`tensor.parts`), so that memory stays bounded."""
        ...

    def close(self) -> None:
        """Writes what comes after the last tensor. The files themselves are closed by the pipeline."""
        ...


class Plan(Protocol):
    """What a writer will do with a model, known from headers alone. The first of `files` is the one the user named."""

    @property
    def files(self) -> Sequence[OutputFile]: ...

    @property
    def losses(self) -> Sequence[Loss]: ...

    @property
    def notes(self) -> Sequence[str]:
        """Hints and warnings about what will be written, a sentence each; nothing is lost by them."""
        ...

    @property
    def report(self) -> Sequence[str]:
        """Lines to show when all is written (sizes, say)."""
        ...

    def open(self, streams: Sequence[BinaryIO]) -> Sink:
        """Starts writing: `streams` are seekable binary files in the order of `files`."""
        ...


class Shard(Protocol):
    """A file of a folder that holds tensors, complete in itself."""

    @property
    def file(self) -> OutputFile:
        """Where it will be, and its exact size."""
        ...

    @property
    def digest(self) -> str:
        """What tells two plans for it apart (a hash of its header, say)."""
        ...

    def write(self, stream: BinaryIO, wrote: Callable[[int], None]) -> None:
        """Writes the whole file to `stream`, in pieces, so that memory stays bounded; says how many bytes each has."""
        ...


@dataclass(frozen=True, slots=True)
class Companion:
    """A small file of a folder: what is in it, or the file that it is a copy of."""

    file: OutputFile
    content: bytes | Path


@runtime_checkable
class FolderPlan(Protocol):
    """What a writer will do with a model that becomes a folder. It is complete or not there at all; shards are written
    one after the other, and those that are complete are kept when a run breaks off and the next one resumes it."""

    @property
    def folder(self) -> Path: ...

    @property
    def shards(self) -> Sequence[Shard]: ...

    @property
    def companions(self) -> Sequence[Companion]: ...

    @property
    def files(self) -> Sequence[OutputFile]: ...

    @property
    def losses(self) -> Sequence[Loss]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def report(self) -> Sequence[str]: ...


@runtime_checkable
class Validating(Protocol):
    """A plan whose format has a checker of its own, for `--verify`."""

    def validate(self, main: Path) -> Sequence[str]:
        """Has that look at the files that were written, of which `main` is the first, before they are put in their
        place; returns hints, a sentence each. Raises VerificationFailed."""
        ...


@runtime_checkable
class Rearranging(Protocol):
    """A plan that writes tensors otherwise than it gets them: transposed, say, or under other names."""

    @property
    def expected(self) -> Model:
        """What reading the files will give; its `losses` are those of reading and of the stages that still hold."""
        ...


class Writer(Protocol):
    """Writes one format. Constructed without arguments."""

    options: ClassVar[type]
    """A frozen dataclass of the writer's own options, made of `option` fields that all have defaults."""

    capabilities: ClassVar[Capabilities]

    def plan(self, model: Model, target: Path, options: Any) -> Plan | FolderPlan:
        """What will be written for `model` to `target`; reads no payload. `options` is an instance of `options`.
        Raises Unsupported or RefusedLoss, naming the tensor and what to add to the command."""
        ...
