"""bitsandbytes' NF4 and FP4 (0.50): a parameter `<name>` and, beginning with its name, what it is decoded with.

    <name>                     bytes of two codes, the first one in the high nibble, over the flattened weight; as uint8
                               or as another dtype of the same bytes (quant_storage)
    .absmax                    float32: the scale of each `blocksize` elements of the flattened weight, across rows
    .quant_map                 float32 (16): what the codes mean
    .quant_state.bitsandbytes__nf4 or __fp4      JSON as uint8: quant_type, blocksize, dtype, shape

    weight = quant_map[code] * absmax, in float32, rounded to `dtype`

With double quantization absmax is uint8, and the scale is nested_quant_map[absmax] * .nested_absmax + nested_offset, of
nested_blocksize scales each. The CPU kernel of 0.50.2 begins a block with each row where these do not end together;
what it gives is not what was quantized, and not what CUDA gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32, UINT4
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import Loss, Quantization, Tensor
from nibblecast.formats.encodings.bytes.flat_blocks import FlatBlocks, flat_blocks
from nibblecast.formats.encodings.bytes.rows import swapped_nibbles
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.values.parameters import value_dtype

METHODS = frozenset(("bitsandbytes", "bitsandbytes_4bit"))

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_NESTED = (".nested_absmax", ".nested_quant_map")
_PARTS = ("", ".absmax", ".quant_map", *_NESTED, *(_STATE + type_ for type_ in _TYPES))
_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "float16": FLOAT16,
        "bfloat16": BFLOAT16,
        "float32": FLOAT32,
    }
)
_MOST_STATE_BYTES = 1 << 16
_MOST = 1 << 48


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON says; `nested_blocksize` is 0 without double quantization."""

    type: str
    blocksize: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def claims(stored: WeightTensors) -> bool:
    """Whether the parameter itself is there."""
    return stored.get("") is not None


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight in its own shape, its codes uint4. Raises CorruptFile where sizes, JSON or configuration
    do not fit."""
    state = _state(stored)
    _check_configuration(stored, state)
    packed, count = stored[""], prod(state.shape)
    spare = packed.nbytes - packed_size(count, 4)
    if not 0 <= spare < packed.dtype.itemsize:
        raise CorruptFile(f"has {packed.nbytes} bytes of codes for shape {state.shape}")
    blocks = flat_blocks(state.shape, state.blocksize)
    codebook = _table(stored, ".quant_map", 16)
    quantization = Quantization(
        blocks.spread(_absmax(stored, state)),
        blocks.block_shape,
        codebook=codebook,
        value_dtype=value_dtype(state.dtype),
    )
    tensor = Tensor(stored.name, state.shape, UINT4, swapped_nibbles(packed.data, count), quantization)
    return DecodedWeight(tensor, _PARTS, _losses(stored.name, state, blocks))


def _losses(name: str, state: _State, blocks: FlatBlocks) -> tuple[Loss, ...]:
    repeats = blocks.repeats
    if state.nested_blocksize:
        repeats = max(repeats, blocks.nested(state.nested_blocksize).repeats)
    if repeats == 1:
        return ()
    detail = (
        f"blocks of {state.blocksize} cross the rows of {state.shape}, so scales are repeated up to {repeats} times"
    )
    return (Loss(name, "expanded", detail),)


def _absmax(stored: WeightTensors, state: _State) -> Tensor:
    """The scales, shape (blocks,), quantized themselves with double quantization."""
    absmax = _flat(stored[".absmax"])
    nested = [stored.get(part) is not None for part in _NESTED]
    if any(nested) != (absmax.dtype == np.uint8) or any(nested) != bool(state.nested_blocksize):
        raise CorruptFile(f"has absmax of {absmax.dtype} {'with' if any(nested) else 'without'} nested scales")
    if not any(nested):
        if absmax.dtype != np.float32:
            raise CorruptFile(f"has absmax of {absmax.dtype}: float32 is needed")
        return absmax
    scale = _flat(stored[".nested_absmax"])
    if scale.dtype != np.float32:
        raise CorruptFile(f"has nested_absmax of {scale.dtype}: float32 is needed")
    codebook = _table(stored, ".nested_quant_map", 256)
    with np.errstate(over="ignore"):
        offset = Tensor.from_array("nested_offset", np.full(scale.shape, state.nested_offset, np.float32))
    if -(-absmax.size // state.nested_blocksize) != scale.size:
        raise CorruptFile(f"has {scale.size} nested scales for {absmax.size} in blocks of {state.nested_blocksize}")
    return replace(absmax, quantization=Quantization(scale, (state.nested_blocksize,), None, offset, codebook))


def _flat(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=(tensor.size,))


def _table(stored: WeightTensors, part: str, entries: int) -> Tensor:
    table = _flat(stored[part])
    if table.dtype != np.float32 or table.size != entries:
        raise CorruptFile(f"has {part[1:]} of {table.size} {table.dtype}: {entries} of float32 are needed")
    return table


def _state(stored: WeightTensors) -> _State:
    found = [(type_, stored.get(_STATE + type_)) for type_ in _TYPES]
    states = [(type_, tensor) for type_, tensor in found if tensor is not None]
    if len(states) != 1:
        raise CorruptFile("has a quant_state of nf4 and one of fp4")
    type_, tensor = states[0]
    if tensor.dtype.itemsize != 1 or tensor.size > _MOST_STATE_BYTES:
        raise CorruptFile(f"has a quant_state of {tensor.size} {tensor.dtype}: bytes of JSON are needed")
    document = json_object(tensor.packed().tobytes(), "its quant_state")
    if document.get("quant_type") != type_:
        raise CorruptFile(f"has a quant_state of {type_} that says otherwise: {brief(document.get('quant_type'))}")
    return _of_document(type_, document)


def _of_document(type_: str, document: Mapping[str, Any]) -> _State:
    dtype, shape = document.get("dtype"), document.get("shape")
    sizes = shape if isinstance(shape, list) else [0]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise CorruptFile(f"has the shape {brief(shape)} in its quant_state")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CorruptFile(f"has the dtype {brief(dtype)} in its quant_state: {', '.join(_DTYPES)} are possible")
    nested = "nested_blocksize" in document
    nested_blocksize = _blocksize(document, "nested_blocksize") if nested else 0
    offset = document.get("nested_offset", 0.0)
    if type(offset) is not float:
        raise CorruptFile(f"has the nested_offset {brief(offset)} in its quant_state: a number is needed")
    blocksize = _blocksize(document, "blocksize")
    return _State(type_, blocksize, _DTYPES[dtype], checked_shape(sizes), nested_blocksize, offset)


def _blocksize(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or not 0 < value < _MOST:
        raise CorruptFile(f"has the {key} {brief(value)} in its quant_state: a positive number is needed")
    return value


def _check_configuration(stored: WeightTensors, state: _State) -> None:
    """Raises CorruptFile where the configuration, if there is one, is of something else."""
    if not stored.checkpoint.config:
        return
    for key, wanted in (
        ("load_in_4bit", True),
        ("bnb_4bit_quant_type", state.type),
        ("bnb_4bit_use_double_quant", bool(state.nested_blocksize)),
    ):
        told = stored.setting(key, type(wanted), wanted)
        if told != wanted:
            raise CorruptFile(f"has {key} {brief(told)} in its configuration, but its tensors say {brief(wanted)}")
