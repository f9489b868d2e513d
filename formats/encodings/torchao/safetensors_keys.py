"""torchao's tensors in safetensors files: which stored tensors make one weight, told by the file's metadata.

    metadata["tensor_names"] = ["fc1.weight", "fc1.bias"]                          JSON, as all of it
    metadata["fc1.weight"] = {"_type": "Int8Tensor", "_data": {ATTRIBUTE: VALUE, ..},
                              "_tensor_data_names": ["qdata", ..]}
    metadata["fc1.bias"] = {"_type": "Tensor"}

The tensors of fc1.weight are stored as `fc1._weight_qdata` and so on (torchao 0.18, prototype/safetensors); in 0.14 as
`fc1.weight:qdata`, their names not listed, and plain ones as `fc1.bias:_data`. The metadata may be those of a whole
model (transformers), of which the file has a part: a tensor none of which is stored is in another file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.formats.encodings.torchao.read import Cpu, WrappedTensor, decoded

NAMES = "tensor_names"
_DEEPEST = 8
_PLAIN = ("Tensor", "Parameter")
_DATA = "_data"
_PACKED_FLOAT4 = "float4_e2m1fn_x2"


def describes(metadata: Mapping[str, str]) -> bool:
    """Whether it is torchao's: every tensor in `tensor_names` has an entry of its own, with a type."""
    names = _names(metadata)
    return bool(names) and all(name in metadata and '"_type"' in metadata[name] for name in names)


def together(of_files: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of several files as those of one; each file may list its own tensors, or the model's."""
    merged = {key: value for metadata in of_files for key, value in metadata.items()}
    names = dict.fromkeys(name for metadata in of_files for name in _names(metadata))
    return merged | ({NAMES: json.dumps(list(names))} if names else {})


def grouped(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], cpu: Cpu = "avx512"
) -> tuple[dict[str, Tensor], tuple[Loss, ...]]:
    """The weights that the metadata describes, and every stored tensor that is not part of one, in the order in which
    the first tensor of each is stored; and the losses. Raises CorruptFile where metadata and tensors contradict each
    other, Unsupported for types that cannot be decoded."""
    weights: dict[str, Tensor | WrappedTensor] = {}
    owner: dict[str, str] = {}
    for name, keys in _keys(tensors, metadata).items():
        for key in keys.values():
            if owner.setdefault(key, name) != name:
                raise CorruptFile(f"shares its '{key}' with '{owner[key]}': its metadata is damaged", tensor=name)
        if name in tensors and name not in keys.values():
            raise CorruptFile("is stored as it is and in parts: its metadata is damaged", tensor=name)
        weights[name] = _weight(name, _entry(name, metadata), {role: tensors[key] for role, key in keys.items()})
    found: dict[str, Tensor] = {}
    losses: list[Loss] = []
    for key, tensor in tensors.items():
        name = owner.get(key, key)
        weight = weights.get(name, tensor)
        if isinstance(weight, Tensor):
            found[name] = replace(weight, name=name)
        elif name not in found:
            found[name], lost = decoded(name, weight, cpu)
            losses.extend(lost)
    return found, tuple(losses)


def _keys(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The key of each of a tensor's parts by role, for all tensors that are stored here."""
    separated: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, colon, role = key.rpartition(":")
        if colon:
            separated.setdefault(name, {})[role] = key
    found: dict[str, dict[str, str]] = {}
    for name in _names(metadata):
        entry = _entry(name, metadata)
        if name in separated:
            found[name] = separated[name]
        elif entry["_type"] in _PLAIN:
            found |= {name: {_DATA: name}} if name in tensors else {}
        else:
            module, dot, parameter = name.rpartition(".")
            keys = {role: f"{module}{dot}_{parameter}_{role}" for role in _roles(name, entry)}
            missing = [key for key in keys.values() if key not in tensors]
            if missing and len(missing) < len(keys):
                raise CorruptFile(
                    f"has no '{missing[0]}', which its metadata promise: it may be in another file of the model",
                    tensor=name,
                )
            found |= {} if missing else {name: keys}
    return found


def _names(metadata: Mapping[str, str]) -> list[str]:
    """The names of the tensors, each once; none where that entry is no list of names."""
    try:
        names = json.loads(metadata.get(NAMES, "null"))
    except (ValueError, RecursionError):
        return []
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(dict.fromkeys(names)) if is_list else []


def _entry(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    entry = json_object(metadata.get(name, ""), "its metadata", tensor=name)
    if not isinstance(entry.get("_type"), str):
        raise CorruptFile("has damaged metadata: it must be a JSON object with a _type", tensor=name)
    return entry


def _roles(name: str, entry: Mapping[str, Any]) -> list[str]:
    roles = entry.get("_tensor_data_names")
    if not isinstance(roles, list) or not roles or not all(isinstance(role, str) for role in roles):
        raise CorruptFile("has metadata without _tensor_data_names: they are damaged", tensor=name)
    return roles


def _weight(name: str, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor | WrappedTensor:
    """What an entry describes, of the tensors that are its parts."""
    if entry["_type"] in _PLAIN:
        if set(parts) != {_DATA}:
            raise CorruptFile(f"is a plain tensor, but has the parts {', '.join(parts)}", tensor=name)
        return parts[_DATA]
    data = entry.get("_data")
    if not isinstance(data, dict):
        raise CorruptFile("has metadata without _data: they are damaged", tensor=name)
    attributes = {role: _value(value) for role, value in data.items()} | dict(parts)
    return WrappedTensor(entry["_type"], *_appearance(name, attributes), attributes)


def _value(value: Any, depth: int = 0) -> Any:
    """An attribute: dtypes and enumerations are {"_type": .., "_data": NAME}, other objects are not looked into."""
    if isinstance(value, dict):
        inner = value.get("_data")
        return inner if isinstance(inner, str) else str(value.get("_type"))
    if isinstance(value, list):
        return tuple(_value(item, depth + 1) for item in value) if depth < _DEEPEST else None
    return value


def _appearance(name: str, attributes: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """The shape and the dtype that the tensor shows, as each class's `__new__` finds them."""
    codes, scale = attributes.get("qdata"), attributes.get("scale")
    if not isinstance(codes, Tensor):
        raise CorruptFile("has no qdata: its metadata are damaged", tensor=name)
    shape = attributes.get("shape", codes.shape)
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise CorruptFile(f"has the shape {brief(shape)} in its metadata: they are damaged", tensor=name)
    shape = checked_shape(shape, tensor=name)
    is_float4 = "orig_dtype" in attributes and attributes.get("elem_dtype", _PACKED_FLOAT4) == _PACKED_FLOAT4
    if is_float4 and codes.dtype == np.uint8 and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    shown = scale.dtype.name if isinstance(scale, Tensor) else "bfloat16"  # Int4TilePackedTo4dTensor has no other
    dtype = attributes.get("dtype") or attributes.get("orig_dtype") or shown
    return shape, str(dtype)
