"""Weights as MLX's quantized layers and embeddings have them: `mlx` tells the layout.

Codes of 2, 4 and 8 bits are written in mode affine, in groups of 128, 64 or 32; small floats in the modes that MLX has
for them, where these hold the scales as they are. A zero point z becomes the bias -scale * z, rounded to the dtype in
which the source computes; whether a value changes by it is found for every code that there can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3, FLOAT8_E8M0, FLOAT32, UINT8, UINT32
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor, blocked
from nibblecast.formats.encodings.bytes.bit_fields import code_dtype
from nibblecast.formats.encodings.checkpoint import Checkpoint, WeightTensors
from nibblecast.formats.encodings.mlx.read import DEFAULTS, ModuleSettings, decode
from nibblecast.formats.encodings.values.exactness import largest_change
from nibblecast.formats.encodings.values.parameters import FLOATS
from nibblecast.formats.encodings.values.refit import (
    flat,
    from_elements,
    in_pieces,
    integer_quantization,
    refined,
    unsigned,
)
from nibblecast.formats.encodings.writable import Configuration, Encoded

_AFFINE_SIZES = (128, 64, 32)
#: The dtypes of codes and of scales in the modes of small floats.
_FLOAT_MODES = {
    "mxfp4": (FLOAT4, FLOAT8_E8M0),
    "mxfp8": (FLOAT8_E4M3, FLOAT8_E8M0),
    "nvfp4": (FLOAT4, FLOAT8_E4M3),
}
_FLOAT_CODES = frozenset((FLOAT4, FLOAT8_E4M3))
_WORD_BITS = 32
_METADATA = {"format": "mlx"}


def encode(weight: Tensor) -> Encoded:
    """The weight as words, scales and, in mode affine, biases; no code is read for it, but parameters are. Raises
    Unsupported for names, shapes, sizes of groups and parameters that MLX has not."""
    module = _module(weight)
    formed = _small_float_form(weight) if weight.dtype in _FLOAT_CODES else _affine_form(weight)
    setting = formed.setting
    blocks = blocked(weight.shape, len(weight.shape) - 1, setting.size)
    quantization = refined(formed.weight, blocks).quantized()
    words = (*weight.shape[:-1], weight.shape[-1] * setting.bits // _WORD_BITS)
    stored = {
        f"{module}.weight": Tensor(f"{module}.weight", words, UINT32, formed.weight.data),
        f"{module}.scales": replace(quantization.scale, name=f"{module}.scales"),
    }
    if quantization.offset is not None:
        stored[f"{module}.biases"] = replace(quantization.offset, name=f"{module}.biases")
    else:  # safetensors has these dtypes of scales, but MLX takes their bytes
        stored[f"{module}.scales"] = replace(stored[f"{module}.scales"], dtype=UINT8)
    read = decode(WeightTensors(module, Checkpoint(stored, setting.entries())))
    return Encoded(read.tensor, stored, setting, formed.losses)


def configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
    """`quantization`, and the same as `quantization_config`, as mlx-lm 0.32 writes both: the most common setting, and
    those of modules that have another one. Modules without scales need no entry. Raises Unsupported for such a module
    that is called as a setting is."""
    settings: dict[str, ModuleSettings] = {name.removesuffix(".weight"): each.setting for name, each in weights.items()}
    if not settings:
        return Configuration({}, metadata=_METADATA)
    common = Counter(settings.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = common.entries()
    for module, setting in settings.items():
        if setting == common:
            continue
        if module in quantization:
            raise Unsupported("has the name of a setting of all of MLX's modules", tensor=f"{module}.weight")
        quantization[module] = setting.entries()
    in_float32 = sum(any(part.dtype == FLOAT32 for part in each.stored.values()) for each in weights.values())
    note = f"{in_float32} of {len(weights)} weights have scales of float32, in which MLX computes with these then"
    notes = (note,) if in_float32 else ()
    return Configuration({"quantization": quantization, "quantization_config": quantization}, {}, _METADATA, notes)


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """A weight of unsigned codes or small floats with parameters as MLX has them, but for the blocks of the source."""

    weight: Tensor
    setting: ModuleSettings
    losses: tuple[Loss, ...]


def _module(weight: Tensor) -> str:
    """The name of the module whose weight it is. Raises Unsupported for what no module's weight can be."""
    module = weight.name.removesuffix(".weight")
    if module in ("", weight.name):
        raise Unsupported("is not called '<module>.weight', as quantized weights of MLX are", tensor=weight.name)
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        message = f"has shape {weight.shape}, where MLX quantizes matrices and stacks of them"
        raise Unsupported(message, tensor=weight.name)
    if weight.quantized().group_index is not None:
        raise Unsupported("has a group index, where groups of MLX are inputs side by side", tensor=weight.name)
    return module


def _affine_form(weight: Tensor) -> _Form:
    integer_quantization(weight)
    size = next((size for size in _AFFINE_SIZES if _fits(weight, size)), 0)
    if not size:
        raise Unsupported(
            f"has rows of {weight.shape[-1]} codes in {_blocks(weight)}, where MLX needs groups of 32, 64 or 128 "
            "without a rest",
            tensor=weight.name,
        )
    codes = weight if weight.dtype == code_dtype(weight.bits, signed=False) else unsigned(weight)
    losses = _losses(codes, _with_biases)
    return _Form(_with_biases(codes), ModuleSettings("affine", size, weight.bits), losses)


def _small_float_form(weight: Tensor) -> _Form:
    quantization = weight.quantized()
    if quantization.zero_point is not None or quantization.offset is not None:
        raise Unsupported(f"has codes of {weight.dtype} with a zero point or an offset", tensor=weight.name)
    for mode, (dtype, scale_dtype) in _FLOAT_MODES.items():
        size, bits = DEFAULTS[mode]
        if (
            weight.dtype == dtype
            and _fits(weight, size)
            and _holds(scale_dtype, quantization.scale, quantization.factor)
        ):
            with_scales = partial(_with_small_scales, dtype=scale_dtype)
            return _Form(with_scales(weight), ModuleSettings(mode, size, bits), _losses(weight, with_scales))
    raise Unsupported(
        f"has codes of {weight.dtype} and scales in {_blocks(weight)} that no mode of MLX holds: mxfp4 has powers of "
        "two for 32 codes of float4 each, nvfp4 numbers of float8_e4m3fn for 16 without a second scale, mxfp8 powers "
        "of two for 32 codes of float8_e4m3fn",
        tensor=weight.name,
    )


def _fits(weight: Tensor, size: int) -> bool:
    """Whether groups of `size` inputs fill rows, and have one set of parameters each."""
    columns, block = weight.shape[-1], weight.quantized().block_shape[-1]
    return columns % size == 0 and (block >= columns or block % size == 0)


def _blocks(weight: Tensor) -> str:
    return f"blocks of {weight.quantized().block_shape}"


def _holds(dtype: np.dtype[Any], scale: Tensor, factor: float) -> bool:
    """Whether every scale times the factor is a number of `dtype`."""
    for piece in in_pieces({"scale": scale}):
        values = piece["scale"].astype(np.float64) * factor
        with np.errstate(all="ignore"):
            held = values.astype(np.float32).astype(dtype).astype(np.float64)
        if not (held == values).all():
            return False
    return True


def _with_small_scales(weight: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """The weight with scales of float8, which hold them as they are; values are computed in float32."""
    quantization = weight.quantized()
    scale, factor = quantization.scale, quantization.factor

    def narrowed(scale: NDArray[Any]) -> NDArray[Any]:
        return (scale.astype(np.float64) * factor).astype(np.float32).astype(dtype)

    if factor != 1 or not _is_plain(scale, dtype):
        scale = from_elements("scale", {"scale": scale}, dtype, narrowed)
    return replace(weight, quantization=Quantization(scale, quantization.block_shape))


def _with_biases(weight: Tensor) -> Tensor:
    """scale * code + offset, each operation rounded to the dtype of both, which is that of the weight's values (float32
    where they are of float64). Zero points and factors are multiplied in float64."""
    quantization = weight.quantized()
    dtype, factor = _value_dtype(quantization), quantization.factor
    plain = all(_is_plain(parameter, dtype) for _, parameter in quantization.parameters())
    if plain and _is_kept(quantization) and quantization.offset is not None:
        return weight

    @np.errstate(over="ignore", invalid="ignore")  # what has no value any more is found by its change
    def rounded(numbers: NDArray[np.float64]) -> NDArray[Any]:
        return (numbers * factor).astype(dtype)

    def scales(scale: NDArray[Any]) -> NDArray[Any]:
        return rounded(scale.astype(np.float64))

    @np.errstate(over="ignore", invalid="ignore")  # infinity times zero, and what is beyond float64
    def biases(
        scale: NDArray[Any], zero_point: NDArray[Any] | None = None, offset: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        bias = np.zeros(scale.shape) if offset is None else offset.astype(np.float64)
        return rounded(bias if zero_point is None else bias - scale.astype(np.float64) * zero_point)

    changed = Quantization(
        from_elements("scale", {"scale": quantization.scale}, dtype, scales),
        quantization.block_shape,
        offset=from_elements("offset", dict(quantization.parameters()), dtype, biases),
        compute_dtype=dtype,
    )
    return replace(weight, quantization=changed)


def _value_dtype(quantization: Quantization) -> np.dtype[Any]:
    """The dtype that values are rounded to at last: float16, bfloat16 or float32."""
    dtype = quantization.value_dtype or quantization.compute_dtype
    return dtype if dtype in FLOATS else FLOAT32


def _is_plain(parameter: Tensor, dtype: np.dtype[Any]) -> bool:
    return parameter.dtype == dtype and parameter.quantization is None


def _is_kept(quantization: Quantization) -> bool:
    """Whether values are computed as MLX does, of parameters that its dtype holds: nothing needs to be tried."""
    dtype = quantization.compute_dtype
    dtypes = {flat(parameter).dtype for _, parameter in quantization.parameters()}
    return (
        quantization.zero_point is None
        and quantization.factor == 1
        and quantization.value_dtype is None
        and dtype in FLOATS
        and (dtypes == {dtype} or (dtype == FLOAT32 and np.float64 not in dtypes))
    )


def _losses(weight: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Loss, ...]:
    """The loss where `function`, which makes MLX's parameters, changes a value. Raises Unsupported where values get
    lost."""
    quantization = weight.quantized()
    change = 0.0 if _is_kept(quantization) else largest_change(weight, function, FLOAT32)
    if not change:
        return ()
    after, own = function(weight).quantized(), _value_dtype(quantization)
    if change == np.inf:
        message = f"has parameters beyond what {after.compute_dtype} holds as scale * code + bias"
        raise Unsupported(message, tensor=weight.name)
    if own != FLOAT32:
        change = largest_change(weight, function, own)
    computed = "scale * code" if after.offset is None else "scale * code + bias"
    detail = f"its values become {computed}, each step rounded to {after.compute_dtype} as MLX does: as {own} they "
    return (Loss(weight.name, "rounded", detail + (f"change by at most {change:.2g}" if change else "stay")),)
