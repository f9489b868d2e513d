"""torchao's AffineQuantizedTensor (0.1 to 0.16) and the implementations of it that can be decoded.

    value = scale * (code - zero_point)              zero_point_domain INT, NONE without zero points
    value = scale * (code - middle) + zero_point     FLOAT, middle = (quant_min + quant_max + 1) / 2

Each operation is rounded to the weight's dtype (torchao 0.12, quant_primitives.py, _dequantize_affine_no_dtype_check
and _dequantize_affine_tinygemm_no_dtype_check). The implementation, `tensor_impl`, holds the codes in the layout of one
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT8_E4M3,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2,
    FLOAT8_E5M2FNUZ,
    INT4,
    INT8,
    INT32,
    SUB_BYTE,
    UINT4,
    UINT8,
    code_range,
    is_float,
    is_integer,
)
from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import Quantization, Tensor, grid_shape, per_tensor
from nibblecast.formats.encodings.bytes.rows import made_by_rows, transposed
from nibblecast.formats.encodings.bytes.widths import dtype_for, narrowed
from nibblecast.formats.encodings.torchao.inner_tensors import InnerTensors, WrappedTensor
from nibblecast.formats.encodings.torchao.layouts import SHARDS, as_dtype, for_cpu, for_tensor_cores, in_shards

_FLOAT8S = frozenset((FLOAT8_E4M3, FLOAT8_E4M3FNUZ, FLOAT8_E5M2, FLOAT8_E5M2FNUZ))

#: quant_primitives.py, ZeroPointDomain: a pickle has the value, JSON the name.
_DOMAINS: Mapping[Any, str] = MappingProxyType(
    {1: "INT", 2: "FLOAT", 3: "NONE"} | {n: n for n in ("INT", "FLOAT", "NONE")}
)

_OTHER_LAYOUT = "quantize the model again with a layout that is not bound to a kernel, or save its dequantized weights"


def affine(
    parts: InnerTensors, codes: Tensor, block_shape: tuple[int, ...], scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """The weight of `codes` with zero points among the codes: torchao's dequantize_affine."""
    grid = grid_shape(codes.shape, block_shape)
    scale = parts.parameter("scale", scale, grid)
    if zero_point is not None:
        zero_point = parts.parameter("zero_point", zero_point, grid)
        if is_float(zero_point.dtype) and zero_point.dtype != parts.compute_dtype:
            zero_point = as_dtype(zero_point, parts.compute_dtype)
    return replace(codes, quantization=Quantization(scale, block_shape, zero_point, compute_dtype=parts.compute_dtype))


def tinygemm(
    codes: Tensor, block_shape: tuple[int, ...], scale: Tensor, offset: Tensor | None, middle: int, compute_dtype: Any
) -> Tensor:
    """The weight of `codes` with zero points among the values."""
    zero_point = _constant("zero_point", middle, scale.shape, codes.dtype) if middle else None
    return replace(
        codes, quantization=Quantization(scale, block_shape, zero_point, offset, compute_dtype=compute_dtype)
    )


def float8(parts: InnerTensors, codes: Tensor, scale: Tensor, block_shape: tuple[int, ...]) -> Tensor:
    """The weight of float8 codes, which torchao computes in float32 whatever the weight's dtype."""
    if codes.dtype not in _FLOAT8S:
        raise parts.corrupt(f"has codes of {codes.dtype}, where a float8 is needed")
    scale = parts.parameter("scale", scale, grid_shape(codes.shape, block_shape))
    return Tensor(parts.name, codes.shape, codes.dtype, codes.data, Quantization(scale, block_shape))


def affine_quantized(parts: InnerTensors) -> Tensor:
    """AffineQuantizedTensor."""
    impl = parts.nested("tensor_impl", "layout_tensor")
    decode = _IMPLEMENTATIONS.get(impl.class_name)
    if decode is None:
        reason = _UNREADABLE.get(impl.class_name, "which is not known here")
        raise parts.unsupported(f"held in a {impl.class_name:.60}, {reason}: {_OTHER_LAYOUT}")
    return decode(parts, parts.of(impl))


def cpu_codes(parts: InnerTensors, packed: Tensor) -> Tensor:
    """The uint4 codes that PyTorch packs for its CPU kernels. Which instruction set they are packed for is not said:
    that is a loss."""
    height, columns = _matrix(parts)
    if packed.dtype != UINT8 or height % 2 or packed.nbytes * 2 != height * columns:
        raise parts.corrupt(
            f"has packed weights of shape {packed.shape} of {packed.dtype}, where {height} rows (an even number) of "
            f"{columns / 2:g} bytes are needed"
        )
    parts.lose(
        "reinterpreted",
        f"its bytes are read in the order of {parts.cpu}, because the file does not say which CPU packed them",
    )
    return for_cpu(parts.name, packed, parts.shape, parts.cpu)


def tensor_core_codes(parts: InnerTensors, packed: Tensor) -> Tensor:
    """The uint4 codes that PyTorch packs for tensor cores of NVIDIA's; for AMD's they lie otherwise in the same shape,
    which is a loss."""
    height, columns = _matrix(parts)
    fits = packed.dtype == INT32 and len(packed.shape) == 4 and packed.shape[2] == 32
    if not fits or packed.shape[0] * 8 < height or packed.shape[1] * packed.shape[3] * 32 < columns:
        raise parts.corrupt(
            f"has packed weights of shape {packed.shape} of {packed.dtype}, where ({-(-height // 8)}, "
            f"{columns} / 32 / n, 32, n) of int32 are needed, or more"
        )
    parts.lose(
        "reinterpreted",
        "its words are read in the order of NVIDIA's tensor cores: they are wrong if an AMD GPU packed it",
    )
    return for_tensor_cores(parts.name, packed, parts.shape)


def scale_and_zero(
    parts: InnerTensors, stored: Tensor, block_shape: tuple[int, ...], *, filled: bool
) -> tuple[Tensor, Tensor]:
    """Scales and offsets of shape (rows, groups), stored as (groups, rows, 2); `filled`: more may be stored."""
    height, groups = grid = grid_shape(parts.shape, block_shape)
    shape = stored.shape
    fits = len(shape) == 3 and shape[2] == 2 and shape[0] >= groups and shape[1] >= height
    if not fits or not (filled or shape[:2] == (groups, height)):
        raise parts.corrupt(f"has scale_and_zero of shape {shape}, where ({groups}, {height}, 2) is needed")
    return transposed("scale", stored, grid, 0), transposed("offset", stored, grid, 1)


def group_blocks(parts: InnerTensors) -> tuple[int, ...]:
    """The block shape, which must be groups along the last axis."""
    block_shape = parts.block_shape(parts.shape)
    if any(block != 1 for block in block_shape[:-1]):
        raise parts.corrupt(f"has the block_size {block_shape}, where groups along the last axis are needed")
    return block_shape


def bytes_of_pairs(parts: InnerTensors, packed: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Codes two in a byte, or eight in an int32, the first one in the low nibble, along the last axis."""
    per_element = 2 * packed.dtype.itemsize
    if packed.dtype not in (INT8, UINT8, INT32) or not parts.shape:
        raise parts.corrupt(f"has packed codes of {packed.dtype}")
    if packed.shape != (*parts.shape[:-1], parts.shape[-1] // per_element) or parts.shape[-1] % per_element:
        raise parts.corrupt(
            f"has packed codes of shape {packed.shape}, where {per_element} along the last axis of {parts.shape} "
            "share an element"
        )
    return Tensor(parts.name, parts.shape, dtype, packed.data)


def _plain(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    """PlainAQTTensorImpl, QDQTensorImpl and UintxAQTTensorImpl: codes one in an element or a UintxTensor."""
    stored = impl.get("int_data")
    codes = shards(parts, impl.of(stored)) if isinstance(stored, WrappedTensor) else impl.tensor("int_data")
    parts.fits("codes", codes, parts.shape)
    if not is_integer(codes.dtype):
        raise parts.corrupt(f"has codes of {codes.dtype}, where integers are needed")
    low, high = _range(parts, codes)
    dtype = dtype_for(low, high) if isinstance(stored, Tensor) else codes.dtype
    codes = Tensor(parts.name, parts.shape, dtype, narrowed(replace(codes, name=parts.name), dtype))
    return _weight(parts, codes, impl.tensor("scale"), impl.optional("zero_point"), low + high)


def _weight(parts: InnerTensors, codes: Tensor, scale: Tensor, zero_point: Tensor | None, ends: int) -> Tensor:
    """The weight, decoded as the domain of its zero points says; `ends` is quant_min + quant_max."""
    block_shape = parts.block_shape(parts.shape)
    domain = _DOMAINS.get(_plain_value(parts.get("zero_point_domain")))
    if domain is None:
        raise parts.corrupt(f"has the unknown zero_point_domain {brief(parts.get('zero_point_domain'))}")
    if domain != "FLOAT":
        return affine(parts, codes, block_shape, scale, zero_point if domain == "INT" else None)
    grid = grid_shape(parts.shape, block_shape)
    offset = None if zero_point is None else parts.parameter("zero_point", zero_point, grid)
    scale = parts.parameter("scale", scale, grid)
    if ends % 2 == 0:
        raise parts.unsupported("whose zero points are floats, for a range of codes without a middle: it is not known")
    return tinygemm(codes, block_shape, scale, offset, (ends + 1) // 2, parts.compute_dtype)


def shards(parts: InnerTensors, stored: InnerTensors) -> Tensor:
    """UintxTensor: the planes of bits that codes of 1 to 7 bits are split into (torchao 0.18, uintx_utils.py)."""
    bits = stored.get("bit_width")
    if type(bits) is not int or bits not in SHARDS:
        raise parts.corrupt(f"has codes of {brief(bits)} bits, where 1 to 7 are possible")
    shape, axis = stored.get("packed_shape"), stored.get("pack_dim")
    if shape != parts.shape or not shape:
        raise parts.corrupt(f"has codes of shape {brief(shape)}, where {parts.shape} is needed")
    if axis not in (-1, len(shape) - 1):
        raise parts.unsupported(f"packed along axis {brief(axis)}: only those packed along the last one are read")
    planes = []
    for width in SHARDS[bits]:
        plane = stored.tensor(f"int{width}_shard")
        if plane.dtype != UINT8 or shape[-1] % 8 or plane.shape != (*shape[:-1], shape[-1] * width // 8):
            raise parts.corrupt(
                f"has planes of shape {plane.shape} of {plane.dtype} for {width} of the bits of codes of shape {shape}"
            )
        planes.append(plane)
    return in_shards(parts.name, tuple(planes), shape, bits, dtype_for(0, (1 << bits) - 1))


def _int4_cpu(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    """Int4CPUAQTTensorImpl, and what TensorCoreTiledAQTTensorImpl was on CPUs before that was split off."""
    block_shape = group_blocks(parts)
    codes = cpu_codes(parts, impl.tensor("packed_weight"))
    scale, offset = scale_and_zero(parts, impl.tensor("scale_and_zero"), block_shape, filled=False)
    return tinygemm(codes, block_shape, scale, offset, 8, parts.compute_dtype)


def _tensor_core_tiled(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    packed = impl.tensor("packed_weight")
    if len(packed.shape) == 2:
        return _int4_cpu(parts, impl)
    block_shape = group_blocks(parts)
    codes = tensor_core_codes(parts, packed)
    scale, offset = scale_and_zero(parts, impl.tensor("scale_and_zero"), block_shape, filled=True)
    return tinygemm(codes, block_shape, scale, offset, 8, parts.compute_dtype)


def _int4_xpu(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    if impl.get("scale_and_zero") is not None:
        raise parts.unsupported(
            f"packed for Intel GPUs as torchao did before it had zero points there: {_OTHER_LAYOUT}"
        )
    block_shape = group_blocks(parts)
    codes = bytes_of_pairs(parts, impl.tensor("packed_weight"), UINT4)
    return affine(parts, codes, block_shape, *integer_zero_points(parts, impl, block_shape, "zero"))


def integer_zero_points(
    parts: InnerTensors, stored: InnerTensors, block_shape: tuple[int, ...], role: str
) -> tuple[Tensor, Tensor]:
    """Scales and integer zero points of shape (rows, groups), both stored transposed."""
    grid = grid_shape(parts.shape, block_shape)
    wanted = (*grid[:-2], grid[-1], grid[-2])
    scale = parts.fits("scale", stored.tensor("scale"), wanted)
    zero_point = parts.fits("zero_point", stored.tensor(role), wanted)
    if not is_integer(zero_point.dtype):
        raise parts.unsupported(f"with zero points of {zero_point.dtype}, as it is packed for NPUs: {_OTHER_LAYOUT}")
    return transposed("scale", scale, grid), transposed("zero_point", zero_point, grid)


def _cutlass_int4(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    """Int4PackedTensorImpl: symmetric, two codes in a byte."""
    codes = bytes_of_pairs(parts, impl.tensor("int_data"), INT4)
    return affine(parts, codes, parts.block_shape(parts.shape), impl.tensor("scale"), None)


def _float8(parts: InnerTensors, impl: InnerTensors) -> Tensor:
    codes = parts.fits("codes", impl.tensor("float8_data"), parts.shape)
    scale = impl.tensor("scale")
    one = prod(scale.shape) == 1
    return float8(parts, codes, scale, per_tensor(parts.shape) if one else parts.block_shape(parts.shape))


def _range(parts: InnerTensors, codes: Tensor) -> tuple[int, int]:
    """quant_min and quant_max; what the dtype of the codes holds where they are not given."""
    low, high = (_integral(parts, role) for role in ("quant_min", "quant_max"))
    lowest, highest = code_range(codes.dtype)
    low, high = lowest if low is None else low, highest if high is None else high
    try:
        dtype_for(low, high)
    except CorruptFile as error:
        raise parts.corrupt(error.message) from None
    return low, high


def _integral(parts: InnerTensors, role: str) -> int | None:
    value = parts.get(role)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and type(value) is not int:
        raise parts.corrupt(f"has the {role} {brief(value)}, where an integer is needed")
    return value


def _plain_value(value: Any) -> int | str | None:
    return value if type(value) in (int, str) else None


def _matrix(parts: InnerTensors) -> tuple[int, int]:
    if len(parts.shape) != 2:
        raise parts.unsupported(f"of shape {parts.shape}: only matrices are read. {_OTHER_LAYOUT}")
    return parts.shape[0], parts.shape[1]


def _constant(role: str, value: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """The same integer everywhere."""

    def rows(first: int, last: int) -> NDArray[Any]:
        element = np.int64(value).astype(np.uint8 if dtype in SUB_BYTE else dtype)
        return np.full((last - first, shape[-1]), element)

    return made_by_rows(role, shape, dtype, rows)


#: Decodes the weight of the first, whose `tensor_impl` the second is.
_Implementation = Callable[[InnerTensors, InnerTensors], Tensor]

_IMPLEMENTATIONS: Mapping[str, _Implementation] = MappingProxyType(
    {
        "PlainAQTTensorImpl": _plain,
        "PlainAQTLayout": _plain,  # as it was called up to 0.6
        "QDQTensorImpl": _plain,
        "UintxAQTTensorImpl": _plain,
        "Int4CPUAQTTensorImpl": _int4_cpu,
        "TensorCoreTiledAQTTensorImpl": _tensor_core_tiled,
        "TensorCoreTiledAQTLayout": _tensor_core_tiled,
        "Int4XPUAQTTensorImpl": _int4_xpu,
        "Int4PackedTensorImpl": _cutlass_int4,
        "Float8AQTTensorImpl": _float8,
    }
)

_UNREADABLE: Mapping[str, str] = MappingProxyType(
    {
        "MarlinSparseAQTTensorImpl": "packed for the Marlin kernels, with half of the weights left out",
        "MarlinQQQAQTTensorImpl": "packed for the Marlin kernels",
        "SemiSparseAQTTensorImpl": "compressed by cuSPARSELt",
        "BlockSparseAQTTensorImpl": "with whole blocks of weights left out",
        "CutlassSemiSparseTensorImpl": "compressed for CUTLASS",
        "GemliteAQTTensorImpl": "packed for gemlite",
        "FloatxTensorCoreAQTTensorImpl": "floats of 2 to 7 bits split for tensor cores",
        "DA8W4CPUAQTTensorImpl": "packed for one CPU kernel",
        "PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl": "packed for one CPU kernel",
    }
)
