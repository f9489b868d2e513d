"""What stands beside the tensors of a model's folder: its configuration, rewritten, and every other file of the source.

Weights are not copied, in whichever format, nor what says how they were quantized; hidden files neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.errors import CorruptFile
from converters.interfaces import Companion, OutputFile
from converters.ir import Model
from formats.encodings.configuration import CONFIG, QUANTIZATION_FILES, QUANTIZATION_KEYS, model_config

_FORMATS_WITH_CONFIG = frozenset(("safetensors", "pytorch"))
_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .onnx_data .tflite .npz .npy .pkl .pickle .ot".split()
)
_INDEX = ".index.json"
#: What of a folder is a model's own, where only one file in it was named.
_MODEL_FILES = (
    "*token*.json",
    "*token*.model",
    "*.tiktoken",
    "*.jinja",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "generation_config.json",
    "*processor_config.json",
    "spiece.model",
)


def source_folder(model: Model) -> Path | None:
    """The folder that a checkpoint was read from; None where the source is no checkpoint."""
    source = model.metadata.source
    if source is None or model.metadata.format not in _FORMATS_WITH_CONFIG:
        return None
    return source if source.is_dir() else source.parent


def rewritten_config(model: Model, entries: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The source's config.json without what it says about quantization, with `entries`, and with `dtype` as the dtype
    of its values (None: as it is). Empty where there is nothing to say."""
    folder = source_folder(model)
    config = dict(model_config(folder)) if folder is not None else {}
    for key in QUANTIZATION_KEYS:
        config.pop(key, None)
    if dtype is not None and config:
        known = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(known or ["torch_dtype"], dtype)
    return config | dict(entries)


def json_companion(folder: Path, name: str, document: Mapping[str, Any]) -> Companion:
    """A JSON file of the folder."""
    content = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    return Companion(OutputFile(folder / name, len(content), folder=folder), content)


def copied(model: Model, folder: Path) -> Iterator[Companion]:
    """The source's other files, to be copied to `folder`. Raises CorruptFile where they cannot be listed."""
    source = source_folder(model)
    if source is None:
        return
    try:
        if model.metadata.source == source:
            files = _files(source, folder)
        else:
            files = sorted({path for pattern in _MODEL_FILES for path in source.glob(pattern) if path.is_file()})
    except OSError as error:
        where = Path(error.filename or source)
        raise CorruptFile(
            f"cannot be read: {error.strerror or error}; its files are to be copied", path=where
        ) from error
    for path in files:
        relative = path.relative_to(source)
        if _is_companion(relative) and _stays(path, source):
            yield Companion(OutputFile(folder / relative, path.stat().st_size, folder=folder), path)


def _files(source: Path, without: Path) -> list[Path]:
    """All files of a folder, those of `without` aside, should that lie in it."""
    found: list[Path] = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.absolute() == without.absolute():
            continue
        if path.is_dir() and not path.is_symlink():
            found += _files(path, without)
        elif path.is_file():
            found.append(path)
    return found


def _is_companion(relative: Path) -> bool:
    name = relative.name
    if name.endswith(_INDEX) or relative.suffix.lower() in _WEIGHTS:
        return False
    return str(relative) not in (CONFIG, *QUANTIZATION_FILES)


def _stays(path: Path, source: Path) -> bool:
    """Whether a link leads to a file in the folder, or in the store of blobs that Hugging Face's cache has beside its
    snapshots: a model is not to pick files of the machine."""
    target = path.resolve()
    store = source.resolve().parent.parent / "blobs"
    return target.is_relative_to(source.resolve()) or target.parent == store
