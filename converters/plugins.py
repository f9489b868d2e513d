"""The known formats: one table, and third parties' entry points in the group `nibblecast.formats`.

An entry point's name is the format's name, and it loads a `Format`. The group is scanned only when the table has no
answer, or when all formats are listed.

Why a table of texts like "module:Class", not classes that register themselves. Registering needs every format's module
imported, with its libraries, before any file is opened. A table costs nothing until one format is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from nibblecast.converters.errors import CorruptFile, MissingDependency, Notice, UsageError
from nibblecast.converters.interfaces import Reader, Runner, Writer
from nibblecast.converters.ir import Model
from nibblecast.converters.options import OptionHelp, describe, parse
from nibblecast.converters.storage import open_regular

ENTRY_POINT_GROUP = "nibblecast.formats"


@dataclass(frozen=True, slots=True)
class Magic:
    """Bytes at `offset` that identify a file of the format."""

    offset: int
    content: bytes

    def matches(self, head: bytes) -> bool:
        """Whether `head`, the file's first bytes, contains them."""
        return head[self.offset : self.offset + len(self.content)] == self.content


@dataclass(frozen=True, slots=True)
class Format:
    """A format: how to recognise it, and where its code is.

    A folder is a model of this format if it has a file that matches one of the patterns `folder`. Formats listed in
    `yields_to` win when a folder matches both. `magic` are alternatives. `reader`, `writer` and `runner` are
    "module:Class" (empty: the format has none). `install` and `install_runner` say what to install when the module's
    imports fail.
    """

    name: str
    description: str
    extensions: tuple[str, ...]
    magic: tuple[Magic, ...] = ()
    reader: str = ""
    writer: str = ""
    install: str = ""
    folder: tuple[str, ...] = ()
    yields_to: tuple[str, ...] = ()
    runner: str = ""
    install_runner: str = ""


FORMATS = (
    Format(
        "cheader",
        "C source: packed codes, scales and zero points as const arrays",
        (".h",),
        reader="nibblecast.formats.cheader.reader:CHeaderReader",
        writer="nibblecast.formats.cheader.writer:CHeaderWriter",
    ),
    Format(
        "gguf",
        "GGUF: the weights of llama.cpp and ggml, in ggml's own types of blocks",
        (".gguf",),
        (Magic(0, b"GGUF"),),
        folder=("*.gguf",),
        yields_to=("pytorch", "safetensors"),
        reader="nibblecast.formats.gguf.reader:GGUFReader",
        writer="nibblecast.formats.gguf.writer:GGUFWriter",
    ),
    Format(
        "onnx",
        "ONNX: weights as initializers behind DequantizeLinear",
        (".onnx",),
        (Magic(0, b"\x08"),),
        reader="nibblecast.formats.onnx.reader:OnnxReader",
        writer="nibblecast.formats.onnx.writer:OnnxWriter",
        runner="nibblecast.formats.onnx.runner:OnnxRuntimeRunner",
        install_runner="pip install onnxruntime",
    ),
    Format(
        "pytorch",
        "PyTorch: state dicts, checkpoints, modules, TorchScript and exported programs, none of it executed",
        (".pt", ".pth", ".bin", ".ckpt", ".pt2", ".ptl", ".pkl"),
        (Magic(0, b"PK\x03\x04"), Magic(0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")),
        folder=("*.bin", "*.bin.index.json", "*.pt", "*.pth"),
        yields_to=("safetensors",),  # as in transformers, where a repository has its weights in both
        reader="nibblecast.formats.pytorch.reader:PyTorchReader",
    ),
    Format(
        "safetensors",
        "safetensors: packed codes with self-describing metadata, or plain floats",
        (".safetensors",),
        (Magic(8, b"{"),),
        folder=("*.safetensors", "*.safetensors.index.json"),
        reader="nibblecast.formats.safetensors.reader:SafetensorsReader",
        writer="nibblecast.formats.safetensors.writer:SafetensorsWriter",
    ),
    Format(
        "tflite",
        "TensorFlow Lite / LiteRT models, alone or inside .task and .litertlm",
        (".tflite", ".task", ".litertlm"),
        (Magic(4, b"TFL3"), Magic(0, b"LITERTLM"), Magic(0, b"PK\x03\x04")),
        reader="nibblecast.formats.tflite.reader:TFLiteReader",
        runner="nibblecast.formats.tflite.runner:LiteRTRunner",
        install_runner="pip install ai-edge-litert",
    ),
)

_BUILT_IN: Mapping[str, Format] = {format.name: format for format in FORMATS}
_HEAD_BYTES = 64


@cache
def all_formats() -> Mapping[str, Format]:
    """The table and every installed plugin, by name. Two formats of one name raise UsageError, which names both
    packages. A plugin that fails to load is one warning here, and an error when it is used."""
    from importlib.metadata import entry_points

    formats = dict(_BUILT_IN)
    packages = dict.fromkeys(formats, "nibblecast")
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        package = entry_point.dist.name if entry_point.dist else entry_point.value
        if entry_point.name in packages:
            raise UsageError(
                f"format '{entry_point.name}' is offered by both {packages[entry_point.name]} and {package}: "
                "uninstall one of them"
            )
        packages[entry_point.name] = package
        try:
            format = entry_point.load()
            if not isinstance(format, Format):
                raise TypeError(
                    f"{entry_point.value} must be a nibblecast.converters.plugins.Format, not {type(format).__name__}"
                )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            told = f"the plugin {package} for format '{entry_point.name}' is broken: {reason}"
            warnings.warn(told, Notice, stacklevel=2)
            format = Format(entry_point.name, f"broken: {reason}", (), install=f"repair or uninstall {package}")
        formats[entry_point.name] = format
    return formats


def format_named(name: str) -> Format:
    """The format of that name. Raises UsageError, which lists the known formats, for any other name."""
    format = _BUILT_IN.get(name) or all_formats().get(name)
    if format is None:
        raise UsageError(f"unknown format '{name}'; known formats: {', '.join(all_formats())}")
    return format


def detect(path: Path) -> Format:
    """The format of a file to read: by its content first, then by its extension if several formats or none match.
    Raises CorruptFile when the file cannot be read or nothing matches."""
    if path.is_dir():
        return _of_folder(path)
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CorruptFile(f"cannot be read: {error.strerror or error}", path=path) from error
    if not head:
        raise CorruptFile("is empty", path=path)
    suffix = path.suffix.lower()
    for known in (_known_built_in, all_formats):
        by_content = _best_by_content([format for format in known().values() if format.reader], head)
        both = [format for format in by_content if suffix in format.extensions]
        for candidates in (both, by_content):
            if len(candidates) == 1:
                return candidates[0]
    # extensions come last because one like .bin says little: a plugin that knows the content wins
    by_extension = [f for f in all_formats().values() if f.reader and suffix in f.extensions]
    if len(by_extension) == 1:
        return by_extension[0]
    raise CorruptFile(
        f"unknown format (first bytes {head[:8]!r}, extension '{path.suffix}'); readable formats: "
        f"{', '.join(f.name for f in all_formats().values() if f.reader)}",
        path=path,
    )


def _of_folder(path: Path) -> Format:
    for known in (_known_built_in, all_formats):
        having = {f.name: f for f in known().values() if any(any(path.glob(pattern)) for pattern in f.folder)}
        for format in having.values():
            if having.keys().isdisjoint(format.yields_to):
                return format
    patterns = ", ".join(pattern for format in all_formats().values() for pattern in format.folder)
    raise CorruptFile(f"no model in this folder; expected a file named {patterns}", path=path)


def _best_by_content(formats: Sequence[Format], head: bytes) -> list[Format]:
    """The formats whose matching magic is the longest; several if they are equally long."""
    lengths = [max((len(m.content) for m in f.magic if m.matches(head)), default=0) for f in formats]
    longest = max(lengths, default=0)
    return [format for format, length in zip(formats, lengths, strict=True) if length == longest > 0]


def format_of_target(path: Path) -> Format:
    """The format to write for an output path, by its extension. Raises UsageError when none or several fit."""
    for known in (_known_built_in, all_formats):
        fitting = [f for f in known().values() if f.writer and path.suffix.lower() in f.extensions]
        if len(fitting) == 1:
            return fitting[0]
    writable = ", ".join(f"{f.name} ({' '.join(f.extensions)})" for f in all_formats().values() if f.writer)
    raise UsageError(
        f"extension '{path.suffix}' does not select a format to write: use {writable}, or add --to NAME", path=path
    )


def is_checkpoint(names: Collection[str]) -> bool:
    """Whether the files of a folder, by their names, form one model: one matches a format's folder patterns, and an
    index of the files or a configuration lies beside it."""
    patterns = [pattern for format in all_formats().values() for pattern in format.folder]
    return bool(_matching(names, patterns)) and bool(_matching(names, ("*.index.json", "*config.json")))


def _matching(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def target_in(format: Format, path: Path, options: Mapping[str, Any], *, is_folder: bool) -> Path:
    """Where the format's output for a model called `path` goes: the writer's own choice if it has one, else the name
    with the format's extension in place of its own (a folder's name has none to replace)."""
    named = getattr(writer(format), "target", None)
    if named is not None:
        return cast("Path", named(path, options, is_folder=is_folder))
    return path.with_name((path.name if is_folder else path.stem) + format.extensions[0])


def reader(format: Format) -> Reader:
    """The format's reader; this imports its module. Raises UsageError if the format has no reader."""
    if not format.reader:
        raise UsageError(f"format '{format.name}' cannot be read: {format.description}")
    return cast("Reader", _load(format, format.reader))


def reader_options(format: Format) -> list[OptionHelp]:
    """The options of the format's reader; empty if it has no reader, or a reader without options."""
    options = getattr(reader(format), "options", None) if format.reader else None
    return describe(options) if isinstance(options, type) else []


def read(format: Format, path: Path, options: Mapping[str, Any]) -> Model:
    """The model at `path`, read with these options of the reader's own. Raises UsageError for unknown options."""
    reading = reader(format)
    declared = getattr(reading, "options", None)
    if isinstance(declared, type):
        return cast("Any", reading).read(path, parse(declared, options, format.name))  # type: ignore[no-any-return]
    if options:
        raise UsageError(f"the reader of format '{format.name}' has no options, but {', '.join(options)} is given")
    return reading.read(path)


def writer(format: Format) -> Writer:
    """The format's writer; this imports its module. Raises UsageError if the format has no writer."""
    if not format.writer:
        raise UsageError(f"format '{format.name}' cannot be written: {format.description}")
    return cast("Writer", _load(format, format.writer))


def runner(format: Format, path: Path) -> Runner:
    """The model at `path` in its format's runtime. Raises UsageError if the format has no runtime, MissingDependency if
    it is not installed."""
    if not format.runner:
        runnable = ", ".join(f.name for f in all_formats().values() if f.runner)
        raise UsageError(f"models of format '{format.name}' cannot be run; only those of {runnable} can", path=path)
    module, _, name = format.runner.partition(":")
    try:
        return cast("Runner", getattr(import_module(module), name)(path))
    except ImportError as error:
        message = (
            f"running format '{format.name}' needs a package that is not installed ({error}): {format.install_runner}"
        )
        raise MissingDependency(message) from error


def _known_built_in() -> Mapping[str, Format]:
    return _BUILT_IN


def _load(format: Format, location: str) -> Any:
    module, _, name = location.partition(":")
    try:
        return getattr(import_module(module), name)()
    except ImportError as error:
        hint = f": {format.install}" if format.install else ""
        raise MissingDependency(
            f"format '{format.name}' needs a package that is not installed ({error}){hint}"
        ) from error
