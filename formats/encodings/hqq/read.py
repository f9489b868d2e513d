"""HQQ (0.2.8): `<module>.W_q`, `.scale`, `.zero`, and what tells how to decode them.

    W_q      codes of a matrix of groups in the fields of words, the first rows in the highest field ("packing")
    scale    float, one for each group; zero likewise, and no integer as a rule
    shape, nbits, group_size, axis, packing, view_as_float, compute_dtype, …

    weight = ((code - zero) * scale).reshape(shape), each operation rounded to compute_dtype

A row of the matrix is a group with axis 1, a column with axis 0. The settings are tensors (texts as uint8, one for each
character) in state dicts for safetensors, else Python's own objects; with `meta` before their names in the first
versions, which could also quantize scale and zero themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32, UINT2, UINT4, UINT8, UINT32, is_float
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import Loss, Quantization, Tensor
from nibblecast.formats.encodings.bytes.flat_blocks import Cycle, FlatBlocks, cycle, flat_blocks
from nibblecast.formats.encodings.bytes.rows import fields
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors

METHODS = frozenset(("hqq",))

_SETTINGS = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
_PARTS = (".W_q", *(f"{meta}.{name}" for meta in ("", ".meta") for name in ("scale", "zero", "zero_scale", *_SETTINGS)))
#: What the first versions have instead of scale and zero when they quantize these.
_NESTED = ("zero_q", "scale_q", "meta_zero.nbits", "meta_scale.nbits")
_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "torch.float16": FLOAT16,
        "torch.bfloat16": BFLOAT16,
        "torch.float32": FLOAT32,
    }
)
_MOST_TEXT = 64


@dataclass(frozen=True, slots=True)
class _Packing:
    """Fields of `bits` bits in words of `word`; the codes' dtype."""

    word: np.dtype[Any]
    bits: int
    dtype: np.dtype[Any]

    @property
    def per_word(self) -> int:
        return self.word.itemsize * 8 // self.bits


_PACKINGS: Mapping[str, _Packing] = MappingProxyType(
    {
        "8bit_u8": _Packing(UINT8, 8, UINT8),
        "4bit_u8": _Packing(UINT8, 4, UINT4),
        "3bit_32": _Packing(UINT32, 3, UINT4),
        "2bit_u8": _Packing(UINT8, 2, UINT2),
        "1bit_u8": _Packing(UINT8, 1, UINT2),
    }
)


def claims(stored: WeightTensors) -> bool:
    """Always: nothing else is called W_q."""
    return bool(stored.prefix)


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight in its own shape, its codes unsigned. Raises Unsupported for scales that are quantized themselves,
    CorruptFile where settings and shapes do not fit."""
    for name in _NESTED:
        if _setting(stored, name) is not None or _meta(stored, name) is not None:
            raise Unsupported(f"has '{name}': its scales are quantized themselves; quantize it again with HQQ 0.2")
    shape, packing, axis = _shape(stored), _packing(stored), _number(stored, "axis")
    words, name = stored[".W_q"], f"{stored.prefix}.weight"
    packed_rows = words.shape[0] if words.shape else 0
    columns, rest = divmod(words.nbytes, max(1, packed_rows) * packing.word.itemsize)
    rows = prod(shape) // max(1, columns)
    if rest or rows * columns != prod(shape) or -(-rows // packing.per_word) != packed_rows:
        raise CorruptFile(f"has W_q of shape {words.shape} and {words.dtype} for a weight of shape {shape}")
    words = replace(words, shape=(packed_rows, columns), dtype=packing.word)
    data = fields(words, rows, packing.bits, packing.dtype, highest_first=True)
    scale, zero = _parameters(stored)
    dtype = _compute_dtype(stored)
    grid: FlatBlocks | Cycle
    if scale.size == 1:
        grid = flat_blocks(shape, prod(shape))
    elif axis == 1:
        grid = flat_blocks(shape, columns)
    elif axis == 0:
        grid = cycle(shape, columns)
    else:
        raise CorruptFile(f"has the axis {axis}: 0 and 1 are possible")
    _check_group_size(stored, axis, (rows, columns), scale)
    quantization = Quantization(
        grid.spread(_as(dtype, "scale", scale)),
        grid.block_shape,
        grid.spread(_as(dtype, "zero_point", zero)),
        group_index=grid.index,
        compute_dtype=dtype,
    )
    losses = () if not grid.is_expanded else (_expanded(name, shape, (rows, columns), axis),)
    return DecodedWeight(Tensor(name, shape, packing.dtype, data, quantization), _PARTS, losses)


def _expanded(name: str, shape: tuple[int, ...], matrix: tuple[int, int], axis: int) -> Loss:
    groups = f"groups along axis {axis} of a matrix {matrix}"
    return Loss(name, "expanded", f"{groups} do not divide the shape {shape} into blocks, so scales are repeated")


def _as(dtype: np.dtype[Any], name: str, parameter: Tensor) -> Tensor:
    """A parameter as it is computed with: HQQ casts them to compute_dtype when it loads them."""
    if parameter.dtype == dtype:
        return replace(parameter, name=name, shape=(parameter.size,))
    with np.errstate(over="ignore", invalid="ignore"):  # what the narrower dtype cannot hold; signalling NaNs
        return Tensor.from_array(name, parameter.numpy().reshape(-1).astype(dtype))


def _parameters(stored: WeightTensors) -> tuple[Tensor, Tensor]:
    """Scale and zero; they are one tensor where they were to be kept apart from the weight (offload_meta)."""
    both = _meta(stored, "zero_scale")
    if both is not None:
        if len(both.shape) < 2 or both.shape[0] != 2:
            raise CorruptFile(f"has zero_scale of shape {both.shape}: two of the same shape are needed")
        zero, scale = (replace(part, shape=part.shape[1:]) for part in (both.rows(0, 1), both.rows(1, 2)))
    else:
        scale, zero = (_tensor(stored, name) for name in ("scale", "zero"))
    if not is_float(scale.dtype) or not is_float(zero.dtype):
        raise CorruptFile(f"has scale of {scale.dtype} and zero of {zero.dtype}: floats are needed")
    return scale, zero


def _check_group_size(stored: WeightTensors, axis: int, matrix: tuple[int, int], scale: Tensor) -> None:
    """Raises CorruptFile where the matrix has not the groups that the settings tell."""
    told = _setting(stored, "group_size")
    seen = matrix[axis]
    if told is not None and scale.size != 1 and told != seen:
        raise CorruptFile(f"has groups of {seen}, but group_size {brief(told)}")


def _meta(stored: WeightTensors, name: str) -> Tensor | None:
    return stored.get(f".{name}") or stored.get(f".meta.{name}")


def _tensor(stored: WeightTensors, name: str) -> Tensor:
    found = _meta(stored, name)
    if found is None:
        raise CorruptFile(f"has no '{stored.prefix}.{name}', without which it cannot be decoded")
    return found


def _setting(stored: WeightTensors, name: str) -> Any:
    """A setting as a number, a text or a tuple of numbers; None where there is none."""
    for key in (f"{stored.prefix}.{name}", f"{stored.prefix}.meta.{name}"):
        if key in stored.checkpoint.values:
            return stored.checkpoint.values[key]
    tensor = _meta(stored, name)
    if tensor is None:
        return None
    if tensor.size > _MOST_TEXT or tensor.dtype.kind not in "iufb":
        raise CorruptFile(f"has '{name}' of {tensor.size} {tensor.dtype}, where a setting is needed")
    if not tensor.shape:
        return tensor.numpy().item()
    if tensor.dtype == np.uint8:
        return tensor.numpy().tobytes().decode("latin-1")
    return tuple(tensor.numpy().reshape(-1).tolist())


def _number(stored: WeightTensors, name: str) -> int:
    value = _setting(stored, name)
    if type(value) is not int:
        raise CorruptFile(f"has {name} {brief(value)}: a number is needed")
    return value


def _shape(stored: WeightTensors) -> tuple[int, ...]:
    shape = _setting(stored, "shape")
    if not isinstance(shape, tuple) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise CorruptFile(f"has the shape {brief(shape)}: positive numbers are needed")
    return checked_shape(shape)


def _packing(stored: WeightTensors) -> _Packing:
    name, bits = _setting(stored, "packing"), _setting(stored, "nbits")
    packing = _PACKINGS.get(name) if isinstance(name, str) else None
    if packing is None:
        raise Unsupported(f"has the packing {brief(name)}: {', '.join(_PACKINGS)} are read")
    if not isinstance(bits, int | float) or not 0 < bits <= packing.bits:
        raise CorruptFile(f"has nbits {brief(bits)}, but the packing '{name}'")
    return packing


def _compute_dtype(stored: WeightTensors) -> np.dtype[Any]:
    name = _setting(stored, "compute_dtype") or "torch.float16"
    if not isinstance(name, str) or name not in _DTYPES:
        raise CorruptFile(f"has compute_dtype {brief(name)}: {', '.join(_DTYPES)} are possible")
    return _DTYPES[name]
