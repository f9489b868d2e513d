"""compressed-tensors 0.20 (and as it was in 0.11): `<module>.weight_packed` or `.weight`, with `.weight_scale`.

    pack-quantized         weight_packed int32, codes along the inputs with 2 ** (bits - 1) added; weight_shape
    int-, naive-quantized  weight int8, a code in each
    float-quantized        weight float8
    nvfp4-pack-quantized   weight_packed uint8, float4 codes; weight_scale float8, divided by weight_global_scale
    mxfp4-pack-quantized   weight_packed uint8, float4 codes; weight_scale uint8, exponents
    mxfp6-pack-quantized   weight_packed uint8, float6 codes, four in three bytes; weight_scale uint8, exponents
    mxfp8-quantized        weight float8; weight_scale uint8, exponents

    weight[o, i] = scale * (code - zero_point), in the dtype of the scales; values of nvfp4 are rounded to bfloat16

Zero points are int8 like the codes; up to 8 bits they are packed along the outputs, where there is one for each channel
or group. Before 0.18, codes of 3, 5, 6 and 7 bits did not cross words. `weight_g_idx` is 0.11's act-order; -1 in it
means that there is none. The sparse layouts and 2:4 kernels' ones are recognized, and refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    FLOAT4,
    FLOAT6_E2M3,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    integer_range,
    is_integer,
)
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Loss, Quantization, Tensor, blocked, grid_shape, per_tensor
from nibblecast.formats.encodings.bytes.bit_fields import across_rows, along_rows, words_for
from nibblecast.formats.encodings.bytes.float6 import float6
from nibblecast.formats.encodings.bytes.rows import made_by_rows
from nibblecast.formats.encodings.bytes.widths import dtype_for, narrowed
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.compressed_tensors.config_group import UNREAD, ConfigGroup, layout_names, schemes
from nibblecast.formats.encodings.values.parameters import (
    FLOATS,
    exponents,
    float_scales,
    group_index,
    kept_index,
    small_floats,
    value_dtype,
)

#: `fp8` and `fbgemm_fp8` have the tensors of float-quantized, and are read as that.
METHODS = frozenset(("compressed-tensors", "sparseml", "fp8", "fbgemm_fp8"))

_INTEGERS = frozenset((INT8, INT16, INT32))
_FLOATS8 = frozenset((FLOAT8_E4M3, FLOAT8_E5M2))
#: int8 like the codes; float8 weights once had zeros of float8.
_ZERO_POINTS = _INTEGERS | _FLOATS8 | FLOATS
_PARTS = tuple(
    f".weight{part}" for part in ("_packed", "", "_scale", "_zero_point", "_shape", "_g_idx", "_global_scale")
)
NVFP4_BLOCK = 16
MX_BLOCK = 32
_MXFP6_BYTES = 24
_DECOMPRESS = "save the model dense, or in another layout, with the compressed-tensors that wrote it"
#: The first version whose codes cross words.
_DENSE_SINCE = (0, 18)


def claims(stored: WeightTensors) -> bool:
    """Whether there are packed codes, or codes of int8 or float8 with a scale that are not ModelOpt's."""
    if stored.get(".weight_packed") is not None or _is_sparse(stored):
        return True
    weight = stored.get(".weight")
    if weight is None or stored.get(".weight_scale") is None or stored.checkpoint.method.startswith("modelopt"):
        return False
    return weight.dtype in _INTEGERS or weight.dtype in _FLOATS8


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I), or (E, O, I) for experts. Raises Unsupported for layouts that are known by name
    only; CorruptFile where shapes, dtypes or configuration do not fit."""
    _refuse_unread(stored)
    packed = stored.get(".weight_packed")
    if packed is None:
        return _one_in_an_element(stored, stored[".weight"], stored[".weight_scale"])
    if len(packed.shape) < 2:
        raise CorruptFile(f"has weight_packed of shape {packed.shape}, where a matrix is needed")
    if packed.dtype == np.int32:
        return _packed_integers(stored, packed, stored[".weight_scale"])
    if packed.dtype == np.uint8:
        return _packed_floats(stored, packed, stored[".weight_scale"])
    raise CorruptFile(f"has weight_packed of {packed.dtype}, where int32 or uint8 is needed")


def _is_sparse(stored: WeightTensors) -> bool:
    return stored.get(".bitmask") is not None and stored.get(".compressed") is not None


def _refuse_unread(stored: WeightTensors) -> None:
    if _is_sparse(stored):
        raise Unsupported(f"is in a sparse layout of compressed-tensors: {_DECOMPRESS}", tensor=stored.prefix)
    unread = sorted(layout_names(stored) & UNREAD)
    if stored.get(".scale_packed") is not None or stored.get(".meta") is not None:
        unread = ["marlin-24"]
    if unread:
        raise Unsupported(f"is in the layout '{unread[0]}' of compressed-tensors: {_DECOMPRESS}")


def _packed_integers(stored: WeightTensors, packed: Tensor, scale: Tensor) -> DecodedWeight:
    shape = _shape(stored, packed)
    candidates = schemes(stored, frozenset(("pack-quantized",)))
    widths = _widths(stored, candidates, packed.shape[-1], shape[-1])
    if len(widths) != 1:
        raise CorruptFile(
            f"has weight_packed of shape {packed.shape} for the shape {shape}: "
            f"its configuration must say one number of bits that this fits, not {len(widths)}"
        )
    ((bits, dense),) = widths
    fitting = [scheme for scheme in candidates if scheme.bits == bits and scheme.kind == "int"]
    codes = along_rows(f"{stored.prefix}.weight", packed, shape[-1], bits, signed=True, dense=dense)
    return _affine(stored, codes, float_scales(scale), fitting, (bits, dense))


def _shape(stored: WeightTensors, packed: Tensor) -> tuple[int, ...]:
    tensor = stored[".weight_shape"]
    if tensor.shape != (len(packed.shape),) or not is_integer(tensor.dtype):
        raise CorruptFile(f"has weight_shape of shape {tensor.shape} and dtype {tensor.dtype}")
    shape = tuple(int(size) for size in tensor.numpy())
    if shape[:-1] != packed.shape[:-1] or not 0 <= shape[-1] <= packed.shape[-1] * 32:
        raise CorruptFile(f"has weight_packed of shape {packed.shape} for the shape {shape}")
    return shape


def _widths(
    stored: WeightTensors, candidates: Iterable[ConfigGroup], words: int, columns: int
) -> set[tuple[int, bool]]:
    """The numbers of bits, with whether codes cross words, by which so many words are so many columns. Packed zero
    points, which run along the rows, may cross words where codes cannot."""
    zero_point = stored.get(".weight_zero_point")
    is_packed = zero_point is not None and zero_point.dtype == np.int32
    longest = max(columns, stored[".weight_packed"].shape[-2]) if is_packed else columns
    told = {scheme.bits for scheme in candidates if scheme.kind == "int"} or set(range(1, 9))
    found = set()
    for bits in told & set(range(1, 9)):
        fits = {dense for dense in (True, False) if words_for(columns, bits, dense=dense) == words}
        if 32 % bits == 0 or longest <= 32 // bits:
            fits &= {True}  # nothing could cross a word
        if len(fits) == 2:
            fits = {_version(stored) >= _DENSE_SINCE}
        found |= {(bits, dense) for dense in fits}
    return found


def _version(stored: WeightTensors) -> tuple[int, ...]:
    version = stored.setting("version", str, "")
    numbers = version.split(".")[:2]
    if len(numbers) != 2 or not all(number.isdecimal() and len(number) < 9 for number in numbers):
        raise Unsupported(f"could be of before or after compressed-tensors 0.18, and has the version {brief(version)}")
    return tuple(int(number) for number in numbers)


def _one_in_an_element(stored: WeightTensors, weight: Tensor, scale: Tensor) -> DecodedWeight:
    name = f"{stored.prefix}.weight"
    if len(weight.shape) < 2:
        raise CorruptFile(f"has codes of shape {weight.shape}, where a matrix is needed")
    if weight.dtype in _FLOATS8:
        if scale.dtype == np.uint8:
            schemes(stored, frozenset(("mxfp8-quantized",)))
            return DecodedWeight(small_floats(name, weight.dtype, weight, exponents(scale), MX_BLOCK), _PARTS)
        candidates = schemes(stored, frozenset(("float-quantized", "naive-quantized")))
        fitting = [scheme for scheme in candidates if scheme.kind == "float" and scheme.bits == 8]
        _some(candidates, fitting, weight)
        return _affine(stored, replace(weight, name=name), float_scales(scale), fitting, None)
    candidates = schemes(stored, frozenset(("int-quantized", "naive-quantized")))
    limit = 8 * weight.dtype.itemsize
    fitting = [scheme for scheme in candidates if scheme.kind == "int" and scheme.bits <= limit]
    _some(candidates, fitting, weight)
    bits = max((scheme.bits for scheme in fitting), default=limit)
    dtype = dtype_for(*integer_range(bits, signed=True))
    codes = Tensor(name, weight.shape, dtype, narrowed(replace(weight, name=name), dtype))
    return _affine(stored, codes, float_scales(scale), fitting, None)


def _some(candidates: tuple[ConfigGroup, ...], fitting: list[ConfigGroup], weight: Tensor) -> None:
    if candidates and not fitting:
        told = ", ".join(sorted({f"{scheme.kind}{scheme.bits}" for scheme in candidates}))
        raise CorruptFile(f"has codes of {weight.dtype}, but its configuration says {told}")


def _affine(
    stored: WeightTensors, codes: Tensor, scale: Tensor, candidates: list[ConfigGroup], packing: tuple[int, bool] | None
) -> DecodedWeight:
    """The weight of these codes; zero points may be packed as `packing` says: bits, and whether codes cross words."""
    shape = codes.shape
    block_shape = _block_shape(candidates, shape, scale.shape)
    grid = grid_shape(shape, block_shape)
    index = _group_index(stored, shape[-1], grid)
    quantization = Quantization(
        replace(scale, name="scale", shape=grid),
        block_shape,
        _zero_point(stored, grid, packing),
        group_index=index if index is None else kept_index(index, len(shape) - 1),
        value_dtype=value_dtype(scale.dtype),
    )
    return DecodedWeight(replace(codes, quantization=quantization), _PARTS)


def _block_shape(candidates: list[ConfigGroup], shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    if candidates:
        fitting = {found for scheme in candidates if (found := scheme.block_shape(shape, scales)) is not None}
    else:
        columns = blocked(shape, len(shape) - 1, max(1, shape[-1] // max(1, scales[-1] if scales else 1)))
        fitting = (
            {per_tensor(shape)} if prod(scales) == 1 else {columns} if scales == grid_shape(shape, columns) else set()
        )
    if len(fitting) != 1:
        told = "; ".join(f"{s.strategy}, group_size {s.group}" for s in candidates) or "nothing"
        raise CorruptFile(f"has scales of shape {scales} for the shape {shape}; its configuration says {told}")
    return fitting.pop()


def _group_index(stored: WeightTensors, columns: int, grid: tuple[int, ...]) -> NDArray[Any] | None:
    g_idx = stored.get(".weight_g_idx")
    if g_idx is None or (g_idx.dtype.kind == "i" and bool((g_idx.numpy() == -1).any())):
        return None
    return group_index(g_idx, columns, grid[-1])


def _zero_point(stored: WeightTensors, grid: tuple[int, ...], packing: tuple[int, bool] | None) -> Tensor | None:
    zero_point = stored.get(".weight_zero_point")
    if zero_point is None:
        return None
    if packing is not None and zero_point.dtype == np.int32:
        bits, dense = packing
        shape = (*grid[:-2], words_for(grid[-2], bits, dense=dense), grid[-1])
        if zero_point.shape != shape:
            raise CorruptFile(f"has weight_zero_point of shape {zero_point.shape}, where {shape} is needed")
        return across_rows("zero_point", zero_point, grid, bits, dense=dense)
    if prod(zero_point.shape) != prod(grid) or zero_point.dtype not in _ZERO_POINTS:
        raise CorruptFile(f"has weight_zero_point of {zero_point.dtype} and shape {zero_point.shape} for {grid}")
    return replace(zero_point, name="zero_point", shape=grid)


def _packed_floats(stored: WeightTensors, packed: Tensor, scale: Tensor) -> DecodedWeight:
    name = f"{stored.prefix}.weight"
    zero_point = stored.get(".weight_zero_point")
    if zero_point is not None and zero_point.codes().any():
        raise Unsupported("has small floats with zero points, which compressed-tensors leaves out when it decodes")
    if scale.dtype == FLOAT8_E4M3:
        schemes(stored, frozenset(("nvfp4-pack-quantized",)))
        scales = divided(scale, stored[".weight_global_scale"])
        loss = Loss(name, "widened", "its float8 scales are divided by the global scale, to float32")
        return DecodedWeight(small_floats(name, FLOAT4, packed, scales, NVFP4_BLOCK, BFLOAT16), _PARTS, (loss,))
    if scale.shape and packed.shape[-1] == scale.shape[-1] * _MXFP6_BYTES:
        schemes(stored, frozenset(("mxfp6-pack-quantized",)))
        shape = (*packed.shape[:-1], scale.shape[-1] * MX_BLOCK)
        codes = float6(name, shape, FLOAT6_E2M3, packed.data)
        return DecodedWeight(small_floats(name, FLOAT6_E2M3, codes, exponents(scale), MX_BLOCK), _PARTS)
    schemes(stored, frozenset(("mxfp4-pack-quantized",)))
    return DecodedWeight(small_floats(name, FLOAT4, packed, exponents(scale), MX_BLOCK), _PARTS)


def divided(scale: Tensor, divisor: Tensor) -> Tensor:
    """The scales divided by the global one: a float32 division, which multiplying by a reciprocal is not."""
    if divisor.dtype != np.float32 or divisor.size != 1:
        raise CorruptFile(
            f"has weight_global_scale of {divisor.dtype} and shape {divisor.shape}: one float32 is needed"
        )
    columns = scale.shape[-1] if scale.shape else 1

    def rows(first: int, last: int) -> NDArray[Any]:
        stored = scale.numpy().reshape(-1, columns)[first:last].astype(np.float32)
        with np.errstate(all="ignore"):
            quotients: NDArray[np.float32] = stored / divisor.numpy().reshape(())
        return quotients

    return made_by_rows("scale", scale.shape, FLOAT32, rows, scale.data, divisor.data)
