"""The layout `packed`: how the IR lies in a safetensors file, described by JSON in `__metadata__["nibblecast"]`.

    {"version": 1, "tensors": {NAME: TENSOR, ...}}
    TENSOR = {"data": KEY, "dtype": "int4", "shape": [..], "quantization": QUANTIZATION, "uses": [USE, ..],
              "parameter_of": NAME}
    USE = [OPERATOR, INPUT, AXIS] or [OPERATOR, INPUT, AXIS, ACTIVATION, RESULT], these two being null or
          ["int8", SHAPE, SCALE, ZERO_POINT]
    QUANTIZATION = {"block_shape": [..], "scale": TENSOR, "zero_point": TENSOR, "offset": TENSOR, "codebook": TENSOR,
                    "group_index": TENSOR, "group_axis": N, "compute_dtype": "bfloat16", "value_dtype": "float16",
                    "factor": X}

KEY is the key of the stored bytes. Dtypes that the container lacks (int4, int2, …) are stored as U8 of shape [bytes] in
the IR's canonical order: row-major, low bits first. Everything optional is absent when there is none. A scale may have
a quantization of its own. docs/safetensors.md has a reader of it in ten lines of NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import COMPLEX128, SUB_BYTE, in_range
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import GroupIndex, Model, Quantization, Tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.converters.names import UniqueNames, is_unicode
from nibblecast.formats.encodings.bytes import float6
from nibblecast.formats.safetensors.container import DTYPES, METADATA_KEY, StoredTensor
from nibblecast.formats.safetensors.file_layout import KINDS

METADATA_NAME = "nibblecast"
VERSION = 1

#: What the layout holds: the container's dtypes, and others whose canonical bytes are stored as U8.
DTYPES_BY_NAME: Mapping[str, np.dtype[Any]] = {
    dtype.name: dtype for dtype in (*DTYPES.values(), *SUB_BYTE, *float6.BY_NAME.values(), COMPLEX128)
}
#: Scales are quantized once more in some formats, and their scales in none.
_DEEPEST = 8
_LONGEST_REASON = 200
_MOST_INPUTS = 1 << 31
_USE_ITEMS = 6
_PARAMETERS = ("scale", "zero_point", "offset", "codebook")

#: Chooses the key under which a tensor's bytes are stored, given the tensor and the key it should preferably have.
StoreUnder = Callable[[Tensor, str], str]


class PackedKeys:
    """Gives every stored tensor its key: the model's tensors their names, parameters `NAME.scale` and so on, and one
    that is a tensor of the model as well (TFLite's blockwise scales) no second copy. A name that is not Unicode is
    none, and only the description has it."""

    def __init__(self, model: Model) -> None:
        #: What is stored for each of the model's tensors, by key.
        self.stored: dict[str, dict[str, Tensor]] = {name: {} for name in model}
        self._model = model
        self._names = {id(tensor): name for name, tensor in model.items()}
        self._free = UniqueNames([*model, METADATA_KEY], separator=":")
        self._keys: dict[str, str] = {}
        self.descriptions = {name: self._described(name, tensor) for name, tensor in model.items()}

    @property
    def all_stored(self) -> dict[str, Tensor]:
        """All that is stored, by key."""
        return {key: tensor for of_one in self.stored.values() for key, tensor in of_one.items()}

    @property
    def say_nothing(self) -> bool:
        """Whether the descriptions tell nothing that the container does not: plain tensors of its own dtypes."""
        return all(
            tensor.dtype in KINDS
            and self.descriptions[name] == {"data": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            for name, tensor in self._model.items()
        )

    def _described(self, name: str, tensor: Tensor) -> dict[str, Any]:
        return described(tensor, name, lambda stored, wish: self._key_of(name, stored, wish))

    def _key_of(self, owner: str, tensor: Tensor, wish: str) -> str:
        name = self._names.get(id(tensor))
        if name is not None:
            if name in self._keys:
                return self._keys[name]
            owner = wish = name
        if name is not None and name != METADATA_KEY and is_unicode(name):
            key = name
        else:
            key = self._free.fresh(wish.encode(errors="backslashreplace").decode())
        self.stored[owner][key] = tensor
        if name is not None:
            self._keys[name] = key
        return key


def described(tensor: Tensor, name: str, store: StoreUnder) -> dict[str, Any]:
    """TENSOR for a tensor; `store` is called for it and every parameter with bytes to store."""
    description: dict[str, Any] = {
        "data": store(tensor, name),
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
    }
    quantization = tensor.quantization
    if quantization is not None:
        description["quantization"] = {"block_shape": list(quantization.block_shape)} | {
            role: described(parameter, f"{name}.{role}", store) for role, parameter in quantization.parameters()
        }
        if quantization.group_index is not None:
            description["quantization"]["group_axis"] = quantization.group_index.axis
        if quantization.compute_dtype != np.float32:
            description["quantization"]["compute_dtype"] = quantization.compute_dtype.name
        if quantization.value_dtype is not None:
            description["quantization"]["value_dtype"] = quantization.value_dtype.name
        if quantization.factor != 1:
            description["quantization"]["factor"] = quantization.factor
    if tensor.uses:
        description["uses"] = [_described_use(use) for use in tensor.uses]
    if tensor.parameter_of is not None:
        description["parameter_of"] = tensor.parameter_of
    return description


def description_of(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """The JSON of `described` tensors. Names that are not Unicode are in it as JSON's escapes: the container's own
    library takes no header with them, but this is text to it."""
    document = {"version": VERSION, "tensors": tensors}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text if is_unicode(text) else json.dumps(document, separators=(",", ":"))


def merged(descriptions: Iterable[str]) -> str:
    """The description of several files together, none of whose names may be in two. Raises CorruptFile."""
    tensors: dict[str, Any] = {}
    for description in descriptions:
        try:
            document = json.loads(description)
            if document["version"] != VERSION:
                return description  # `build` refuses it
            twice = tensors.keys() & document["tensors"].keys()
            tensors |= document["tensors"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:_LONGEST_REASON]}"
            raise CorruptFile(f"its nibblecast metadata is damaged ({reason})") from error
        if twice:
            raise CorruptFile("is described in two files", tensor=min(twice))
    return description_of(tensors)


def build(description: str, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors that a description promises, from what is stored. Raises CorruptFile when it is damaged or
    contradicts what is stored, Unsupported when it is of a later version."""
    try:
        document = json.loads(description)
        if document["version"] != VERSION:
            version = brief(document["version"])
            raise Unsupported(f"its nibblecast metadata is of version {version}; this one reads {VERSION}")
        models: dict[str, Tensor] = {}
        by_key: dict[str, Tensor] = {}
        promised = document["tensors"]
        # parameters that are tensors of their own come first, so that their owners share the very object
        for name in sorted(promised, key=lambda name: "parameter_of" not in promised[name]):
            models[name] = by_key[promised[name]["data"]] = _built(name, promised[name], stored, by_key)
        return {name: models[name] for name in promised}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:_LONGEST_REASON]}"
        raise CorruptFile(f"its nibblecast metadata is damaged ({reason}): convert the source again") from error


def _built(
    name: str,
    description: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    by_key: Mapping[str, Tensor],
    depth: int = 0,
) -> Tensor:
    if depth > _DEEPEST:
        raise ValueError(f"scales of scales are nested more than {_DEEPEST} deep")
    key = description["data"]
    shape = checked_shape([_count(size) for size in description["shape"]], tensor=name)
    dtype = DTYPES_BY_NAME[description["dtype"]]
    shared = by_key.get(key)
    if shared is not None and shared.parameter_of and (shared.shape, shared.dtype) == (shape, dtype) and key != name:
        return shared
    if key not in stored:
        raise CorruptFile(f"its nibblecast metadata refers to '{key}', which is not stored", tensor=name)
    quantization = None
    if "quantization" in description:
        quantization = _built_quantization(name, description["quantization"], stored, by_key, depth + 1)
    uses = tuple(_built_use(use) for use in description.get("uses", ()))
    owner = description.get("parameter_of")
    if owner is not None and not isinstance(owner, str):
        raise ValueError(f"{brief(owner)} is not a name")
    return Tensor(name, shape, dtype, stored[key].data, quantization, uses, owner)


def _described_use(use: Use) -> list[Any]:
    described: list[Any] = [use.operator, use.input, use.channel_axis]
    if use.activation is not None or use.result is not None or use.sum_axes is not None:
        described += [_described_activation(use.activation), _described_activation(use.result)]
    return described if use.sum_axes is None else [*described, list(use.sum_axes)]


def _built_use(described: list[Any]) -> Use:
    operator, position, axis, *more = described
    activation, result, sums = [*more, None, None, None][:3]
    axes = (axis, *(sums or ()))
    if (
        not isinstance(operator, str)
        or not all(each is None or type(each) is int for each in axes)
        or _count(position) >= _MOST_INPUTS
        or len(described) > _USE_ITEMS
    ):
        raise ValueError(f"{brief(described)} is not a use of a tensor")
    sum_axes = None if sums is None else tuple(sums)
    return Use(operator, position, axis, _built_activation(activation), _built_activation(result), sum_axes)


def _described_activation(activation: Activation | None) -> list[Any] | None:
    if activation is None:
        return None
    return [activation.dtype.name, list(activation.shape), activation.scale, activation.zero_point]


def _built_activation(described: list[Any] | None) -> Activation | None:
    if described is None:
        return None
    name, shape, scale, zero_point = described
    dtype = DTYPES_BY_NAME[name]
    if dtype.kind not in "iu" or type(zero_point) is not int or not in_range(zero_point, dtype):
        raise ValueError(f"{brief(zero_point)} is not a zero point of {dtype}")
    return Activation(dtype, checked_shape([_count(size) for size in shape]), float(scale), zero_point)


def _built_quantization(
    name: str,
    description: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    by_key: Mapping[str, Tensor],
    depth: int,
) -> Quantization:
    parameters = {
        role: _built(f"{name}.{role}", description[role], stored, by_key, depth)
        for role in _PARAMETERS
        if role in description
    }
    group_index = None
    if "group_index" in description:
        index = _built(f"{name}.group_index", description["group_index"], stored, by_key, depth)
        group_index = GroupIndex(_count(description["group_axis"]), index)
    block_shape = tuple(_count(size) for size in description["block_shape"])
    return Quantization(
        scale=parameters["scale"],
        block_shape=block_shape,
        zero_point=parameters.get("zero_point"),
        offset=parameters.get("offset"),
        codebook=parameters.get("codebook"),
        group_index=group_index,
        compute_dtype=DTYPES_BY_NAME[description.get("compute_dtype", "float32")],
        factor=float(description.get("factor", 1)),
        value_dtype=DTYPES_BY_NAME[description["value_dtype"]] if "value_dtype" in description else None,
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{brief(value)} is not a count")
    return value
