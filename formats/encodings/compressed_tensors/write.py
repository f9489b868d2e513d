"""Writing compressed-tensors 0.20: weights as `compressed_tensors` says that they are stored, one scheme a kind.

    int2, int4, int8             pack-quantized: tensor, channel, group, block; zero points if any is not 0
    float8_e4m3fn                float-quantized, or mxfp8-quantized with exponents for blocks of 32
    float4 with exponents        mxfp4-pack-quantized
    float4 with float8 scales    nvfp4-pack-quantized: the library divides by weight_global_scale; values are bfloat16

The library refuses groups that do not divide the inputs, and packs zero points into the bits of codes; what does not
fit is in the strategy "block", of which it fills up the last blocks, and which has zero points of int8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT4, FLOAT8_E4M3, FLOAT8_E8M0, INT8, UINT8
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor
from nibblecast.converters.storage import InMemory
from nibblecast.formats.encodings.bytes.bit_fields import code_dtype, in_words, in_words_across
from nibblecast.formats.encodings.compressed_tensors.config_group import SCALE_DTYPES, ConfigGroup, WeightScheme
from nibblecast.formats.encodings.compressed_tensors.read import MX_BLOCK, NVFP4_BLOCK, divided
from nibblecast.formats.encodings.values.offsets import offsets_as_zero_points
from nibblecast.formats.encodings.values.refit import (
    elementwise,
    extent,
    integer_quantization,
    powers_in_float32,
    rounded_to,
    rounded_with_scales,
    signed,
    unsigned,
    without_factor,
)
from nibblecast.formats.encodings.writable import Configuration, Encoded

_VERSION = "0.20.0"
#: How many numbers of float8_e4m3fn there are from 0 to 448.
_FLOAT8S = 127
#: The strategies whose zero points are packed.
_PACKED_ZERO_POINTS = frozenset(("channel", "group"))
#: What modules with an embedding are called: these are no Linear.
_EMBEDDINGS = ("embed", "wte", "wpe")
#: The head, which a checkpoint has no tensor of where its weight is the embedding's.
_HEAD = "lm_head"


def encode(weight: Tensor) -> Encoded:
    """The tensors of a matrix, (O, I): `<module>.weight_packed` or `.weight`, and `.weight_scale` and so on."""
    quantization = weight.quantization
    if quantization is None or len(weight.shape) != 2 or not weight.size:
        raise Unsupported(f"has the shape {weight.shape}, where a quantized matrix is needed", tensor=weight.name)
    if not weight.name.endswith(".weight"):
        raise Unsupported("is not called after its module, as <module>.weight", tensor=weight.name)
    if quantization.codebook is not None:
        raise Unsupported("has codes that are looked up in a codebook", tensor=weight.name)
    if quantization.group_index is not None:
        raise Unsupported("has a group index (act-order), which the library reads no longer", tensor=weight.name)
    is_small_float = weight.dtype in (FLOAT4, FLOAT8_E4M3)
    if is_small_float and quantization.offset is not None:
        raise Unsupported(f"has {weight.dtype} codes with offsets, which no layout can hold", tensor=weight.name)
    if weight.dtype == FLOAT4:
        return _float4(weight, quantization)
    if weight.dtype == FLOAT8_E4M3:
        return _float8(weight, quantization)
    return _integers(weight)


def configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
    """`quantization_config`: a group for each kind of weights, the most common one for all that is Linear, the others
    for modules by name; modules with plain weights are ignored."""
    if not weights:
        return Configuration({})
    kinds: dict[WeightScheme, list[str]] = {}
    for name, encoded in weights.items():
        kinds.setdefault(encoded.setting, []).append(_module(name))
    groups = {}
    for number, (kind, modules) in enumerate(sorted(kinds.items(), key=lambda item: -len(item[1]))):
        embeddings = [module for module in modules if _is_embedding(module)]
        targets = modules if number or len(embeddings) == len(modules) else ["Linear", *embeddings]
        groups[f"group_{number}"] = kind.group(targets)
    layouts = {kind.scheme.layout for kind in kinds}
    ignored = dict.fromkeys(_module(name) for name in plain if name.endswith(".weight"))
    if f"{_HEAD}.weight" not in weights:
        ignored[_HEAD] = None
    entry = {
        "config_groups": groups,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }
    return Configuration({"quantization_config": entry}, notes=_notes(weights))


def _notes(weights: Mapping[str, Encoded]) -> tuple[str, ...]:
    """What a user of transformers 5.23 must know to get these values from it."""
    decoded = sorted({_decoded_to(encoded).name for encoded in weights.values()})
    notes = []
    if len(decoded) == 1:
        notes.append(f"load it with dtype={decoded[0]}: transformers rounds the scales to the model's dtype")
    else:
        notes.append(f"transformers rounds the scales, of {' and '.join(decoded)}, to the one dtype of the model")
    dequantize = "transformers 5.23 loads it only with CompressedTensorsConfig(dequantize=True)"
    if any(_has_packed_zero_points(encoded.setting) for encoded in weights.values()):
        notes.append(f"it has packed zero points: {dequantize}")
    if any(_is_embedding(_module(name)) for name in weights):
        notes.append(f"it has quantized embeddings: {dequantize}")
    if len({encoded.setting for encoded in weights.values()}) > 1:
        notes.append("with CompressedTensorsConfig(dequantize=True) transformers 5.23 takes its first group for all")
    return tuple(notes)


def _decoded_to(encoded: Encoded) -> np.dtype[Any]:
    """The dtype of the values that the library gives: those of small floats are bfloat16."""
    is_small_float = encoded.setting.scheme.layout in SCALE_DTYPES
    return BFLOAT16 if is_small_float else encoded.weight.quantized().scale.dtype


def _has_packed_zero_points(written: WeightScheme) -> bool:
    return not written.symmetric and written.scheme.strategy in _PACKED_ZERO_POINTS


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_embedding(module: str) -> bool:
    return any(word in module.rpartition(".")[2] for word in _EMBEDDINGS)


def _integers(weight: Tensor) -> Encoded:
    integer_quantization(weight)
    scaled, of_offsets = offsets_as_zero_points(weight)
    scaled, of_factor = without_factor(scaled)
    scaled, of_scales = rounded_with_scales(scaled, widened=True)
    codes, bits = signed(scaled), weight.bits
    quantization = codes.quantized()
    zero_point = quantization.zero_point
    lowest, highest = extent(zero_point) if zero_point is not None else (0, 0)
    if lowest < -128 or highest > 127:
        raise Unsupported(
            f"has zero points from {lowest} to {highest} for signed codes: int8 is needed", tensor=weight.name
        )
    packable = -(1 << bits - 1) <= lowest and highest < 1 << bits - 1
    written = WeightScheme(_scheme(codes, bits, "int", "pack-quantized", grouped=packable), (lowest, highest) == (0, 0))
    module = _module(weight.name)
    scale = _scale(module, quantization.scale, written.scheme)
    stored = {
        f"{module}.weight_packed": in_words(f"{module}.weight_packed", unsigned(scaled)),
        scale.name: scale,
        f"{module}.weight_shape": Tensor.from_array(f"{module}.weight_shape", np.array(weight.shape, np.int64)),
    }
    kept = None
    if zero_point is not None and not written.symmetric:
        kept, stored_zero_point = _zero_points(f"{module}.weight_zero_point", zero_point, written, scale.shape)
        stored[stored_zero_point.name] = stored_zero_point
    return _encoded(codes, stored, written, of_offsets + of_factor + of_scales, zero_point=kept)


def _zero_points(key: str, zero_point: Tensor, written: WeightScheme, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Those of signed codes as they are read, and as they are stored: in the bits of codes, or as int8 of `shape`."""
    bits = written.scheme.bits
    if not _has_packed_zero_points(written):
        kept = elementwise(zero_point, INT8, lambda values: values)
        return replace(kept, name="zero_point"), replace(kept, name=key, shape=shape)
    kept = elementwise(zero_point, code_dtype(bits, signed=True), lambda values: values)
    shifted = elementwise(zero_point, UINT8, lambda values: values + (1 << bits - 1))
    return replace(kept, name="zero_point"), in_words_across(key, shifted, bits)


def _float8(weight: Tensor, quantization: Quantization) -> Encoded:
    if quantization.zero_point is not None and quantization.zero_point.dequantize(np.float32).any():
        raise Unsupported("has float8 codes with zero points, which no layout can hold", tensor=weight.name)
    weight = replace(weight, quantization=replace(quantization, zero_point=None))
    module = _module(weight.name)
    codes = {f"{module}.weight": replace(weight, quantization=None)}
    if _has_exponents(quantization, weight):
        return _in_mx_blocks(weight, codes, ConfigGroup(8, "float", "group", MX_BLOCK, (0, 0), "mxfp8-quantized"))
    weight, of_factor = without_factor(weight)
    weight, of_scales = rounded_with_scales(weight, widened=True)
    scheme = _scheme(weight, 8, "float", "float-quantized", grouped=True)
    stored = {**codes, f"{module}.weight_scale": _scale(module, weight.quantized().scale, scheme)}
    return _encoded(weight, stored, WeightScheme(scheme), of_factor + of_scales)


def _float4(weight: Tensor, quantization: Quantization) -> Encoded:
    if quantization.zero_point is not None:
        raise Unsupported("has float4 codes with zero points, which the library leaves out", tensor=weight.name)
    key = f"{_module(weight.name)}.weight_packed"
    codes = {key: Tensor(key, (weight.shape[0], weight.shape[1] // 2), UINT8, weight.data)}
    if _has_exponents(quantization, weight):
        return _in_mx_blocks(weight, codes, ConfigGroup(4, "float", "group", MX_BLOCK, (0, 0), "mxfp4-pack-quantized"))
    if quantization.factor != 1:
        raise Unsupported("has float4 codes with a factor, which no layout can hold", tensor=weight.name)
    if quantization.scale.dtype == FLOAT8_E4M3 and _is_in_blocks(weight, quantization, NVFP4_BLOCK):
        return _nvfp4(weight, quantization, codes)
    raise Unsupported(
        f"has float4 codes with scales of {quantization.scale.dtype} in blocks of {quantization.block_shape}: "
        f"float8_e8m0fnu in blocks of {MX_BLOCK}, or float8_e4m3fn in blocks of {NVFP4_BLOCK}, is needed",
        tensor=weight.name,
    )


def _has_exponents(quantization: Quantization, weight: Tensor) -> bool:
    scale = quantization.scale
    exact = scale.dtype == FLOAT8_E8M0 and scale.quantization is None and quantization.factor == 1
    return exact and _is_in_blocks(weight, quantization, MX_BLOCK)


def _is_in_blocks(weight: Tensor, quantization: Quantization, size: int) -> bool:
    return quantization.block_shape == (1, size) and weight.shape[1] % size == 0


def _in_mx_blocks(weight: Tensor, codes: Mapping[str, Tensor], scheme: ConfigGroup) -> Encoded:
    quantization, key = weight.quantized(), f"{_module(weight.name)}.weight_scale"
    exponents = replace(quantization.scale, name=key, dtype=UINT8)
    weight, losses = powers_in_float32(weight)
    return _encoded(weight, {**codes, key: exponents}, WeightScheme(scheme), losses)


def _nvfp4(weight: Tensor, quantization: Quantization, codes: Mapping[str, Tensor]) -> Encoded:
    module, outer = _module(weight.name), quantization.scale
    divisor, losses = _divisor(weight.name, outer)
    key = f"{module}.weight_global_scale"
    stored_divisor = Tensor.from_array(key, np.array([divisor], np.float32))
    scale = replace(outer, name=f"{module}.weight_scale", quantization=None)
    weight, rounded = rounded_to(weight, BFLOAT16, "to which the library rounds them")
    quotients = replace(divided(scale, stored_divisor), name="scale")
    weight = replace(weight, quantization=replace(weight.quantized(), scale=quotients))
    scheme = ConfigGroup(4, "float", "tensor_group", NVFP4_BLOCK, (0, 0), "nvfp4-pack-quantized")
    stored = {**codes, scale.name: scale, key: stored_divisor}
    return _encoded(weight, stored, WeightScheme(scheme), (*losses, *rounded))


def _divisor(name: str, scale: Tensor) -> tuple[np.float32, tuple[Loss, ...]]:
    """By what the library must divide float8 scales, and the loss where that gives other numbers than multiplying by
    the second-level scale does, for any float8."""
    outer = scale.quantization
    if outer is None:
        return np.float32(1), ()
    if outer.scale.size != 1 or [role for role, _ in outer.parameters()] != ["scale"]:
        raise Unsupported("has scales that are more than float8 by one number for all of them", tensor=name)
    every = Tensor("scale", (_FLOAT8S,), FLOAT8_E4M3, InMemory(np.arange(_FLOAT8S, dtype=np.uint8)))
    one = replace(outer.scale, shape=(1,))
    nested = replace(outer, scale=one, block_shape=every.shape)
    with np.errstate(all="ignore"):
        divisor = np.float32(1) / np.float32(one.dequantize(np.float32)[0])
        quotients = every.numpy().astype(np.float32) / divisor
    if not np.isfinite(divisor) or not divisor:
        seen = one.dequantize(np.float32)[0]
        raise Unsupported(f"has the second-level scale {seen}, whose reciprocal is not a float32", tensor=name)
    if np.array_equal(replace(every, quantization=nested).dequantize(np.float32), quotients):
        return divisor, ()
    return divisor, (
        Loss(
            name, "rounded", f"its scales are divided by {divisor} instead of multiplied, so values round differently"
        ),
    )


def _scheme(weight: Tensor, bits: int, kind: str, layout: str, *, grouped: bool) -> ConfigGroup:
    """The scheme of a weight's blocks; `grouped`: these may be groups, and not only blocks."""
    sizes = zip(weight.quantized().block_shape, weight.shape, strict=True)
    height, width = (min(block, size) for block, size in sizes)
    rows, columns = weight.shape
    if (height, width) == (rows, columns):
        return ConfigGroup(bits, kind, "tensor", 0, (0, 0), layout)
    if height == 1 and width == columns and grouped:
        return ConfigGroup(bits, kind, "channel", 0, (0, 0), layout)
    if height == 1 and columns % width == 0 and grouped:
        return ConfigGroup(bits, kind, "group", width, (0, 0), layout)
    return ConfigGroup(bits, kind, "block", 0, (height, width), layout)


def _scale(module: str, scale: Tensor, scheme: ConfigGroup) -> Tensor:
    return replace(scale, name=f"{module}.weight_scale", shape=(1,) if scheme.strategy == "tensor" else scale.shape)


def _encoded(
    weight: Tensor,
    stored: Mapping[str, Tensor],
    written: WeightScheme,
    losses: tuple[Loss, ...],
    zero_point: Tensor | None = None,
) -> Encoded:
    """The weight as reading `stored` gives it: in blocks no larger than itself, with these zero points or none."""
    quantization = weight.quantized()
    blocks = tuple(min(block, size) for block, size in zip(quantization.block_shape, weight.shape, strict=True))
    scale = replace(quantization.scale, name="scale")
    quantization = replace(quantization, scale=scale, block_shape=blocks, zero_point=zero_point)
    return Encoded(replace(weight, quantization=quantization), stored, written, losses)
