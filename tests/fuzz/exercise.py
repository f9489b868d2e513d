"""What is done with each input, and what is looked at meanwhile and afterwards.

A reader's `exercise` gets the path of the input, an empty folder for outputs and a number by which it may choose; it
says whether the input was read. All that may be refused is done within `refusable`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import nibblecast
from nibblecast.converters import pipeline, plugins
from nibblecast.converters.arithmetic.dtypes import FLOAT_DTYPES
from nibblecast.converters.batches.records import read_report
from nibblecast.converters.cli.inspect import _document
from nibblecast.converters.errors import VerificationFailed
from nibblecast.converters.ir import Model
from tests.fuzz import case as cases
from tests.fuzz.findings import MOST_OF_LINE, Odd, place_of

#: A number that stands for everything: whatever there is to choose from is done.
ALL = -1

#: Reads an input; says whether it was accepted.
Exercise = Callable[[Path, Path, int], bool]

#: What an input is written as: file name, format, and how. One of them is chosen, and written if it is small; the
#: first ones are always planned.
OUTPUTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("m.h", "cheader", {}),
    ("m.gguf", "gguf", {}),
    ("m.onnx", "onnx", {}),
    ("m.safetensors", "safetensors", {}),
    ("m", "safetensors", {}),
    ("m.h", "cheader", {"layout": "header", "packing": "unpacked"}),
    ("m.onnx", "onnx", {"dequantize": "float32"}),
    ("m.safetensors", "safetensors", {"dequantize": "float16"}),
    ("m.gguf", "gguf", {"dequantize": "float32"}),
    ("m.onnx", "onnx", {"quantize": "int4,block=32"}),
    ("m.h", "cheader", {"quantize": "int8,per-channel,mse"}),
    *(
        ("m", "safetensors", {"layout": layout, "others": "dequantize"})
        for layout in ("awq", "compressed-tensors", "gptq", "mlx", "torchao")
    ),
)
_ALWAYS_PLANNED = 5
_SMALL = 4 << 20
#: Of graphs that contradict themselves, as those of damaged models do.
_CHECKER = "onnx.checker refuses it"
_STAGES = ("dequantize", "quantize")
#: Events of Python's that say that something ran, was imported, or was opened.
_ALARMING = (
    *(
        "exec",
        "compile",
        "import",
        "open",
        "os.",
        "subprocess.",
        "socket.",
        "ctypes.",
        "shutil.",
        "marshal.",
        "pickle.",
    ),
    *("code.", "pty.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "builtins.", "runpy.", "sys.set"),
)
_HARMLESS = ("os.listdir", "os.scandir", "builtins.id")


@dataclass
class _Watch:
    """What Python's audit hook looks for. A hook cannot be taken away, so that one looks whether anything is wanted."""

    allowed: Path | None = None
    is_hooked: bool = False
    seen: list[str] = field(default_factory=list)


_watch = _Watch()


def checked(exercise: Exercise, case: cases.Case, main: str, folder: Path, *, pick: int | None = None) -> bool:
    """Does with a case what is to be done. Raises Odd, or whatever else went wrong. Whether it was read."""
    inputs, outputs = folder / "in", folder / "out"
    cases.write(case, inputs)
    cases.emptied(outputs)
    chosen = crc32(b"".join(case.values())) if pick is None else pick
    path = inputs if main == cases.FOLDER else inputs / main
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accepted = exercise(path, outputs, chosen)
    if caught:
        first = caught[0]
        place = f"{Path(first.filename).name}: {first.category.__name__}"
        raise Odd("warning", str(first.message), place)
    _refuse_left(outputs)
    left = {file.name for file in inputs.iterdir()} - set(case)
    if left:
        raise Odd("left beside the input", ", ".join(sorted(left)))
    return accepted


def model(path: Path, outputs: Path, pick: int) -> bool:
    """Loads a model, lists it, decodes all of it, measures it, plans it for every writer, and writes it by one."""
    found: Model | None = None
    with refusable(outputs), _watched(path):
        found = nibblecast.load(path)
    if found is None:
        return False
    with refusable(outputs):
        json.dumps(_document(found), allow_nan=False)
    with refusable(outputs), _watched(path):
        for tensor in found.values():
            if tensor.dtype.kind != "c":
                assert tensor.dequantize(np.float32).shape == tensor.shape
            if tensor.quantization is not None:
                tensor.codes()
    if pick == ALL or pick % 8 == 0:
        with refusable(outputs):
            json.dumps(nibblecast.report(path).document(), allow_nan=False)
    written = range(len(OUTPUTS)) if pick == ALL else (pick % len(OUTPUTS),)
    for number, (name, format, how) in enumerate(OUTPUTS):
        if number >= _ALWAYS_PLANNED and number not in written:
            continue
        small = False
        with refusable(outputs):
            small = _planned_bytes(found, outputs / name, format, how) <= _SMALL
        if small and number in written:
            with refusable(outputs):
                conversion = nibblecast.convert(path, outputs / name, to=format, verify=True, **how)
                _refuse_left(outputs, {file.path for file in conversion.files})
            cases.emptied(outputs)
    return True


def report(path: Path, outputs: Path, pick: int) -> bool:
    """Sums up a report of a batch, and makes a page of it now and then."""
    with refusable(outputs):
        for record in read_report(path).values():
            record.line()
        json.dumps(nibblecast.report(path).document(), allow_nan=False)
        if pick == ALL or pick % 16 == 0:
            nibblecast.report(path, outputs / "page.html")
            _refuse_left(outputs, {outputs / "page.html"})
            cases.emptied(outputs)
        return True
    return False


@contextmanager
def refusable(outputs: Path) -> Iterator[None]:
    """What may be refused: by a nibblecast.Error of one line that is not long, with nothing left in `outputs`. That an
    output does not hold what was read is no refusal."""
    try:
        yield
    except nibblecast.Error as error:
        if isinstance(error, VerificationFailed) and not error.message.startswith(_CHECKER):
            raise Odd("verification", str(error), "verification") from error
        text = str(error)
        if len(text) > MOST_OF_LINE or not text.isprintable() or not text.strip():
            raise Odd("message", f"{len(text)} characters: {text[:200]!r}", place_of(error)) from error
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Odd("message", ascii(text), place_of(error)) from error
        _refuse_left(outputs)


def watch_python() -> None:
    """Has Python tell what is imported, run and opened, in this process from now on."""
    if not _watch.is_hooked:
        _watch.is_hooked = True
        sys.addaudithook(_heard)


@contextmanager
def _watched(path: Path) -> Iterator[None]:
    """Nothing may run, be imported, or be opened that is not the input."""
    _watch.allowed = path if path.is_dir() else path.parent
    _watch.seen.clear()
    try:
        yield
    finally:
        _watch.allowed = None
    if _watch.seen:
        raise Odd("execution", "; ".join(_watch.seen[:5]), _watch.seen[0].partition("(")[0])


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    allowed = _watch.allowed
    if allowed is None or event in _HARMLESS or not event.startswith(_ALARMING):
        return
    if event == "open" and isinstance(arguments[0], str | bytes | Path) and _is_below(arguments[0], allowed):
        return
    if event == "open" and isinstance(arguments[0], int):  # what was opened already
        return
    _watch.seen.append(f"{event}({', '.join(ascii(each)[:100] for each in arguments[:2])})")


def _is_below(path: str | bytes | Path, folder: Path) -> bool:
    text = path.decode("utf-8", "replace") if isinstance(path, bytes) else str(path)
    return text == str(folder) or (text.startswith(f"{folder}/") and "/../" not in text)


def _planned_bytes(found: Model, target: Path, format: str, how: dict[str, Any]) -> int:
    options = {key.replace("_", "-"): value for key, value in how.items() if key not in _STAGES}
    planned = pipeline.plan(
        found,
        [pipeline.Target(target, plugins.format_named(format), options)],
        dequantize=FLOAT_DTYPES[how["dequantize"]] if "dequantize" in how else None,
        quantize=_scheme(how["quantize"]) if "quantize" in how else None,
    )
    return sum(file.nbytes or 0 for file in pipeline.output_files(planned))


def _scheme(text: str) -> Any:
    from nibblecast.converters.stages.scheme import parse_scheme

    return parse_scheme(text)


def _refuse_left(outputs: Path, expected: set[Path] | None = None) -> None:
    found = {path for path in outputs.rglob("*") if not path.is_dir() or path.name.endswith("-part")}
    if not outputs.is_dir() or found != (expected or set()):
        names = sorted(path.name for path in found ^ (expected or set()))
        raise Odd("left behind", ", ".join(names) or "the folder is gone")
