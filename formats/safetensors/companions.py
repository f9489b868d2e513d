"""What stands beside the tensors of a model's folder: its configuration, rewritten, and every other file of the source.

Weights are not copied, in whichever format, nor what says how they were quantized; hidden files neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.input.containment import is_inside
from nibblecast.converters.interfaces import Companion, OutputFile
from nibblecast.converters.ir import Loss, Model
from nibblecast.formats.encodings.configuration import CONFIG, QUANTIZATION_FILES, QUANTIZATION_KEYS, model_config

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


def copied(model: Model, folder: Path) -> tuple[list[Companion], list[Loss]]:
    """The source's other files, to be copied to `folder`, and what of them is not. Raises CorruptFile where they cannot
    be listed."""
    source = source_folder(model)
    if source is None:
        return [], []
    try:
        if model.metadata.source == source:
            files = list(_entries(source, folder))
        else:
            files = sorted({path for pattern in _MODEL_FILES for path in source.glob(pattern)})
        found: list[Companion] = []
        losses: list[Loss] = []
        for path in files:
            relative = path.relative_to(source)
            if not _is_companion(relative):
                continue
            reason = _reason_against(path, source)
            if reason is None:
                found.append(Companion(OutputFile(folder / relative, path.stat().st_size, folder=folder), path))
            else:
                losses.append(Loss("", "dropped", f"the file '{relative}' of the source's folder: it {reason}"))
    except OSError as error:
        where = Path(error.filename or source)
        raise CorruptFile(
            f"cannot be read: {error.strerror or error}; its files are to be copied", path=where
        ) from error
    return found, losses


def _entries(source: Path, without: Path) -> Iterator[Path]:
    """All that is in a folder and below it and is no folder, in the order of its names; what is in `without`, should
    that lie in the folder, and hidden files aside."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.absolute() == without.absolute():
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _entries(path, without)
        else:
            yield path


def _reason_against(path: Path, source: Path) -> str | None:
    """Why a file is not copied; None where it is. Raises OSError."""
    if not path.is_file():
        return "is not a regular file" if path.exists() else "is a broken link"
    return None if is_inside(path, source) else "is a link to a file outside of it"


def _is_companion(relative: Path) -> bool:
    name = relative.name
    if name.endswith(_INDEX) or relative.suffix.lower() in _WEIGHTS:
        return False
    return str(relative) not in (CONFIG, *QUANTIZATION_FILES)
