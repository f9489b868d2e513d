"""NVIDIA ModelOpt's checkpoints (0.47, torch/export/quant_utils.py): `<module>.weight` and `.weight_scale`.

    NVFP4       weight uint8 (O, I / 2), float4 codes, the first one of a byte in its low nibble;
                weight_scale float8 (O, I / 16), multiplied by weight_scale_2
    MXFP4       weight likewise; weight_scale uint8 (O, I / 32), exponents
    W4A16_AWQ   weight uint8 (O / 2, I), int4 codes, row 2r in the low nibble of row r; weight_scale (O, G)
    FP8         weight float8 (O, I); weight_scale of the tensor, of channels or of blocks
    MXFP8       weight float8 (O, I); weight_scale uint8 (O, I / 32), exponents
    W8A16, W8A8 weight int8 (O, I); weight_scale (O)

    weight[o, i] = scale * code, in float32

`pre_quant_scale` multiplies the activation of the AWQ ones: it is kept as a tensor of its own.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3, INT4
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.rows import paired_rows
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.values.parameters import exponents, float_scales, group_size, small_floats

METHODS = frozenset(("modelopt", "modelopt_fp4", "modelopt_mixed"))

NVFP4_BLOCK = 16
MX_BLOCK = 32
_PARTS = (".weight", ".weight_scale", ".weight_scale_2")

#: What the configuration calls each layout.
_ALGORITHMS = {
    "nvfp4": frozenset(
        ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_SVD", "NVFP4_SVDQUANT", "NVFP4_STATIC")
    ),
    "mxfp4": frozenset(("MXFP4", "W4A8_MXFP4_FP8")),
    "int4": frozenset(("W4A16_AWQ", "INT4_AWQ", "W4A16")),
    "fp8": frozenset(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL")),
    "mxfp8": frozenset(("MXFP8",)),
    "int8": frozenset(("W8A16", "W8A8_SQ_PER_CHANNEL")),
}


def claims(stored: WeightTensors) -> bool:
    """Whether there are bytes of two codes with a scale; codes of float8 and int8 look like compressed-tensors', but
    for the configuration."""
    weight = stored.get(".weight")
    if weight is None or stored.get(".weight_scale") is None:
        return False
    in_bytes = weight.dtype in (np.int8, FLOAT8_E4M3) and stored.checkpoint.method in METHODS
    return weight.dtype == np.uint8 or in_bytes


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I), or (E, O, I) for experts. Raises Unsupported for codes that are quantized twice;
    CorruptFile where shapes, dtypes or configuration do not fit."""
    weight, scale = stored[".weight"], stored[".weight_scale"]
    if len(weight.shape) < 2:
        raise CorruptFile(f"has codes of shape {weight.shape}, where a matrix is needed")
    name = f"{stored.prefix}.weight"
    if weight.dtype == np.uint8:
        if scale.dtype == FLOAT8_E4M3:
            agree(stored, "nvfp4", NVFP4_BLOCK)
            scales = nested(scale, stored[".weight_scale_2"])
            return DecodedWeight(small_floats(name, FLOAT4, weight, scales, NVFP4_BLOCK), _PARTS)
        if scale.dtype == np.uint8:
            agree(stored, "mxfp4", MX_BLOCK)
            return DecodedWeight(small_floats(name, FLOAT4, weight, exponents(scale), MX_BLOCK), _PARTS)
        return DecodedWeight(_int4(stored, name, weight, float_scales(scale)), _PARTS)
    if scale.dtype == np.uint8:
        agree(stored, "mxfp8", MX_BLOCK)
        return DecodedWeight(small_floats(name, weight.dtype, weight, exponents(scale), MX_BLOCK), _PARTS)
    agree(stored, "int8" if weight.dtype == np.int8 else "fp8", None)
    blocks = _blocks(weight.shape, scale.shape)
    scale = replace(float_scales(scale), name="scale", shape=grid_shape(weight.shape, blocks))
    return DecodedWeight(replace(weight, name=name, quantization=Quantization(scale, blocks)), _PARTS)


def agree(stored: WeightTensors, layout: str, size: int | None) -> None:
    """Raises CorruptFile where the configuration says another algorithm or group size than the tensors are of."""
    algorithm = stored.setting("quant_algo", str, "")
    every = stored.checkpoint.config.get("quantized_layers")
    of_layer = every.get(stored.prefix) if isinstance(every, dict) else None
    if isinstance(of_layer, dict):
        algorithm = of_layer.get("quant_algo", algorithm)
    is_known = isinstance(algorithm, str) and algorithm in {"", "MIXED_PRECISION"} | _ALGORITHMS[layout]
    if not is_known:
        raise CorruptFile(f"has tensors of {layout}, but its configuration says quant_algo {brief(algorithm)}")
    told = of_layer.get("group_size") if isinstance(of_layer, dict) else stored.checkpoint.config.get("group_size")
    if size is not None and told is not None and told != size:
        raise CorruptFile(f"has tensors of {layout}, in groups of {size}, but its configuration says {brief(told)}")


def nested(scale: Tensor, outer: Tensor) -> Tensor:
    """The scales of blocks, of which `outer` is the scale: one for all, or for each expert."""
    if outer.dtype != np.float32 or not scale.shape:
        raise CorruptFile(f"has weight_scale_2 of {outer.dtype} for weight_scale of shape {scale.shape}")
    experts = len(scale.shape) > 2 and outer.size == scale.shape[0] != 1
    if outer.size != 1 and not experts:
        raise CorruptFile(f"has weight_scale_2 of shape {outer.shape} for weight_scale of shape {scale.shape}")
    blocks = per_axis(scale.shape, 0) if experts else per_tensor(scale.shape)
    outer = replace(outer, name="scale", shape=grid_shape(scale.shape, blocks))
    return replace(scale, name="scale", quantization=Quantization(outer, blocks))


def _int4(stored: WeightTensors, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """int4 codes of two outputs in a byte."""
    if stored.get(".weight_scale_2") is not None:
        raise Unsupported("is W4A8_AWQ of ModelOpt, whose codes are of float8 ones: save it as W4A16_AWQ or NVFP4")
    agree(stored, "int4", None)
    shape = (*weight.shape[:-2], weight.shape[-2] * 2, weight.shape[-1])
    if scale.shape[:-1] != shape[:-1]:
        raise CorruptFile(
            f"has weight of shape {weight.shape} and weight_scale of {scale.shape}: (O / 2, I) and (O, G)"
        )
    size = group_size(stored.setting("group_size", int, 0), shape[-1], scale.shape[-1])
    codes = paired_rows(name, weight, INT4)
    quantization = Quantization(replace(scale, name="scale"), blocked(shape, len(shape) - 1, size))
    return replace(codes, quantization=quantization)


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """What shares a scale: the tensor, a channel, or, of matrices, a square block."""
    sizes = tuple(size for size in scales if size != 1)
    if prod(scales) == 1:
        return per_tensor(shape)
    if scales in (shape[:-1], (*shape[:-1], 1)):
        return blocked(shape, len(shape) - 1, max(1, shape[-1]))
    if len(shape) > 2 and sizes == shape[:1]:
        return per_axis(shape, 0)
    fits = len(shape) == len(sizes) == 2 and 0 not in sizes
    if fits and all(size % count == 0 for size, count in zip(shape, sizes, strict=True)):
        blocks = tuple(size // count for size, count in zip(shape, sizes, strict=True))
        if len(set(blocks)) == 1:
            return blocks
    raise CorruptFile(f"has weight_scale of shape {scales} for codes of shape {shape}")
