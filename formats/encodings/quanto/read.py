"""optimum-quanto (0.2.7): `<module>.weight._data`, `.weight._scale`, `.weight._shift`.

    qint8, qfloat8    _data int8 or float8 in the weight's shape, _scale (O, 1, …)
                      weight = scale * code
    qint4, qint2      _data._data uint8: codes of a matrix in the fields of bytes, the first rows in the lowest field
                      _scale and _shift (rows, 1, …); a row of the matrix is a group, or one of the weight's own
                      weight = scale * code - shift; with shifts of integers scale * (code - shift)

Each operation is rounded to the dtype of the scales. Where a row of the weight has more than 128 elements, its groups
are of the first of 128, 96, 64 and 32 that divides it. The weight's own shape is then nowhere in the file: the bias has
as many elements as it has rows, or the architecture's config.json tells; of a convolution's other axes nothing does.

quanto's layers quantize along the first axis (nn/qmodule.py). quantize_weight can do so along the last one, with scales
(1, …, I): bytes are read so, packed codes are not, whose axis is told by nothing where they are in groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import UINT2, UINT4, is_float, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Loss, Quantization, Tensor, grid_shape, per_axis, per_tensor
from nibblecast.converters.storage import Computed
from nibblecast.formats.encodings.bytes.flat_blocks import flat_blocks
from nibblecast.formats.encodings.bytes.rows import fields
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors, is_size

METHODS = frozenset(("quanto",))

_PACKED = ".weight._data._data"
_PLAIN = ".weight._data"
_SCALE, _SHIFT = ".weight._scale", ".weight._shift"
_ACTIVATIONS = (".input_scale", ".output_scale")
_CODES: Mapping[int, np.dtype[Any]] = MappingProxyType({2: UINT2, 4: UINT4})
_NO_SHAPE = (
    "is read as a matrix, because its shape is not in the file: the weight of a convolution would have more axes"
)
_GROUP_SIZES = (128, 96, 64, 32)
_TYPES = ("qint2", "qint4", "qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")
#: The sizes of an architecture that say how many rows the layers of these names have (transformers' names).
_ROWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "q_proj": ("num_attention_heads", "head_dim"),
        "k_proj": ("num_key_value_heads", "head_dim"),
        "v_proj": ("num_key_value_heads", "head_dim"),
        "o_proj": ("hidden_size",),
        "out_proj": ("hidden_size",),
        "gate_proj": ("intermediate_size",),
        "up_proj": ("intermediate_size",),
        "down_proj": ("hidden_size",),
        "lm_head": ("vocab_size",),
    }
)


def claims(stored: WeightTensors) -> bool:
    """Whether there are scales beside the data."""
    return stored.get(_SCALE) is not None


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight in its own shape, or of two axes where nothing tells more. Raises CorruptFile where shapes, types and
    the configuration do not fit, Unsupported where nothing tells the number of rows."""
    scale, name = stored[_SCALE], f"{stored.prefix}.weight"
    if not is_float(scale.dtype) or scale.dtype.itemsize not in (2, 4):
        raise CorruptFile(f"has scales of {scale.dtype}: float16, bfloat16 or float32 are needed")
    type_ = _type(stored)
    made_of = (_PACKED, _PLAIN, _SCALE, _SHIFT, *(part for part in _ACTIVATIONS if _is_one(stored.get(part))))
    if stored.get(_PACKED) is None:
        return DecodedWeight(_bytes(stored, name, type_), made_of)
    return _packed(stored, name, type_, made_of)


def _type(stored: WeightTensors) -> str:
    """What the configuration says that the weight is; empty where it says nothing."""
    modules = stored.checkpoint.config.get("modules", {})
    module = modules.get(stored.prefix) if isinstance(modules, dict) else None
    if module is None:
        return ""
    type_ = module.get("weights") if isinstance(module, dict) else None
    if not isinstance(type_, str) or type_ not in _TYPES:
        raise CorruptFile(f"has weights of {brief(type_)} in its configuration: {', '.join(_TYPES)} are known")
    return str(type_)


def _is_one(tensor: Tensor | None) -> bool:
    """Whether it is the scale of activations that are not quantized."""
    return tensor is not None and tensor.size == 1 and is_float(tensor.dtype) and tensor.numpy().item() == 1


def _bytes(stored: WeightTensors, name: str, type_: str) -> Tensor:
    data, scale = stored[_PLAIN], stored[_SCALE]
    if data.dtype.itemsize != 1 or data.dtype == np.uint8 or not (data.dtype == np.int8 or is_float(data.dtype)):
        raise CorruptFile(f"has data of {data.dtype}: int8 or a float8 are needed")
    if type_ and (type_ == "qint8") != (data.dtype == np.int8):
        raise CorruptFile(f"has data of {data.dtype}, but is {type_} in its configuration")
    shape = data.shape
    axis = len(shape) - 1 if _is_along_last(scale) else 0
    block_shape = per_tensor(shape) if scale.size == 1 or not shape else per_axis(shape, axis)
    grid = grid_shape(shape, block_shape)
    if scale.size != prod(grid):
        raise CorruptFile(f"has {scale.size} scales for data of shape {shape}")
    quantization = Quantization(replace(scale, shape=grid), block_shape, compute_dtype=scale.dtype)
    return replace(data, name=name, quantization=quantization)


def _is_along_last(scale: Tensor) -> bool:
    """Whether there is a scale for each position of the last axis, and not of the first one."""
    return len(scale.shape) > 1 and scale.shape[-1] == scale.size > 1


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The matrix of codes: `shape` is the weight's, where rows are the weight's own."""

    rows: int
    columns: int
    shape: tuple[int, ...]


def _packed(stored: WeightTensors, name: str, type_: str, made_of: tuple[str, ...]) -> DecodedWeight:
    data, scale, shift = stored[_PACKED], stored[_SCALE], stored[_SHIFT]
    if data.dtype != np.uint8 or len(data.shape) < 2 or data.size == 0:
        raise CorruptFile(f"has codes of {data.dtype} and shape {data.shape}: a matrix of uint8 is needed")
    if shift.size != scale.size or not (is_float(shift.dtype) or is_integer(shift.dtype)):
        raise CorruptFile(f"has {shift.size} shifts of {shift.dtype} for {scale.size} scales")
    if _is_along_last(scale):
        raise Unsupported(
            f"has scales of shape {scale.shape}, along its last axis: quantize it along the first with quanto"
        )
    matrix = _Matrix(scale.size, prod(data.shape[1:]), (scale.size, *data.shape[1:]))
    bits = _bits(matrix, data.shape[0], type_)
    shape = _shape(stored, matrix)
    blocks = flat_blocks(shape, matrix.columns)
    offset, zero_point = None, None
    if is_float(shift.dtype):
        offset = blocks.spread(_negated(shift))
    else:
        zero_point = blocks.spread(replace(shift, shape=(shift.size,), name="zero_point"))
    quantization = Quantization(
        blocks.spread(replace(scale, shape=(scale.size,))),
        blocks.block_shape,
        zero_point,
        offset,
        compute_dtype=scale.dtype,
    )
    codes = fields(data, matrix.rows, bits, _CODES[bits], highest_first=False)
    losses = () if shape == matrix.shape or _is_linear(stored) else (Loss(name, "reinterpreted", _NO_SHAPE),)
    return DecodedWeight(Tensor(name, shape, _CODES[bits], codes, quantization), made_of, losses)


def _bits(matrix: _Matrix, packed_rows: int, type_: str) -> int:
    possible = [bits for bits in _CODES if -(-matrix.rows * bits // 8) == packed_rows]
    if type_:
        possible = [bits for bits in possible if type_ == f"qint{bits}"]
    if not possible:
        said = f" and {type_}" if type_ else ""
        raise CorruptFile(f"has {packed_rows} rows of codes for {matrix.rows} scales{said}")
    if len(possible) > 1:
        raise Unsupported(f"has codes of {' or '.join(map(str, possible))} bits: quanto_qmap.json beside it would tell")
    return possible[0]


def _shape(stored: WeightTensors, matrix: _Matrix) -> tuple[int, ...]:
    """The weight's shape; of two axes where its rows were taken apart to groups: nothing tells of more."""
    if matrix.columns not in _GROUP_SIZES or len(matrix.shape) > 2:
        return matrix.shape
    rows = _row_count(stored, matrix)
    return (rows, matrix.rows // rows * matrix.columns)


def _is_linear(stored: WeightTensors) -> bool:
    """Whether the layer's name is one of linear layers."""
    return stored.prefix.rpartition(".")[2] in _ROWS


def _row_count(stored: WeightTensors, matrix: _Matrix) -> int:
    """How many rows the weight has, that are made of groups as quanto makes them."""
    for rows in _told(stored):
        if rows == matrix.rows and matrix.columns <= _GROUP_SIZES[0]:
            return rows
        if 0 < rows < matrix.rows and matrix.rows % rows == 0:
            row = matrix.rows // rows * matrix.columns
            if next((size for size in _GROUP_SIZES if row % size == 0), 0) == matrix.columns:
                return rows
        raise CorruptFile(f"has {matrix.rows} groups of {matrix.columns}, which do not make {rows} rows")
    raise Unsupported(
        f"is {matrix.rows} groups of {matrix.columns} elements, and neither a bias nor config.json tells of how many "
        "rows: put the model's config.json beside it"
    )


def _told(stored: WeightTensors) -> list[int]:
    """The number of rows, as a bias or the architecture tells it; empty where none does."""
    bias = stored.get(".bias")
    if bias is not None:
        return [bias.size]
    architecture = stored.checkpoint.architecture
    sizes = [_size(architecture, key) for key in _ROWS.get(stored.prefix.rpartition(".")[2], ())]
    return [prod(sizes)] if sizes and all(sizes) else []


def _size(architecture: Mapping[str, Any], key: str) -> int:
    """A size of the architecture; 0 where it is not told."""
    if type(architecture.get(key)) is int:
        return _told_size(architecture, key)
    heads = _told_size(architecture, "num_attention_heads")
    if key == "num_key_value_heads":
        return heads
    return _told_size(architecture, "hidden_size") // heads if key == "head_dim" and heads else 0


def _told_size(architecture: Mapping[str, Any], key: str) -> int:
    value = architecture.get(key)
    return value if type(value) is int and is_size(value) and value > 0 else 0


def _negated(shift: Tensor) -> Tensor:
    """The floats with the other sign, shape (count,)."""
    itemsize = shift.dtype.itemsize
    sign = np.zeros(itemsize, np.uint8)
    sign[-1] = 0x80  # little-endian: the highest byte is the last one

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        return shift.data.read(start, stop) ^ np.resize(np.roll(sign, -(start % itemsize)), stop - start)

    return Tensor("offset", (shift.size,), shift.dtype, Computed(shift.nbytes, read, (shift.data,)))
