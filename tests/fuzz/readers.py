"""The readers that are fuzzed: what their inputs are called, how these are changed, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from random import Random

from tests.fuzz import case as cases
from tests.fuzz import exercise, seeds
from tests.fuzz.limits import MOST_BYTES
from tests.fuzz.mutators import c_text, flatbuffer, gguf, json_tree, pickles, protobuf, zips
from tests.fuzz.mutators.havoc import havoc

#: A change of bytes; `other` is a file of the same kind, which parts may come from.
Mutator = Callable[[bytes, bytes, Random], bytes]

_TRIES = 8


@dataclass(frozen=True)
class Reader:
    """`main` is the file that is read (or the folder); `mutators` are by the files' suffixes."""

    name: str
    main: str
    seeds: Callable[[], list[cases.Case]]
    mutators: Mapping[str, Mutator]
    exercise: exercise.Exercise = exercise.model

    @property
    def file_name(self) -> str:
        """What a single file is called."""
        return self.main if self.main != cases.FOLDER else "model.safetensors"

    def mutated(self, blob: bytes, others: Sequence[bytes], random: Random) -> bytes:
        """The input with one or several changes; `others` are inputs that parts may come from."""
        for _ in range(_TRIES):
            made = self._mutated(blob, random.choice(others), random)
            if len(made) <= MOST_BYTES:
                return made
        return blob

    def _mutated(self, blob: bytes, other: bytes, random: Random) -> bytes:
        case, second = (cases.divided(each, self.file_name) for each in (blob, other))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            name = random.choice(list(case))
            alike = [each for each in second if PurePath(each).suffix == PurePath(name).suffix]
            mutate = self.mutators.get(PurePath(name).suffix, havoc) if random.random() < 0.85 else havoc
            case[name] = mutate(case[name], second[random.choice(alike)] if alike else b"", random)
            if len(case) > 1 and random.random() < 0.02:
                del case[name]
            elif random.random() < 0.02 and second:
                case |= dict([random.choice(list(second.items()))])
            if not case:
                return blob
        return cases.joined(case)


def _tflite(data: bytes, other: bytes, random: Random) -> bytes:
    """A flatbuffer, a ZIP archive of them, or one behind the header of another container."""
    if data[:2] == b"PK":
        return zips.changed(data, other, random, flatbuffer.model)
    at = data.find(b"TFL3") - 4
    if at <= 0 or random.random() < 0.5:
        return flatbuffer.model(data, other, random)
    return data[:at] + flatbuffer.model(data[at:], other, random)


_SAFETENSORS: Mapping[str, Mutator] = {".safetensors": json_tree.safetensors, ".json": json_tree.document}

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("cheader", "model.h", seeds.cheader, {".h": c_text.source, ".c": c_text.source}),
        Reader("gguf", "model.gguf", seeds.gguf, {".gguf": gguf.model}),
        Reader("onnx", "model.onnx", seeds.onnx, {".onnx": protobuf.message}),
        Reader("pytorch", "model.pt", seeds.pytorch, {".pt": pickles.file}),
        Reader("pytorch-legacy", "model.pt", seeds.pytorch_legacy, {".pt": pickles.file}),
        Reader("pytorch-pt2", "model.pt2", seeds.pytorch_exported, {".pt2": pickles.file}),
        Reader(
            "report", "nibblecast-report.jsonl", seeds.report, {".jsonl": json_tree.lines}, exercise=exercise.report
        ),
        Reader("safetensors", "model.safetensors", seeds.safetensors, _SAFETENSORS),
        Reader("safetensors-folder", cases.FOLDER, seeds.safetensors_folder, _SAFETENSORS),
        Reader("tflite", "model.tflite", seeds.tflite, {".tflite": _tflite}),
    )
}
