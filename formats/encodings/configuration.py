"""What the files beside a checkpoint's tensors say about its quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nibblecast.converters.errors import CorruptFile, located
from nibblecast.converters.input.containment import refuse_outside
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.storage import open_regular

CONFIG = "config.json"

_MOST_BYTES = 64 << 20

#: What config.json calls the part about quantization, and the `quant_method` where that part does not say.
QUANTIZATION_KEYS: Mapping[str, str] = MappingProxyType(
    {"quantization_config": "", "compression_config": "compressed-tensors", "quantization": "mlx"}
)


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object in a file of a model's folder. Raises CorruptFile for anything else, for files of more than 64 MiB,
    and for links out of the folder."""
    refuse_outside(path, folder)
    try:
        with open_regular(path) as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise CorruptFile(f"has more than {_MOST_BYTES} bytes, too many for a configuration", path=path)
    except OSError as error:
        raise CorruptFile(f"cannot be read: {error.strerror or error}", path=path) from error
    with located(path=path):
        return json_object(content, "its text")


def quantization_config(folder: Path) -> dict[str, Any]:
    """The part of a folder's configuration that is about quantization, with `quant_method`; {} where there is none.

    config.json has it in `quantization_config` (transformers), `compression_config` (compressed-tensors before 0.8) or
    `quantization` (MLX); quantize_config.json is auto-gptq's, quant_config.json autoawq's (which has `w_bit` and
    `q_group_size` there), hf_quant_config.json ModelOpt's, quanto_qmap.json optimum-quanto's.
    """
    found: dict[str, Any] = {}
    for name, extract in _SOURCES.items():
        path = folder / name
        if not found and _is_there(path):
            found = extract(read_json(path, folder))
    return found


def model_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, which has the sizes of a model's layers; {} where there is none."""
    path = folder / CONFIG
    return read_json(path, folder) if _is_there(path) else {}


def _is_there(path: Path) -> bool:
    """Whether there is anything of that name: what is no file is refused when it is read, not passed over. Raises
    CorruptFile where the folder does not tell."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CorruptFile(f"cannot be read: {error.strerror or error}", path=path) from error
    return True


def _of_config(document: Mapping[str, Any]) -> dict[str, Any]:
    for key, method in QUANTIZATION_KEYS.items():
        config = document.get(key)
        if isinstance(config, dict) and config:
            return {**({"quant_method": method} if method else {}), **config}
    return {}


def _of_gptq(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"quant_method": "gptq", **document}


def _of_awq(document: Mapping[str, Any]) -> dict[str, Any]:
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    return {"quant_method": "awq", **{names.get(key, key): value for key, value in document.items()}}


def _of_modelopt(document: Mapping[str, Any]) -> dict[str, Any]:
    quantization = document.get("quantization")
    return {**quantization, "quant_method": "modelopt"} if isinstance(quantization, dict) else {}


def _of_quanto(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"quant_method": "quanto", "modules": dict(document)}


_SOURCES = {
    CONFIG: _of_config,
    "hf_quant_config.json": _of_modelopt,
    "quantize_config.json": _of_gptq,
    "quant_config.json": _of_awq,
    "quanto_qmap.json": _of_quanto,
}

#: The files that are about quantization only.
QUANTIZATION_FILES = frozenset(_SOURCES) - {CONFIG}
