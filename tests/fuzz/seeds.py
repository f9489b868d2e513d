"""What the fuzzer begins with: the fixtures that are small, the hostile ones among them, and models of tests/zoo.py."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import nibblecast
from nibblecast.converters.batches.records import Failure, Output, Record
from nibblecast.converters.ir import Model
from tests import zoo
from tests.fuzz.case import Case
from tests.fuzz.findings import ROOT

FIXTURES = ROOT / "fixtures"
_MOST_BYTES = 24 << 10
_MODELS_OF_A_THEME = 3
_TENSORS_OF_A_MODEL = 5


def cheader() -> list[Case]:
    """Headers with the arrays in them or in a file of their own."""
    return [*_written("m.h", to="cheader"), *_written("m.h", to="cheader", layout="header"), *_hostile("cheader")]


def gguf() -> list[Case]:
    """ggml's types of blocks, and plain numbers."""
    quantized = [_written("model.gguf", quantize=f"{codes},block=32") for codes in ("int4", "int8")]
    return [*_fixtures("gguf", "*.gguf"), *_written("model.gguf"), *chain(*quantized), *_hostile("gguf")]


def onnx() -> list[Case]:
    """Graphs with weights inside, weights alone, and weights in another file."""
    return [*_fixtures("onnx", "*.onnx"), *_written("model.onnx"), _external_onnx(), *_hostile("onnx")]


def safetensors() -> list[Case]:
    """Single files."""
    cases = [*_fixtures("torchao", "*.safetensors"), *_fixtures("checkpoints", "*/*.safetensors")]
    return [*cases, *_written("model.safetensors"), *_hostile("safetensors")]


def safetensors_folder() -> list[Case]:
    """Folders with a configuration, in one file or in several with an index."""
    folders = [path for path in sorted((FIXTURES / "checkpoints").iterdir()) if (path / "model.safetensors").exists()]
    return [
        *(case for folder in folders for case in _small(_folder(folder))),
        *_written("model", to="safetensors", shard_size=200),
        *_written("model", to="safetensors", layout="gptq", others="dequantize"),
        *_hostile("safetensors-folder"),
    ]


def pytorch() -> list[Case]:
    """ZIP archives of pickles."""
    cases = [*_fixtures("pytorch", "*.pt"), *_fixtures("torchao", "*.pt"), *_fixtures("checkpoints", "*/*.pt")]
    return [*(case for case in cases if next(iter(case.values()))[:2] == b"PK"), *_hostile("pytorch")]


def pytorch_legacy() -> list[Case]:
    """Pickles one after the other, and bare ones."""
    return [*_fixtures("pytorch", "legacy*.pt"), *_hostile("pytorch-legacy")]


def pytorch_exported() -> list[Case]:
    """Exported programs."""
    return [*_fixtures("pytorch", "*.pt2"), *_hostile("pytorch-pt2")]


def tflite() -> list[Case]:
    """Models, and containers of them."""
    cases = [*_fixtures("tflite", "*.tflite"), *_fixtures("tflite", "*.task"), *_fixtures("tflite", "*.litertlm")]
    return [*cases, *islice(_fixtures("tflite/operators", "*/*.tflite"), 0, None, 2), *_hostile("tflite")]


def report() -> list[Case]:
    """Reports with models that were converted, and models that were not."""
    done = Record(
        source="a/b.tflite",
        sha256="0" * 64,
        request='{"to": "safetensors"}',
        outputs=(Output("a/b.safetensors", 1234, "1" * 64),),
        losses=({"tensor": "w", "kind": "dropped", "detail": "a name"},),
        verified=True,
        seconds=0.5,
        peak_memory=1 << 20,
        nibblecast="1.0",
        source_bytes=2345,
    )
    failed = Record("c.onnx", "", "{}", attempts=2, failure=Failure(3, "c.onnx: is empty", transient=True))
    text = (done.line() + failed.line()).encode()
    return [{"nibblecast-report.jsonl": text}, {"nibblecast-report.jsonl": text * 2}, *_hostile("report")]


def _fixtures(folder: str, pattern: str) -> Iterator[Case]:
    for path in sorted((FIXTURES / folder).glob(pattern)):
        if "hostile" not in path.parts and path.stat().st_size <= _MOST_BYTES:
            yield {"model" + _suffix_of(path): path.read_bytes()}


def _suffix_of(path: Path) -> str:
    return ".tflite" if path.suffix in (".task", ".litertlm") else path.suffix


def _hostile(kind: str) -> Iterator[Case]:
    for path in sorted((FIXTURES / "hostile" / kind).glob("*")):
        yield from _small(_folder(path) if path.is_dir() else {"model" + path.suffix: path.read_bytes()})


def _small(case: Case) -> Iterator[Case]:
    if case and sum(map(len, case.values())) <= 2 * _MOST_BYTES:
        yield case


def _folder(path: Path) -> Case:
    files = sorted(each for each in path.iterdir() if each.is_file() and each.suffix != ".npz")
    return {each.name: each.read_bytes() for each in files}


def _written(name: str, **how: object) -> list[Case]:
    """Small models of the zoo as the writer of that name writes them, if it can hold them."""
    cases = []
    for model in _models():
        with TemporaryDirectory() as folder:
            target = Path(folder) / name
            try:
                nibblecast.save(model, target, **how)  # type: ignore[arg-type]
            except nibblecast.Error:
                continue
            case = _folder(target if target.is_dir() else Path(folder))
            cases += _small({key.replace("m.", "model.", 1) if name == "m.h" else key: case[key] for key in case})
    return cases


@cache
def _models() -> tuple[Model, ...]:
    themes: tuple[Callable[[], Model], ...] = (
        *(zoo.granularities, zoo.zero_points, zoo.scales, zoo.schemes, zoo.small_floats, zoo.wide_codes, zoo.shapes),
        *(zoo.names, zoo.shared_parameters, zoo.plain),
    )
    models = []
    for theme in themes:
        tensors = [tensor for tensor in theme().values() if tensor.dtype.kind != "c"]
        step = -(-len(tensors) // _TENSORS_OF_A_MODEL)
        models += [zoo.model(tensors[start::step]) for start in range(min(step, _MODELS_OF_A_THEME))]
    matrix = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    models.append(Model({"a.weight": nibblecast.Tensor.from_array("a.weight", matrix)}))
    return tuple(models)


def _external_onnx() -> Case:
    """One initializer whose bytes are in a file beside the model, as onnx.proto has it."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def entry(key: bytes, value: bytes) -> bytes:
        return field(13, field(1, key) + field(2, value))

    where = entry(b"location", b"data.bin") + entry(b"offset", b"4") + entry(b"length", b"24")
    tensor = field(1, 2) + field(1, 3) + field(2, 1) + field(8, b"w") + where + field(14, 1)
    graph = field(2, b"g") + field(5, tensor)
    return {
        "model.onnx": field(1, 10) + field(7, graph) + field(8, field(2, 21)),
        "data.bin": struct.pack("<8f", *range(8)),
    }
