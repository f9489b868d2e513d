"""Models in quantization-aware training: float weights with the parameters of the fake quantizer beside them.

    <m>.weight                           float
    <m>.weight_fake_quant.scale          (1,) or (C,), zero_point likewise: torch.ao.quantization.FakeQuantize
    <m>.weight_fake_quant.activation_post_process.min_val, .max_val      what its observer saw
    <m>.weight_fake_quantizer.scale      (O, G): torchao's learned ranges

A state dict says neither the range of codes nor the axis; a pickled module does (quant_min, quant_max, ch_axis).
Where the file has no range, it is the one for which the observer's formula gives the scales that are there (torch 2.13,
torch/ao/quantization/observer.py, _calculate_qparams; aten/src/ATen/native/quantized/cpu/QuantUtils.h for the fused
ones), or what the option `bits` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import integer_range, is_float
from nibblecast.converters.errors import CorruptFile, UsageError, brief, located
from nibblecast.converters.ir import Loss, Quantization, Tensor, per_axis, per_tensor
from nibblecast.formats.encodings.values.fake_quantize import quantized
from nibblecast.formats.pytorch.pickle.limits import LEAF, Limits

#: Names of a weight's fake quantizer in its module, and where the float weight is: torch.ao, torchao, parametrizations.
_QUANTIZERS = (
    ("weight_fake_quant", "weight"),
    ("weight_fake_quantizer", "weight"),
    ("weight_quantizer", "weight"),
    ("parametrizations.weight.0", "parametrizations.weight.original"),
)
_OBSERVER = "activation_post_process"
#: What observers and fake quantizers keep for training only.
_BOOKKEEPING = (
    "fake_quant_enabled",
    "observer_enabled",
    "eps",
    "min_val",
    "max_val",
    "histogram",
    "min_vals",
    "max_vals",
)
_WIDTHS = range(2, 9)
_MOST_CODE = 1 << 31
#: What finding the range of codes goes through in memory, for each scale: some 60 candidates in float64.
_FITTING_BYTES = 512
#: What a fake quantizer takes besides, in the unit of `Limits.spend`.
_QUANTIZER = 8 * LEAF

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class FakeQuantizer:
    """The fake quantizer of a weight: the name of its module, the weight's name in the file, and in the model."""

    name: str
    stored_weight: str
    weight: str


def quantize_weights(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[Any, Any]], bits: int | None, limits: Limits
) -> tuple[dict[str, Tensor], list[Loss]]:
    """The model with every weight that has a fake quantizer as the codes that it stands for, and what only training
    needs left out. `settings` are the attributes of modules. Raises UsageError for an impossible number of bits."""
    if bits is not None and bits not in _WIDTHS:
        raise UsageError(f"option bits: {bits} is not one of {_WIDTHS.start} to {_WIDTHS.stop - 1}")
    losses: list[Loss] = []
    codes: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for quantizer in _fake_quantizers(tensors):
        limits.spend(_QUANTIZER)
        weight = tensors[quantizer.stored_weight]
        with located(tensor=quantizer.weight):
            made, found = _as_trained(quantizer, weight, tensors, settings.get(quantizer.name, {}), bits, limits)
        losses += found
        if made is not None:
            codes[quantizer.stored_weight] = made
            left_out.update(f"{quantizer.name}.{role}" for role in ("scale", "zero_point"))
    result = {codes[name].name if name in codes else name: t for name, t in tensors.items() if name not in left_out}
    result |= {made.name: made for made in codes.values()}
    idle = [name for name in result if _is_bookkeeping(name)]
    for name in idle:
        del result[name]
    if idle:
        losses.append(
            Loss("", "dropped", f"{len(idle)} tensors of observers and fake quantizers, which only training needs")
        )
    return result, losses


def _fake_quantizers(tensors: Mapping[str, Tensor]) -> Iterator[FakeQuantizer]:
    for name in tensors:
        for quantizer, weight in _QUANTIZERS:
            prefix = name.removesuffix(f"{quantizer}.scale")
            stored = prefix + weight
            if prefix != name and prefix[-1:] in ("", ".") and stored in tensors and is_float(tensors[stored].dtype):
                yield FakeQuantizer(prefix + quantizer, stored, prefix + "weight")


def _is_bookkeeping(name: str) -> bool:
    *modules, last = name.split(".")
    return last in _BOOKKEEPING and any(module.startswith((_OBSERVER, "weight_fake_quant")) for module in modules[-2:])


def _as_trained(
    quantizer: FakeQuantizer,
    weight: Tensor,
    tensors: Mapping[str, Tensor],
    settings: Mapping[Any, Any],
    bits: int | None,
    allowed: Limits,
) -> tuple[Tensor | None, list[Loss]]:
    """The weight as codes; None where what the file has does not tell which ones, with a Loss that says so."""
    losses: list[Loss] = []
    scale = tensors[f"{quantizer.name}.scale"]
    zero_point = tensors.get(f"{quantizer.name}.zero_point")
    block_shape = _block_shape(weight, scale, settings, losses, quantizer.weight)
    if block_shape is None or (zero_point is not None and zero_point.size != scale.size):
        detail = f"it stays float: the scales of its fake quantizer have an unknown layout {brief(scale.shape)}"
        return None, [Loss(quantizer.weight, "reinterpreted", detail)]
    allowed.take(scale.size * _FITTING_BYTES, quantizer.weight)
    limits, how = _range(quantizer, scale, zero_point, tensors, settings, bits)
    if limits is None:
        return None, [Loss(quantizer.weight, "reinterpreted", how)]
    if how:
        losses.append(Loss(quantizer.weight, "reinterpreted", how))
    grid = tuple(-(-size // block) for size, block in zip(weight.shape, block_shape, strict=True))
    scale = replace(scale, shape=grid)
    zero_point = None if zero_point is None else replace(zero_point, shape=grid)
    codes = quantized(replace(weight, name=quantizer.weight), scale, zero_point, block_shape, *limits)
    # torch computes float zero points in double (FakeQuantizePerChannelAffine's kernel: std::fmin of integers)
    is_exact = zero_point is None or not is_float(zero_point.dtype)
    compute_dtype = np.dtype(np.float32 if is_exact else np.float64)
    return replace(
        codes, quantization=Quantization(scale, block_shape, zero_point, compute_dtype=compute_dtype)
    ), losses


def _block_shape(
    weight: Tensor, scale: Tensor, settings: Mapping[Any, Any], losses: list[Loss], name: str
) -> tuple[int, ...] | None:
    """How many elements share a scale; None where scales and weight do not fit."""
    shape = weight.shape
    if scale.size == 1:
        return per_tensor(shape)
    if (
        len(scale.shape) == 2
        and len(shape) == 2
        and scale.shape[0] == shape[0]
        and scale.shape[1]
        and shape[1] % scale.shape[1] == 0
    ):
        return (1, shape[1] // scale.shape[1])
    if len(scale.shape) != 1:
        return None
    axis = settings.get("ch_axis")
    if type(axis) is int and -len(shape) <= axis < len(shape) and shape[axis] == scale.size:
        return per_axis(shape, axis % len(shape))
    axes = [axis for axis, size in enumerate(shape) if size == scale.size]
    if len(axes) > 1:
        losses.append(
            Loss(
                name,
                "reinterpreted",
                f"its {scale.size} scales are taken along axis {axes[0]}, though they fit each of the axes {axes}",
            )
        )
    return per_axis(shape, axes[0]) if axes else None


def _range(
    quantizer: FakeQuantizer,
    scale: Tensor,
    zero_point: Tensor | None,
    tensors: Mapping[str, Tensor],
    settings: Mapping[Any, Any],
    bits: int | None,
) -> tuple[Range | None, str]:
    """The lowest and the highest code, and what to say about how they were found; None where they were not."""
    lowest, highest = settings.get("quant_min"), settings.get("quant_max")
    if bits is None and type(lowest) is int and type(highest) is int:
        if not -_MOST_CODE <= lowest <= highest < _MOST_CODE:
            raise CorruptFile(f"has codes from {brief(lowest)} to {brief(highest)}, a range that no code dtype holds")
        return (lowest, highest), ""
    scales = scale.dequantize().reshape(-1).astype(np.float64)
    zeros = np.zeros_like(scales) if zero_point is None else zero_point.dequantize().reshape(-1).astype(np.float64)
    observer = f"{quantizer.name}.{_OBSERVER}"
    seen = [tensors.get(f"{observer}.{role}") for role in ("min_val", "max_val")]
    fitting: list[Range] = []
    if all(t is not None and t.size in (1, scales.size) for t in seen):
        low, high = (t.dequantize().reshape(-1).astype(np.float64) for t in seen if t is not None)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return None, "it stays float: its fake quantizer has seen no data"
        fitting = _fitting(scales, zeros, low, high, bits)
    if fitting and len({highest for _, highest in fitting}) == 1:
        # -8 to 7 and -7 to 7 fit the same scales where no channel reaches further down than up: then they are the same
        lowest, highest = min(fitting)
        return (
            lowest,
            highest,
        ), f"it is taken as codes from {lowest} to {highest}: they fit its scales, but the file does not say"
    if bits is None and len(scale.shape) == 2:  # learned ranges are symmetric, and no observer has seen them
        return (-8, 7), "it is taken as symmetric with 4 bits, because the file does not say: --opt bits= sets this"
    if bits is None:
        return None, "it stays float: the file does not say the range of its codes (set --opt bits=)"
    unsigned = bool((zeros > 0).any() and not (zeros < 0).any())
    limits = integer_range(bits, not unsigned)
    sign = "unsigned" if unsigned else "signed"
    return limits, f"it is taken as {bits} bits (--opt bits=), {sign} by its zero points"


def _fitting(
    scales: NDArray[np.float64],
    zeros: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    bits: int | None,
) -> list[Range]:
    """The ranges for which an observer that saw `low` and `high` computes these scales and zero points."""
    widths = _WIDTHS if bits is None else (bits,)
    candidates = [
        limits
        for width in widths
        for limits in (
            (-(1 << width - 1), (1 << width - 1) - 1),
            (1 - (1 << width - 1), (1 << width - 1) - 1),
            (0, (1 << width) - 1),
        )
    ]
    return [
        limits
        for limits in candidates
        if any(
            np.allclose(scales, scale, rtol=1e-4, atol=0) and bool((np.abs(zeros - zero) <= 1).all())
            for scale, zero in _observed(low, high, *limits)
        )
    ]


def _observed(
    low: NDArray[np.float64], high: NDArray[np.float64], lowest: int, highest: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Scales and zero points of the schemes affine, symmetric, and symmetric as the fused fake quantizer has it."""
    below, above = np.minimum(low, 0), np.maximum(high, 0)
    smallest = np.finfo(np.float32).eps
    steps = highest - lowest
    scale = np.maximum((above - below) / steps, smallest)
    yield scale, np.clip(lowest - np.round(below / scale), lowest, highest)
    middle = np.full_like(scale, (lowest + highest + 1) // 2 if lowest == 0 else 0)
    yield np.maximum(np.maximum(-below, above) / (steps / 2), smallest), middle
    half = steps // 2
    yield np.maximum(np.maximum(-below / (half + 1), above / max(half, 1)) * (2 * half + 1) / steps, smallest), middle
