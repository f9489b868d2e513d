"""Writing torchao 0.18's tensors into safetensors files, with the metadata of its flatten_tensor_state_dict.

    int2, int4, int8                            IntxUnpackedToInt8Tensor, a code in each byte, in any blocks
    float4, float8 with exponents for 32        MXTensor
    float4 with float8 scales for 16            NVFP4Tensor, with a second-level scale or without

`torchao_safetensors` says how they are called and described. The metadata are those of the whole model, in each of its
files, as transformers looks for them; config.json has the torchao configuration that would make such tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    FLOAT4,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT8_E8M0,
    FLOAT32,
    INT8,
    SUB_BYTE,
    UINT8,
    integer_range,
    is_integer,
)
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.widths import dtype_for, widened
from nibblecast.formats.encodings.torchao.safetensors_keys import NAMES
from nibblecast.formats.encodings.values.offsets import offsets_as_zero_points
from nibblecast.formats.encodings.values.parameters import FLOATS
from nibblecast.formats.encodings.values.refit import (
    computed_in,
    computed_with_scales,
    constant,
    elementwise,
    extent,
    flat,
    integer_quantization,
    own_dtype,
    refined,
    rounded_to,
    signed,
    without_factor,
)
from nibblecast.formats.encodings.writable import Configuration, Encoded

_FLOAT8S = frozenset((FLOAT8_E4M3, FLOAT8_E5M2))
_MX_BLOCK = 32
_NVFP4_BLOCK = 16
#: Blocks are made smaller to divide a shape, down to this many codes: parameters of less take more room than these.
_SMALLEST_BLOCK = 8


@dataclass(frozen=True, slots=True, eq=False)
class WeightMetadata:
    """How a weight is written: the entry of the metadata, and the configuration that would make such tensors."""

    entry: Mapping[str, Any]
    configuration: Mapping[str, Any]


def encode(weight: Tensor) -> Encoded:
    """The tensors that torchao's wrap: `<module>._weight_qdata` for `<module>.weight`, and so on."""
    quantization = weight.quantization
    if quantization is None or not weight.shape or not weight.size:
        raise Unsupported(f"has the shape {weight.shape}, where quantized codes are needed", tensor=weight.name)
    if not weight.name.rpartition(".")[0]:
        raise Unsupported("is not called after a module, as <module>.weight", tensor=weight.name)
    if quantization.codebook is not None:
        raise Unsupported("has codes that are looked up in a codebook", tensor=weight.name)
    if quantization.group_index is not None:
        raise Unsupported("has a group index (act-order), which torchao cannot hold", tensor=weight.name)
    if weight.dtype != FLOAT4 and weight.dtype not in _FLOAT8S:
        return _integers(weight)
    scale = quantization.scale
    if (
        quantization.zero_point is None
        and quantization.offset is None
        and quantization.factor == 1
        and len(weight.shape) >= 2
    ):
        is_plain = scale.quantization is None
        if scale.dtype == FLOAT8_E8M0 and is_plain and _is_in_blocks(weight, quantization, _MX_BLOCK):
            return _mx(weight, quantization)
        if weight.dtype == FLOAT4 and scale.dtype == FLOAT8_E4M3 and _is_in_blocks(weight, quantization, _NVFP4_BLOCK):
            return _nvfp4(weight, quantization)
    raise Unsupported(
        f"has {weight.dtype} codes with scales of {scale.dtype} in blocks of {quantization.block_shape}: "
        f"float8_e8m0fnu in blocks of {_MX_BLOCK}, or float8_e4m3fn in blocks of {_NVFP4_BLOCK} for float4, is needed",
        tensor=weight.name,
    )


def configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
    """The metadata of all tensors, and `quantization_config`."""
    if not weights:
        return Configuration({})
    entries: dict[str, Mapping[str, Any]] = {name: encoded.setting.entry for name, encoded in weights.items()}
    entries |= {name: {"_type": "Tensor"} for name in plain if "." in name}
    metadata = {name: json.dumps(entry) for name, entry in entries.items()}
    made_by = {name.rpartition(".")[0]: encoded.setting.configuration for name, encoded in weights.items()}
    kinds = list({json.dumps(kind): kind for kind in made_by.values()}.values())
    kind = kinds[0] if len(kinds) == 1 else _object("FqnToConfig", {"fqn_to_config": made_by}, version=1)
    entry = {
        "include_input_output_embeddings": True,
        "modules_to_not_convert": None,
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "untie_embedding_weights": False,
    }
    metadata |= {"format": "pt", NAMES: json.dumps(list(entries))}
    return Configuration({"quantization_config": entry}, metadata=metadata, notes=_notes(weights))


def _notes(weights: Mapping[str, Encoded]) -> tuple[str, ...]:
    attributes = [encoded.setting.entry["_data"] for encoded in weights.values()]
    dtypes = sorted({(data.get("dtype") or data.get("orig_dtype"))["_data"] for data in attributes})
    notes = [f"torchao decodes these weights to {' and '.join(dtypes)}: load the model with that dtype"]
    if any(data.get("act_quant_kwargs") for data in attributes):
        notes.append("torchao multiplies an MXTensor only by rounded activations: they are rounded to float8 here")
    return tuple(notes)


def _is_in_blocks(weight: Tensor, quantization: Quantization, size: int) -> bool:
    along = quantization.block_shape == (*(1,) * (len(weight.shape) - 1), size)
    return along and weight.shape[-1] % size == 0


def _integers(weight: Tensor) -> Encoded:
    integer_quantization(weight)
    weight, of_offsets = offsets_as_zero_points(weight)
    weight, of_factor = without_factor(weight)
    weight, of_scales = _with_its_scales(_in_whole_blocks(weight))
    codes, target = _signed(weight)
    quantization = codes.quantized()
    zero_point = quantization.zero_point or constant("zero_point", 0, quantization.scale.shape, INT8)
    scale = replace(quantization.scale, name="scale")
    quantization = replace(quantization, scale=scale, zero_point=replace(zero_point, name="zero_point"))
    qdata = Tensor("qdata", weight.shape, INT8, widened(codes, INT8))
    parts = {"qdata": qdata, "scale": scale, "zero_point": zero_point}
    attributes = {
        "target_dtype": _dtype(target),
        "block_size": list(quantization.block_shape),
        "dtype": _dtype(quantization.compute_dtype.name),
        "activation_quantization": None,
    }
    entry = _entry("IntxUnpackedToInt8Tensor", attributes, parts)
    written = WeightMetadata(entry, _intx_configuration(target, weight.shape, quantization))
    return _encoded(replace(codes, quantization=quantization), parts, written, of_offsets + of_factor + of_scales)


def _intx_configuration(target: str, shape: tuple[int, ...], quantization: Quantization) -> dict[str, Any]:
    """The configuration of such weights; it knows groups along the last axis, and whole rows."""
    blocks, zero_point = quantization.block_shape, quantization.zero_point
    is_grouped = prod(blocks) == blocks[-1] < shape[-1]
    granularity = ("PerGroup", {"group_size": blocks[-1]}) if is_grouped else ("PerAxis", {"axis": 0})
    symmetric = zero_point is None or (is_integer(zero_point.dtype) and extent(zero_point) == (0, 0))
    made_by = {
        "weight_dtype": _dtype(target),
        "granularity": _object(*granularity, version=1),
        "mapping_type": _object("MappingType", "SYMMETRIC" if symmetric else "ASYMMETRIC"),
        "scale_dtype": None,
        "intx_packing_format": _object("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": _object("IntxChooseQParamsAlgorithm", "AFFINE"),
    }
    return _object("IntxWeightOnlyConfig", made_by, version=2)


def _in_whole_blocks(weight: Tensor) -> Tensor:
    """In blocks that divide the shape, as torchao's must: the largest ones that do."""
    quantization = weight.quantized()
    old = tuple(min(block, size) for block, size in zip(quantization.block_shape, weight.shape, strict=True))
    new = tuple(gcd(block, size) for block, size in zip(old, weight.shape, strict=True))
    if new != old and prod(new) < _SMALLEST_BLOCK:
        raise Unsupported(f"has parameters in blocks of {old}, which do not divide {weight.shape}", tensor=weight.name)
    return refined(weight, new)


def _with_its_scales(weight: Tensor) -> tuple[Tensor, tuple[Loss, ...]]:
    """With scales, and computed in a dtype, that torchao has."""
    quantization = weight.quantized()
    scale, own = quantization.scale, own_dtype(quantization)
    if scale.quantization is None and scale.dtype in FLOATS and own in FLOATS:
        return computed_in(weight, own, "as before")
    return computed_with_scales(weight)


def _signed(weight: Tensor) -> tuple[Tensor, str]:
    """Signed codes with zero points of int8, and the dtype that torchao calls them. Zero points that are no integers
    could not be shifted exactly: with those, unsigned codes become signed ones of one bit more."""
    zero_point = weight.quantized().zero_point
    if zero_point is None or _are_integers(zero_point):
        codes = signed(weight)
        quantization = codes.quantized()
        if quantization.zero_point is not None:
            lowest, highest = extent(quantization.zero_point)
            if lowest < -128 or highest > 127:
                seen = f"zero points from {lowest} to {highest} for signed codes"
                raise Unsupported(f"has {seen}: int8 is needed", tensor=weight.name)
            narrow = elementwise(quantization.zero_point, INT8, lambda values: values)
            codes = replace(codes, quantization=replace(quantization, zero_point=narrow))
        return codes, f"int{codes.bits}"
    return _with_float_zero_points(weight, zero_point)


def _with_float_zero_points(weight: Tensor, zero_point: Tensor) -> tuple[Tensor, str]:
    bits = weight.bits + (dtype_for(*integer_range(weight.bits, signed=True)) != weight.dtype)
    if bits > 8:
        raise Unsupported("has uint8 codes with zero points that are not integers", tensor=weight.name)
    quantization = weight.quantized()
    values = flat(zero_point).numpy().astype(np.float32)
    rounded = elementwise(zero_point, quantization.compute_dtype, lambda stored: stored)
    if not np.array_equal(rounded.numpy().astype(np.float32), values, equal_nan=True):
        kept = quantization.compute_dtype
        raise Unsupported(f"has zero points of {zero_point.dtype} that are not numbers of {kept}", tensor=weight.name)
    dtype = dtype_for(*integer_range(bits, signed=True))
    quantization = replace(quantization, zero_point=rounded)
    return replace(weight, dtype=dtype, data=widened(weight, dtype), quantization=quantization), f"int{bits}"


def _are_integers(zero_point: Tensor) -> bool:
    values = flat(zero_point).numpy()
    return is_integer(values.dtype) or bool((values == np.rint(values.astype(np.float32))).all())


def _mx(weight: Tensor, quantization: Quantization) -> Encoded:
    """torchao's own way to MXTensors of float4 is from bfloat16, which has all their values."""
    scale = replace(quantization.scale, name="scale")
    shown = BFLOAT16 if weight.dtype == FLOAT4 else _shown(quantization)
    parts = {"qdata": _bytes(weight), "scale": scale}
    element = _dtype("float4_e2m1fn_x2" if weight.dtype == FLOAT4 else weight.dtype.name)
    float8, emulated = _dtype(FLOAT8_E4M3.name), _object("KernelPreference", "EMULATED")
    activations = {
        "elem_dtype": float8,
        "block_size": _MX_BLOCK,
        "scaling_mode": _object("ScaleCalculationMode", "FLOOR"),
        "kernel_preference": emulated,
        "is_swizzled_scales": False,
    }
    attributes = {
        "elem_dtype": element,
        "block_size": _MX_BLOCK,
        "orig_dtype": _dtype(shown.name),
        "kernel_preference": emulated,
        "act_quant_kwargs": _object("QuantizeTensorToMXKwargs", activations),
        "is_swizzled_scales": False,
    }
    made_by = {
        "block_size": _MX_BLOCK,
        "activation_dtype": element,
        "weight_dtype": element,
        "kernel_preference": emulated,
        "scaling_mode": _object("ScaleCalculationMode", "FLOOR"),
    }
    written = WeightMetadata(
        _entry("MXTensor", attributes, parts), _object("MXDynamicActivationMXWeightConfig", made_by, version=1)
    )
    is_exact = weight.dtype == FLOAT4 and own_dtype(quantization) == FLOAT32
    encoded = _small_floats(weight, scale, parts, written, shown)
    return replace(encoded, losses=()) if is_exact else encoded


def _nvfp4(weight: Tensor, quantization: Quantization) -> Encoded:
    stored = replace(quantization.scale, name="scale", quantization=None)
    parts = {"qdata": _bytes(weight), "scale": stored}
    scale = stored
    if quantization.scale.quantization is not None:
        outer, blocks = _per_tensor_scale(weight, quantization.scale, quantization.scale.quantization)
        parts = {"per_tensor_scale": outer, **parts}
        grid = quantization.scale.quantization.scale.shape
        scale = replace(scale, quantization=Quantization(replace(outer, name="scale", shape=grid), blocks))
    attributes = {
        "is_swizzled_scales": False,
        "use_triton_kernel": False,
        "act_quant_kwargs": None,
        "block_size": _NVFP4_BLOCK,
        "orig_dtype": _dtype(_shown(quantization).name),
    }
    made_by = {"use_dynamic_per_tensor_scale": "per_tensor_scale" in parts}
    written = WeightMetadata(
        _entry("NVFP4Tensor", attributes, parts), _object("NVFP4WeightOnlyConfig", made_by, version=1)
    )
    return _small_floats(weight, scale, parts, written, _shown(quantization))


def _per_tensor_scale(weight: Tensor, scale: Tensor, nested: Quantization) -> tuple[Tensor, tuple[int, ...]]:
    """The second-level scale as it is stored, one number or one for each expert, and the blocks of scales that it is
    for."""
    outer, size = nested.scale, nested.scale.size
    is_float32 = outer.dtype in FLOATS and nested.compute_dtype == FLOAT32 and nested.factor == 1
    is_whole = size == 1 or (len(scale.shape) == 3 and outer.shape == (scale.shape[0], 1, 1))
    if not is_float32 or not is_whole or [role for role, _ in nested.parameters()] != ["scale"]:
        raise Unsupported("has scales that are more than float8 by one number for all of them", tensor=weight.name)
    stored = elementwise(outer, FLOAT32, lambda values: values)
    shape = () if size == 1 else outer.shape
    blocks = per_tensor(scale.shape) if size == 1 else per_axis(scale.shape, 0)
    return replace(stored, name="per_tensor_scale", shape=shape), blocks


def _shown(quantization: Quantization) -> np.dtype[Any]:
    """The dtype that a tensor shows, to which torchao rounds values that it computes in float32."""
    own = own_dtype(quantization)
    return own if own in FLOATS else FLOAT32


def _small_floats(
    weight: Tensor, scale: Tensor, parts: Mapping[str, Tensor], written: WeightMetadata, shown: np.dtype[Any]
) -> Encoded:
    weight, losses = rounded_to(weight, shown, "which the tensor shows")
    quantization = replace(weight.quantized(), scale=scale)
    return _encoded(replace(weight, quantization=quantization), parts, written, losses)


def _bytes(weight: Tensor) -> Tensor:
    """Codes as they are stored: two of float4 in a byte."""
    if weight.dtype not in SUB_BYTE:
        return replace(weight, quantization=None)
    return Tensor("qdata", (*weight.shape[:-1], weight.shape[-1] // 2), UINT8, weight.data)


def _encoded(weight: Tensor, parts: Mapping[str, Tensor], written: WeightMetadata, losses: tuple[Loss, ...]) -> Encoded:
    module, _, parameter = weight.name.rpartition(".")
    stored = {f"{module}._{parameter}_{role}": tensor for role, tensor in parts.items()}
    return Encoded(weight, {key: replace(tensor, name=key) for key, tensor in stored.items()}, written, losses)


def _entry(kind: str, attributes: Mapping[str, Any], parts: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"_type": kind, "_data": dict(attributes), "_tensor_data_names": list(parts)}


def _object(kind: str, data: Any, version: int | None = None) -> dict[str, Any]:
    """An object as torchao's JSON has it; those of configurations have a version."""
    return {"_type": kind} | ({} if version is None else {"_version": version}) | {"_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return _object("torch.dtype", name)
