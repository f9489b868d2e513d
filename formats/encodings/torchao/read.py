"""torchao's tensors: what each class's attributes mean, without torchao.

Formats: torchao 0.18 and, for AffineQuantizedTensor and what wraps it, 0.12; each function below names its class. Codes
keep their numbers, parameters their dtypes; a weight has the shape [out, in] of the float model, whatever its layout.
Arithmetic is that of each class's `dequantize`; where there is none (Int4Tensor, Int4TilePackedTo4dTensor,
Int4OpaqueTensor) that of its kernel, a multiplication and an addition that are mostly rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT4,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E8M0,
    FLOAT32,
    FLOAT64,
    INT4,
    INT8,
    UINT4,
    UINT8,
    integer_range,
)
from nibblecast.converters.errors import brief, located
from nibblecast.converters.ir import Loss, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.rows import made_by_rows, swapped_nibbles, transposed
from nibblecast.formats.encodings.bytes.widths import dtype_for, narrowed
from nibblecast.formats.encodings.torchao.affine import (
    affine,
    affine_quantized,
    bytes_of_pairs,
    cpu_codes,
    float8,
    group_blocks,
    integer_zero_points,
    scale_and_zero,
    shards,
    tensor_core_codes,
    tinygemm,
)
from nibblecast.formats.encodings.torchao.inner_tensors import Cpu, InnerTensors, WrappedTensor
from nibblecast.formats.encodings.torchao.layouts import as_dtype, swizzled_size, unswizzled
from nibblecast.formats.encodings.values.parameters import value_dtype

__all__ = ["Cpu", "WrappedTensor", "decoded", "dynamic_activation_linear"]

_FLOAT6S = {"fp6_e2m3": FLOAT6_E2M3, "fp6_e3m2": FLOAT6_E3M2}
_INTX_DTYPES = MappingProxyType({f"int{bits}": dtype_for(*integer_range(bits, signed=True)) for bits in range(1, 9)})


def decoded(name: str, wrapped: WrappedTensor, cpu: Cpu = "avx512") -> tuple[Tensor, tuple[Loss, ...]]:
    """The weight that `wrapped` holds, as the tensor `name`, and what of it is assumed or lost.

    `cpu` is the instruction set of the machine that packed int4 weights for its CPU, which the file does not tell.
    Raises CorruptFile where the attributes contradict the class, Unsupported for classes that are not known, and for
    layouts of kernels that are not documented.
    """
    parts = InnerTensors(name, wrapped, cpu, [])
    decode = _CLASSES.get(wrapped.class_name)
    if decode is None:
        reason = _UNREADABLE.get(wrapped.class_name, "which is not known here")
        raise parts.unsupported(f"{reason}: {_DEQUANTIZE}")
    with located(tensor=name, over=True):
        return decode(parts), tuple(parts.losses)


def dynamic_activation_linear(name: str, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weight of Int8DynActInt4WeightLinear, a module whose state is `weight` int8 [out, in], `scales` and `zeros`
    [out, groups]: int4 codes one in a byte (torchao 0.12, quantization/GPTQ). Raises CorruptFile where they do not
    fit."""
    attributes = {"weight": weight, "scales": scales, "zeros": zeros}
    parts = InnerTensors(
        name, WrappedTensor("Int8DynActInt4WeightLinear", weight.shape, "float32", attributes), "avx512", []
    )
    if weight.dtype != INT8 or len(weight.shape) != 2 or len(scales.shape) != 2:
        raise parts.corrupt(f"has weights of {weight.dtype} and shape {weight.shape}: a matrix of int8 is needed")
    group = _even_split(parts, weight.shape[1], scales.shape[1])
    codes = Tensor(name, weight.shape, INT4, narrowed(replace(weight, name=name), INT4))
    return affine(parts, codes, blocked(weight.shape, 1, group), parts.tensor("scales"), parts.tensor("zeros"))


def _intx_unpacked(parts: InnerTensors) -> Tensor:
    """IntxUnpackedToInt8Tensor: codes of 1 to 8 bits, one in a byte; zero points are integers or floats."""
    stored = parts.fits("qdata", parts.tensor("qdata"), parts.shape)
    target = parts.get("target_dtype")
    if stored.dtype != INT8 or not isinstance(target, str) or target not in _INTX_DTYPES:
        raise parts.corrupt(f"has codes of {stored.dtype} for {brief(target)}: int8 for int1 to int8 is needed")
    dtype = _INTX_DTYPES[target]
    codes = Tensor(parts.name, parts.shape, dtype, narrowed(replace(stored, name=parts.name), dtype))
    return affine(parts, codes, parts.block_shape(parts.shape), parts.tensor("scale"), parts.tensor("zero_point"))


def _int8(parts: InnerTensors) -> Tensor:
    """Int8Tensor: symmetric ones have zero points too, all of them 0."""
    stored = parts.fits("qdata", parts.tensor("qdata"), parts.shape)
    if stored.dtype != INT8:
        raise parts.corrupt(f"has codes of {stored.dtype}, where int8 is needed")
    _note_activation_scale(parts)
    codes = Tensor(parts.name, parts.shape, INT8, stored.data)
    block_shape = parts.block_shape(parts.shape)
    return affine(parts, codes, block_shape, parts.tensor("scale"), parts.optional("zero_point"))


def _int4(parts: InnerTensors) -> Tensor:
    """Int4Tensor, once FbgemmInt4Tensor: signed codes, two in a byte, scales and zero points transposed; these are in
    the domain of values."""
    codes = bytes_of_pairs(parts, parts.tensor("qdata", "packed_weight"), INT4)
    if parts.get("group_size") is not None:
        block_shape = blocked(parts.shape, len(parts.shape) - 1, parts.count("group_size"))
    else:
        block_shape = group_blocks(parts)
    grid = grid_shape(parts.shape, block_shape)
    if len(grid) < 2:
        raise parts.corrupt(f"has the shape {parts.shape}, where a matrix, or several, are needed")
    stored = (*grid[:-2], grid[-1], grid[-2])
    scale = parts.fits("scale", parts.tensor("scale"), stored)
    offset = parts.fits("zero_point", parts.tensor("zero_point"), stored)
    _note_activation_scale(parts)
    return tinygemm(
        codes, block_shape, transposed("scale", scale, grid), transposed("offset", offset, grid), 0, FLOAT32
    )


def _int4_plain_int32(parts: InnerTensors) -> Tensor:
    """Int4PlainInt32Tensor as Intel GPUs have it: unsigned codes, eight in a word, lowest first (torch-xpu-ops,
    WeightInt4PackKernel.cpp), zero points int8."""
    block_shape = group_blocks(parts)
    if len(parts.shape) != 2:
        raise parts.corrupt(f"has the shape {parts.shape}, where a matrix is needed")
    scale, zero_point = integer_zero_points(parts, parts, block_shape, "zero_point")
    codes = bytes_of_pairs(parts, parts.tensor("qdata"), UINT4)
    _note_activation_scale(parts)
    return affine(parts, codes, block_shape, scale, zero_point)


def _int4_opaque(parts: InnerTensors) -> Tensor:
    """Int4OpaqueTensor, packed for the CPU's kernels of float activations."""
    if parts.get("act_mapping_type") is not None or parts.get("qzeros") is not None:
        raise parts.unsupported(f"packed for one CPU kernel of int8 activations: {_DEQUANTIZE}")
    block_shape = group_blocks(parts)
    codes = cpu_codes(parts, parts.tensor("qdata"))
    scale, offset = scale_and_zero(parts, parts.tensor("scale_and_zero"), block_shape, filled=False)
    _note_activation_scale(parts)
    # AVX512 and AVX2 multiply and add with one rounding to float32; products of narrower scales are exact in that
    compute_dtype = FLOAT64 if scale.dtype == FLOAT32 and parts.cpu != "generic" else FLOAT32
    return tinygemm(codes, block_shape, scale, offset, 8, compute_dtype)


def _int4_tile_packed(parts: InnerTensors) -> Tensor:
    """Int4TilePackedTo4dTensor: filled up to whole tiles, and to 1024 columns."""
    block_shape = group_blocks(parts)
    codes = tensor_core_codes(parts, parts.tensor("qdata"))
    scale, offset = scale_and_zero(parts, parts.tensor("scale_and_zero"), block_shape, filled=True)
    _note_activation_scale(parts)
    return tinygemm(codes, block_shape, scale, offset, 8, FLOAT32)


def _mx(parts: InnerTensors) -> Tensor:
    """MXTensor: float4 or float8 codes, one scale that is a power of two for each block of the last axis. Float4 codes
    whose scales are called `_scale_e8m0` (up to 0.14) lie high nibble first."""
    element, stored = parts.get("elem_dtype", "_elem_dtype"), parts.tensor("qdata", "_data")
    if element in ("float4_e2m1fn_x2", "fp4_e2m1"):
        codes = _float4_codes(parts, stored, high_first=parts.get("_scale_e8m0") is not None)
    elif element in _FLOAT6S:
        raise parts.unsupported(f"of {element}: {_DEQUANTIZE}")
    elif element in ("float8_e4m3fn", "float8_e5m2") and stored.dtype.name == element:
        codes = parts.fits("qdata", stored, parts.shape)
    else:
        raise parts.corrupt(f"has codes of {stored.dtype} for elements of {brief(element)}")
    block_shape = _last_axis_blocks(parts)
    scale = _block_scale(parts, _as_e8m0(parts, parts.tensor("scale", "_scale_e8m0")), block_shape)
    quantization = Quantization(scale, block_shape, value_dtype=value_dtype(parts.compute_dtype))
    return Tensor(parts.name, parts.shape, codes.dtype, codes.data, quantization)


def _nvfp4(parts: InnerTensors) -> Tensor:
    """NVFP4Tensor: float4 codes, a float8 scale for each block, of which one float32 scale may be the scale. Where
    the scales are called `_scale_e4m3` (up to 0.14) codes lie high nibble first, and everything about scales is rounded
    to the weight's dtype."""
    is_old = parts.get("_scale_e4m3") is not None
    codes = _float4_codes(parts, parts.tensor("qdata", "_data"), high_first=is_old)
    block_shape = _last_axis_blocks(parts)
    scale = parts.tensor("scale", "_scale_e4m3")
    if scale.dtype != FLOAT8_E4M3:
        raise parts.corrupt(f"has scales of {scale.dtype}, where float8_e4m3fn is needed")
    scale = _block_scale(parts, scale, block_shape)
    outer = parts.optional("per_tensor_scale", "_per_tensor_scale")
    if outer is not None:
        experts = len(outer.shape) == 3
        blocks = per_axis(scale.shape, 0) if experts else per_tensor(scale.shape)
        outer = parts.parameter("per_tensor_scale", outer, grid_shape(scale.shape, blocks))
        dtype = parts.compute_dtype if is_old else FLOAT32
        outer = as_dtype(outer, dtype) if outer.dtype != dtype else outer
        scale = replace(scale, quantization=Quantization(replace(outer, name="scale"), blocks, compute_dtype=dtype))
    quantization = Quantization(scale, block_shape, value_dtype=value_dtype(parts.compute_dtype))
    return Tensor(parts.name, parts.shape, FLOAT4, codes.data, quantization)


def _float8(parts: InnerTensors) -> Tensor:
    """Float8Tensor, once FbgemmFp8Tensor."""
    codes = parts.fits("codes", parts.tensor("qdata", "float8_data"), parts.shape)
    scale = parts.tensor("scale")
    if prod(scale.shape) == 1:
        return float8(parts, codes, scale, per_tensor(parts.shape))
    if parts.get("block_size"):
        return float8(parts, codes, scale, parts.block_shape(parts.shape))
    if not parts.shape or prod(scale.shape) != parts.shape[0]:
        raise parts.corrupt(f"has scales of shape {scale.shape} for shape {parts.shape} and no block_size")
    return float8(parts, codes, scale, per_axis(parts.shape, 0))


def _nf4(parts: InnerTensors) -> Tensor:
    """NF4Tensor: codes of a table, the first one of a byte in its high nibble; blocks of the flattened tensor have
    scales that are quantized themselves: int8 / quantization_factor + scaler_mean, rounded after each (nf4_tensor.py,
    dequantize_scalers), which is computed here."""
    codes, dtype = parts.tensor("quantized_data"), parts.compute_dtype
    block, scaler_block = parts.count("block_size"), parts.count("scaler_block_size")
    shape, count = parts.shape, prod(parts.shape)
    if codes.dtype != UINT8 or codes.nbytes * 2 != count:
        raise parts.corrupt(f"has {codes.nbytes} bytes of {codes.dtype} for shape {shape} of 4 bits")
    table = parts.fits("nf4", parts.tensor("nf4"), (16,))
    columns = shape[-1]
    if columns % block and block % columns:
        raise parts.unsupported(f"in blocks of {block}, which do not fit rows of {columns}: {_DEQUANTIZE}")
    block_shape = blocked(shape, len(shape) - 1, min(block, columns))
    if block > columns:
        if len(shape) != 2 or shape[0] * columns % block:
            raise parts.unsupported(f"in blocks of {block}, which do not fit the shape {shape}: {_DEQUANTIZE}")
        block_shape = (block // columns, columns)
    blocks = prod(grid_shape(shape, block_shape))
    scalers, factor = parts.tensor("quantized_scalers"), parts.tensor("quantization_factor")
    mean = parts.tensor("scaler_mean")
    if scalers.dtype != INT8 or scalers.shape != (blocks,) or blocks % scaler_block:
        raise parts.corrupt(f"has scales of shape {scalers.shape} of {scalers.dtype} for {blocks} blocks")
    parts.fits("quantization_factor", factor, (blocks // scaler_block,))
    if mean.size != 1 or {factor.dtype, mean.dtype} - {dtype}:
        raise parts.corrupt(f"has factors of {factor.dtype} and a mean of {mean.dtype}: {dtype} is needed")
    parts.lose("widened", f"its int8 scales are decoded to {dtype.name}")

    def scales(first: int, last: int) -> Any:
        width = grid_shape(shape, block_shape)[-1]
        position = np.arange(first * width, last * width)
        by = factor.numpy()[position // scaler_block]
        with np.errstate(all="ignore"):
            return (scalers.numpy()[position].astype(dtype) / by + mean.numpy().reshape(())).astype(dtype)

    grid = grid_shape(shape, block_shape)
    scale = made_by_rows("scale", grid, dtype, scales, scalers.data, factor.data, mean.data)
    quantization = Quantization(scale, block_shape, codebook=replace(table, name="codebook"), compute_dtype=dtype)
    return Tensor(parts.name, shape, UINT4, swapped_nibbles(codes.data, prod(parts.shape)), quantization)


def _uintx(parts: InnerTensors) -> Tensor:
    """UintxTensor on its own: codes without scales."""
    return shards(parts, parts)


def _wrapper(parts: InnerTensors) -> Tensor:
    """LinearActivationQuantizedTensor and its kin: a weight, and what is done to the activation."""
    wrapped = parts.get("original_weight_tensor")
    if isinstance(wrapped, WrappedTensor):
        if wrapped.shape != parts.shape:
            raise parts.corrupt(f"wraps a weight of shape {wrapped.shape}, but has the shape {parts.shape}")
        tensor, losses = decoded(parts.name, wrapped, parts.cpu)
        parts.losses.extend(losses)
        return tensor
    return replace(parts.fits("a weight", parts.tensor("original_weight_tensor"), parts.shape), name=parts.name)


def _activation_scale(parts: InnerTensors) -> Tensor:
    """WeightTensorWithLinearActivationScaleMetadata: the activation is divided by a scale first."""
    parts.lose("dropped", "the scale of its activation, which is divided by it first: a weight cannot hold it")
    return _wrapper(parts)


def _note_activation_scale(parts: InnerTensors) -> None:
    if parts.get("act_pre_scale") is not None:
        parts.lose("dropped", "act_pre_scale, which multiplies its activation first: a weight cannot hold it")


def _float4_codes(parts: InnerTensors, stored: Tensor, *, high_first: bool) -> Tensor:
    """Float4 codes, two in a byte of uint8, or of the dtype itself."""
    if stored.dtype == FLOAT4:
        return parts.fits("qdata", stored, parts.shape)
    if stored.dtype == UINT8 and len(parts.shape) >= 2:
        *outer, height, width = parts.shape
        if height != width and stored.shape == (*outer, height // 2, width):
            raise parts.unsupported("saved transposed: save it as it is quantized")
    codes = bytes_of_pairs(parts, stored, FLOAT4)
    return replace(codes, data=swapped_nibbles(codes.data, codes.size)) if high_first else codes


def _last_axis_blocks(parts: InnerTensors) -> tuple[int, ...]:
    """Blocks of the last axis, which their size divides."""
    size = parts.count("block_size", "_block_size")
    if not parts.shape or parts.shape[-1] % size:
        raise parts.corrupt(f"has blocks of {size} elements, which do not divide the shape {parts.shape}")
    return blocked(parts.shape, len(parts.shape) - 1, size)


def _block_scale(parts: InnerTensors, stored: Tensor, block_shape: tuple[int, ...]) -> Tensor:
    """The scales of blocks, in tiles where `is_swizzled_scales` says so."""
    grid = grid_shape(parts.shape, block_shape)
    swizzled = parts.get("is_swizzled_scales", "_is_swizzled_scales")
    if not swizzled:
        return parts.parameter("scale", stored, grid)
    if swizzled is not True:
        raise parts.corrupt(f"has is_swizzled_scales {brief(swizzled)}, which is neither true nor false")
    if stored.size != swizzled_size(grid):
        raise parts.corrupt(f"has {stored.size} scales, where {swizzled_size(grid)} in tiles are needed for {grid}")
    return unswizzled("scale", stored, grid)


def _as_e8m0(parts: InnerTensors, stored: Tensor) -> Tensor:
    """Scales that are exponents; up to torchao 0.7 they were saved as bytes."""
    if stored.dtype == UINT8:
        return replace(stored, dtype=FLOAT8_E8M0)
    if stored.dtype != FLOAT8_E8M0:
        raise parts.corrupt(f"has scales of {stored.dtype}, where float8_e8m0fnu is needed")
    return stored


def _even_split(parts: InnerTensors, size: int, groups: int) -> int:
    if not groups or size % groups or not size:
        raise parts.corrupt(f"has {groups} groups of {size} columns")
    return size // groups


_DEQUANTIZE = "save the model with another layout, or its dequantized weights, with torchao"

_CLASSES: Mapping[str, Callable[[InnerTensors], Tensor]] = MappingProxyType(
    {
        "AffineQuantizedTensor": affine_quantized,
        "FbgemmFp8Tensor": _float8,
        "FbgemmInt4Tensor": _int4,
        "Float8Tensor": _float8,
        "Int4OpaqueTensor": _int4_opaque,
        "Int4PlainInt32Tensor": _int4_plain_int32,
        "Int4Tensor": _int4,
        "Int4TilePackedTo4dTensor": _int4_tile_packed,
        "Int8Tensor": _int8,
        "IntxUnpackedToInt8Tensor": _intx_unpacked,
        "LinearActivationQuantizedTensor": _wrapper,
        "MXTensor": _mx,
        "NF4Tensor": _nf4,
        "NVFP4Tensor": _nvfp4,
        "UintxTensor": _uintx,
        "WeightTensorWithLinearActivationQuantizationMetadata": _wrapper,
        "WeightTensorWithLinearActivationScaleMetadata": _activation_scale,
    }
)
_UNREADABLE: Mapping[str, str] = MappingProxyType(
    {
        "CodebookQuantizedPackedTensor": "packed for one CPU kernel",
        "Float8OpaqueTensor": "packed for one CPU kernel",
        "Float8Sparse2x4_1DData1DMetadataTensor": "with half of the weights left out, for one GPU kernel",
        "Float8Sparse2x4_2DData2DMetadataTensor": "with half of the weights left out, for one GPU kernel",
        "Int4GroupwisePreshuffleTensor": "shuffled for one GPU kernel whose order is not documented",
        "Int4PreshuffledTensor": "shuffled for one GPU kernel whose order is not documented",
        "IntxOpaqueTensor": "packed for one CPU kernel",
        "UIntxBitPackedTensor": "packed for gemlite",
    }
)
