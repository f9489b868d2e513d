"""Model -> a folder as transformers has them: shards by size with an index, config.json, and the source's other files.

    model.safetensors                                        one file, or
    model-00001-of-00002.safetensors, …, model.safetensors.index.json

The layout `packed` describes its weights in each file's metadata; the others store them as an encoding of
`formats.encodings` does. Floats are the same in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.interfaces import Companion, Plan
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.formats.encodings.configuration import CONFIG
from nibblecast.formats.encodings.values.refit import computed_with_scales
from nibblecast.formats.encodings.writable import Configuration, Encoded, writable_encoding
from nibblecast.formats.safetensors.companions import copied, json_companion, rewritten_config
from nibblecast.formats.safetensors.file_layout import KINDS, FileLayout, laid_out
from nibblecast.formats.safetensors.float_model import as_float_model, unheld_scales
from nibblecast.formats.safetensors.options import SafetensorsOptions
from nibblecast.formats.safetensors.packed_layout import METADATA_NAME, PackedKeys, description_of

_INDEX = "model.safetensors.index.json"
_FLOATS = frozenset((FLOAT16, BFLOAT16, FLOAT32))


@dataclass(frozen=True, slots=True, eq=False)
class _Contents:
    """What is to be stored: tensors by key that stay together, with the metadata that describes them."""

    units: Sequence[Mapping[str, Tensor]]
    descriptions: Sequence[Mapping[str, Any]]
    configuration: Configuration
    expected: Model
    losses: Sequence[Loss] = field(default_factory=tuple)


def planned_folder(model: Model, folder: Path, options: SafetensorsOptions) -> Plan:
    """The folder for a model. Raises Unsupported where the layout cannot hold it, with what to do about it."""
    model, losses = as_float_model(model)
    contents = _packed(model) if options.layout == "packed" else _encoded(model, options)
    shards = _shards(contents, folder, options.shard_size)
    beside, left_out = copied(model, folder)
    companions = {companion.file.path: companion for companion in beside}
    for companion in _written(model, contents, shards, folder):
        companions[companion.file.path] = companion
    return Plan(
        shards,
        losses=(*losses, *contents.losses, *left_out),
        notes=contents.configuration.notes,
        companions=tuple(companions.values()),
        folder=folder,
        expected=contents.expected,
    )


def _packed(model: Model) -> _Contents:
    """Parameters that are tensors of their own stay with their owners."""
    keys = PackedKeys(model)
    together: dict[str, list[str]] = {}
    for name, tensor in model.items():
        owner = tensor.parameter_of
        together.setdefault(owner if owner is not None and owner in model else name, []).append(name)
    units, descriptions = [], []
    is_plain = keys.say_nothing
    for names in together.values():
        units.append({key: tensor for name in names for key, tensor in keys.stored[name].items()})
        descriptions.append({} if is_plain else {name: keys.descriptions[name] for name in names})
    return _Contents(units, descriptions, Configuration({}), model)


def _encoded(model: Model, options: SafetensorsOptions) -> _Contents:
    """Quantized weights as the layout's library stores them."""
    encoding = writable_encoding(options.layout)
    dtype = None if options.scale_dtype is None else np.dtype(options.scale_dtype)
    weights: dict[str, Encoded] = {}
    tensors: dict[str, Tensor] = {}
    losses = unheld_scales(model, options.layout)
    for name, tensor in model.items():
        if tensor.parameter_of in model.tensors:
            continue
        tensors[name] = tensor
        if tensor.quantization is None:
            _check_plain(tensor, options.layout)
            continue
        try:
            rounded, lost = computed_with_scales(tensor, dtype) if dtype else (tensor, ())
            weights[name] = encoding.encode(rounded)
            losses += (*lost, *weights[name].losses)
            tensors[name] = weights[name].weight
        except Unsupported as error:
            tensors[name] = _dequantized_instead(tensor, error, options)
            losses.append(
                Loss(name, "dropped", f"its codes: it becomes {tensors[name].dtype} values, because it {error.message}")
            )
    configuration = encoding.configuration(weights, [name for name in tensors if name not in weights])
    units = [
        {key: configuration.stored.get(key, part) for key, part in weights[name].stored.items()}
        if name in weights
        else {name: tensor}
        for name, tensor in tensors.items()
    ]
    _refuse_twice(units)
    expected = Model(tensors, model.metadata, losses=model.losses)
    return _Contents(units, [{}] * len(units), configuration, expected, losses)


def _check_plain(tensor: Tensor, layout: str) -> None:
    if tensor.dtype not in KINDS:
        raise Unsupported(
            f"is plain {tensor.dtype}, which only the layout packed can hold, and not {layout}: leave it out with "
            "--skip",
            tensor=tensor.name,
        )


def _dequantized_instead(tensor: Tensor, error: Unsupported, options: SafetensorsOptions) -> Tensor:
    if options.others == "refuse":
        raise Unsupported(
            f"cannot be held by the layout {options.layout}: it {error.message}. --opt others=dequantize writes such "
            "weights as floats, --quantize int4,block=128,requantize makes new codes",
            tensor=tensor.name,
        ) from error
    quantization = tensor.quantization
    dtype = FLOAT32 if quantization is None else quantization.compute_dtype
    return tensor.dequantized(dtype if dtype in _FLOATS else FLOAT32)


def _refuse_twice(units: Iterable[Mapping[str, Tensor]]) -> None:
    counted = Counter(key for unit in units for key in unit)
    for key, count in counted.items():
        if count > 1:
            raise Unsupported(
                "would be stored twice, as itself and as a part of a weight: leave one out with --skip", tensor=key
            )


def _shards(contents: _Contents, folder: Path, most: int) -> list[FileLayout]:
    parts = list(_cut(contents, most))
    found = []
    for number, (stored, description) in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        described = {METADATA_NAME: description_of(description)} if description else {}
        found.append(laid_out(folder / name, stored, {**contents.configuration.metadata, **described}, folder))
    return found


def _cut(contents: _Contents, most: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The files' tensors with their descriptions: as many as go into `most` bytes, at least one unit."""
    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    nbytes = 0
    for unit, description in zip(contents.units, contents.descriptions, strict=True):
        size = sum(tensor.nbytes for tensor in unit.values())
        if stored and nbytes + size > most:
            yield stored, described
            stored, described, nbytes = {}, {}, 0
        stored |= unit
        described |= description
        nbytes += size
    yield stored, described


def _written(model: Model, contents: _Contents, shards: Sequence[FileLayout], folder: Path) -> Iterator[Companion]:
    """The files that are made: the index, the configuration, and what the layout has beside."""
    if len(shards) > 1:
        weight_map = {key: shard.file.path.name for shard in shards for key in shard.keys}
        total = sum(shard.nbytes for shard in shards)
        yield json_companion(folder, _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = rewritten_config(model, contents.configuration.entries, _dtype_of_values(contents.expected))
    if config:
        yield json_companion(folder, CONFIG, config)
    for name, document in contents.configuration.files.items():
        yield json_companion(folder, name, document)


def _dtype_of_values(model: Model) -> str | None:
    """The dtype of a model that has floats only, and of most of these; None for others."""
    sizes: Counter[str] = Counter()
    for tensor in model.values():
        if tensor.quantization is not None:
            return None
        if tensor.dtype in _FLOATS:
            sizes[tensor.dtype.name] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else None
