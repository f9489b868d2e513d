"""MLX's quantized layers and embeddings (mlx 0.32, mlx.core.quantize): `<module>.weight` uint32 and `.scales`.

    affine       weight uint32 (O, I * bits / 32), a row's codes of 1 to 8 bits, lowest bits first, across words;
                 scales, biases float (O, I / group_size): scale * code + bias, rounded after each operation
    mxfp4, mxfp8 float4 and float8 codes; scales uint8 (O, I / 32), exponents
    nvfp4        float4 codes; scales uint8 (O, I / 16), the bytes of float8_e4m3fn

config.json has `group_size`, `bits` and `mode` for all of them, and under a module's path for that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Quantization, Tensor, blocked
from nibblecast.formats.encodings.bytes.bit_fields import along_rows
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors, is_size
from nibblecast.formats.encodings.values.parameters import exponents, float_scales, small_floats

METHODS = frozenset(("mlx",))

_PARTS = (".weight", ".scales", ".biases")
#: Size of a group and bits of a code where the configuration leaves them out.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_BITS = frozenset((1, 2, 3, 4, 5, 6, 8))


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """What MLX is told of a module's codes; `size` is that of a group."""

    mode: str
    size: int
    bits: int

    def entries(self) -> dict[str, Any]:
        """As a configuration says it."""
        return {"group_size": self.size, "bits": self.bits, "mode": self.mode}


def claims(stored: WeightTensors) -> bool:
    """Whether there are words of codes, and scales."""
    weight = stored.get(".weight")
    return weight is not None and weight.dtype == np.uint32 and stored.get(".scales") is not None


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I), or (E, O, I) for experts. Raises Unsupported for modes that are not known;
    CorruptFile where shapes, dtypes or configuration do not fit."""
    weight, scales = stored[".weight"], stored[".scales"]
    if len(weight.shape) < 2 or scales.shape[:-1] != weight.shape[:-1]:
        raise CorruptFile(f"has words of shape {weight.shape} and scales of {scales.shape}")
    if stored.get(".global_scale") is not None:
        raise Unsupported("has a global_scale: quantize it without with MLX")
    setting = _setting(stored)
    if weight.shape[-1] * 32 != setting.bits * setting.size * scales.shape[-1]:
        raise CorruptFile(
            f"has {weight.shape[-1]} words and {scales.shape[-1]} groups in a row, "
            f"but its configuration says {setting.bits} bits and a group_size of {setting.size}"
        )
    name = f"{stored.prefix}.weight"
    if setting.mode == "affine":
        return DecodedWeight(_affine(stored, name, weight, float_scales(scales), setting), _PARTS)
    dtype = FLOAT8_E4M3 if setting.mode == "mxfp8" else FLOAT4
    if scales.dtype != np.uint8:
        raise CorruptFile(f"has scales of {scales.dtype} in mode '{setting.mode}', where uint8 is needed")
    scale = replace(scales, name="scale", dtype=FLOAT8_E4M3) if setting.mode == "nvfp4" else exponents(scales)
    return DecodedWeight(small_floats(name, dtype, weight, scale, setting.size), _PARTS)


def _affine(stored: WeightTensors, name: str, weight: Tensor, scales: Tensor, setting: ModuleSettings) -> Tensor:
    biases = float_scales(stored[".biases"])
    if biases.shape != scales.shape or biases.dtype != scales.dtype:
        raise CorruptFile(
            f"has scales of {scales.dtype} and shape {scales.shape}, but biases of {biases.dtype} and {biases.shape}"
        )
    columns = scales.shape[-1] * setting.size
    codes = along_rows(name, weight, columns, setting.bits)
    quantization = Quantization(
        replace(scales, name="scale"),
        blocked(codes.shape, len(codes.shape) - 1, setting.size),
        offset=replace(biases, name="offset"),
        compute_dtype=scales.dtype,
    )
    return replace(codes, quantization=quantization)


def _setting(stored: WeightTensors) -> ModuleSettings:
    """What the configuration says about the module. Without biases and without a mode for the module itself, it has
    the mode of the model."""
    config = stored.checkpoint.config
    own = config.get(stored.prefix)
    if own is False:
        raise CorruptFile("is quantized, but its configuration says that it is not")
    has_biases = stored.get(".biases") is not None
    if not isinstance(own, Mapping):
        own = config
        if has_biases and not {"group_size", "bits"} <= config.keys():
            raise CorruptFile("is quantized by MLX, but no config.json says its group_size and bits")
    mode = own.get("mode") or ("affine" if has_biases else config.get("mode", "affine"))
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise Unsupported(f"is in MLX's mode {brief(mode)}, which is not supported: {', '.join(DEFAULTS)} are")
    if has_biases != (mode == "affine"):
        raise CorruptFile(f"is in mode '{mode}', but has {'' if has_biases else 'no '}biases")
    size, bits = _number(own, "group_size", mode), _number(own, "bits", mode)
    if (mode == "affine" and bits not in _BITS) or (mode != "affine" and (size, bits) != DEFAULTS[mode]):
        raise CorruptFile(f"has codes of {bits} bits in groups of {size}, which mode '{mode}' has not")
    return ModuleSettings(mode, size, bits)


def _number(config: Mapping[str, Any], key: str, mode: str) -> int:
    default = DEFAULTS[mode][key == "bits"]
    value = config.get(key, default)
    if not is_size(value) or value < 1:
        raise CorruptFile(f"has {key} {brief(value)} in its configuration, where a positive integer is needed")
    return int(value)
