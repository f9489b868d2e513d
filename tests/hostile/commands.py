"""Every command of the command line, as it is given a hostile file; and what is wrong with how one ended."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOOD = ROOT / "fixtures" / "tflite" / "mlp_float16.tflite"
GOOD_ONNX = ROOT / "fixtures" / "onnx" / "where_weights_are.onnx"
REPORT = "nibblecast-report.jsonl"
#: What no command takes longer than, for each model that it is given (PyTorch's exporter alone takes a second), nor
#: more memory; and what no line is longer than.
SECONDS, BYTES, CHARACTERS = 10.0, 1500 << 20, 10_000

_CODES = frozenset({0, 2, 3, 4, 5, 6, 7, 8})
_OF_MODELS = _CODES - {7}
_PROGRESS = re.compile(r"\d+/\d+ (done|failed): .*")
_TOLD = ("note: ", "changed: ", "not kept: ", "not kept or changed: ")

#: {input}: the hostile file or folder; {out}: an empty folder; {folder}: a folder that holds the hostile file alone.
_MODEL_COMMANDS = """
    inspect {input}
    inspect {input} --json
    convert {input} {out}/m.h
    convert {input} {out}/m.gguf --verify
    convert {input} {out}/m.onnx --verify
    convert {input} {out}/m.safetensors --verify --quiet
    convert {input} {out}/m --to safetensors
    convert {input} {out}/m.safetensors --dequantize
    convert {input} {out}/m.onnx --quantize int4,block=32
    verify {input} {good}
    report {input} --json
    report {input} -o {out}/page.html
"""
#: And for those that can be read.
_MORE_COMMANDS = """
    convert {input} {out}/m.h --verify --opt layout=header --json
    convert {input} {out}/m --to safetensors --opt layout=gptq --opt others=dequantize --verify
    convert {input} {out}/m.h {out}/m.onnx {out}/m.safetensors
    convert {input} {out}/m.gguf --dequantize bfloat16 --fail-on-loss
    convert {input} {out}/m.onnx --quantize int8,per-channel,mse,requantize --verify
    convert {input} {out}/m.onnx --dry-run --json
    verify {input} {input} --json
"""
_REPORT_COMMANDS = """
    report {input} --json
    report {input} -o {out}/page.html
    report {folder} --json
    inspect {input}
    convert {input} {out}/m.h
    batch {good_folder} {folder} --to safetensors --resume --json --jobs 1
"""
_ARRAY_COMMANDS = """
    verify {good_onnx} {good_onnx} --run --input {input}
    verify {good_onnx} {good_onnx} --run --input {input} --json
    inspect {input}
"""
#: Of all files of a kind together.
_BATCH_COMMANDS = """
    batch {folder} {out}/b --to safetensors --to onnx --timeout 30 --memory 3G
    batch {folder} {out}/b --to safetensors --to onnx --timeout 30 --memory 3G --resume --json
    report {out}/b --json
    report {out}/b -o {out}/page.html
"""
_PLAIN_COMMANDS = """
    formats
    formats --json
    formats safetensors
"""
_COMMANDS: Mapping[str, str] = {
    "report": _REPORT_COMMANDS,
    "npz": _ARRAY_COMMANDS,
    "batch": _BATCH_COMMANDS,
    "plain": _PLAIN_COMMANDS,
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (that of a signal is negative), what it printed, seconds of the processor,
    files for it and files that nobody asked for. `models` is how many it was given."""

    command: str
    code: int
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    outputs: Sequence[str] = ()
    strays: Sequence[str] = ()
    models: int = 1
    traces: str = field(default="", repr=False)


def commands_for(kind: str) -> list[str]:
    """The commands for a kind of file, with places for its path."""
    return _lines(_COMMANDS.get(kind, _MODEL_COMMANDS))


def more_commands_for(kind: str, first: Ended) -> list[str]:
    """Further ones, which depend on how the first one ended."""
    return _lines(_MORE_COMMANDS) if kind not in _COMMANDS and first.code == 0 else []


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def wrong_with(ended: Ended) -> list[str]:
    """What must not be; nothing where all is well."""
    name = ended.command.split()[0]
    if ended.code not in (_CODES if name == "batch" else _OF_MODELS):
        return [f"exit code {ended.code}: {ended.traces.strip()[-2000:]}"]
    found = []
    if "Traceback" in ended.out or "Traceback" in ended.err:
        found.append("a traceback")
    if "out of memory" in ended.err:
        found.append("it took all memory that it was given")
    if ended.seconds > SECONDS * ended.models:
        found.append(f"it took {ended.seconds:.1f} s of the processor")
    if ended.strays:
        found.append(f"files that nobody asked for: {', '.join(ended.strays)}")
    return [*found, *_wrong_lines(ended, name), *_wrong_document(ended), *_wrong_outputs(ended, name)]


def _wrong_lines(ended: Ended, name: str) -> list[str]:
    """Of standard error: notes and losses of a conversion that was done, the progress of a batch, and else at most one
    line, which says why it was not done."""
    lines = ended.err.splitlines()
    found = [f"a line of {len(line)} characters" for line in lines if len(line) > CHARACTERS]
    found += [f"a line that is not printable: {line[:200]!r}" for line in lines if not line.isprintable()]
    if name == "batch":
        rest = [line for line in lines if not _PROGRESS.fullmatch(line)]
    elif name == "convert" and ended.code == 0 and "--quiet" not in ended.command and "--json" not in ended.command:
        rest = [line for line in lines if not line.startswith(_TOLD)]
    else:
        rest = lines
    is_done = ended.code in (0, 7) or (ended.code == 6 and name == "verify")
    if len(rest) != (0 if is_done else 1) or not all(line.startswith("nibblecast: ") for line in rest):
        found.append(f"{len(rest)} lines on stderr with exit code {ended.code}: {ended.err[:1000]!r}")
    return found


def _wrong_document(ended: Ended) -> list[str]:
    if "--json" not in ended.command or ended.code not in (0, 6, 7) or (ended.code == 6 and not ended.out):
        return []
    try:
        document = json.loads(ended.out, parse_constant=_refuse_constant)
    except ValueError as error:
        return [f"no JSON on stdout: {error}"]
    is_batch = ended.command.startswith("batch")  # a report's records are what its file says
    records = document.get("records", ()) if is_batch and isinstance(document, dict) else ()
    return [f"of a batch: {why}" for record in records for why in _wrong_record(record)]


def _wrong_record(record: Mapping[str, object]) -> list[str]:
    """Of a model of a batch: it is done, or refused in one line, and nothing had to end it."""
    failure = record.get("failure")
    if not isinstance(failure, dict):
        return []
    message = str(failure["message"])
    found = []
    if failure["exit_code"] not in _OF_MODELS or failure["transient"]:
        found.append(f"{record['source']} ended with {failure['exit_code']}: {message[:500]}")
    if len(message) > CHARACTERS or not message.isprintable():
        found.append(f"a message of {len(message)} characters: {message[:200]!r}")
    return found


def _wrong_outputs(ended: Ended, name: str) -> list[str]:
    """A command that was not done leaves nothing; one that was leaves what it was told to."""
    if name == "batch" or "{out}/b" in ended.command:
        return [f"left behind: {path}" for path in ended.outputs if path.endswith("-part")]
    if ended.code == 0 and name in ("convert", "report") and "--dry-run" not in ended.command:
        wanted = set(re.findall(r"\{out\}/([\w.]+)", ended.command))
        found = {path.split("/")[0] for path in ended.outputs} - {"m.c", "nibblecast.h", "m.onnx.data"}
        missing, more = wanted - found, found - wanted
        return [f"not written: {each}" for each in missing] + [f"left behind: {each}" for each in more]
    return [f"left behind: {path}" for path in ended.outputs]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
