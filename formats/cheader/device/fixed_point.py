"""Requantization without floats: the multipliers and shifts with which int8 and int16 kernels scale their accumulators.

    result = zero_point_out + accumulator * scale_in * scale_w[c] / scale_out
           = zero_point_out + accumulator * multiplier[c] * 2 ** (shift[c] - 31)        multiplier in [2 ** 30, 2 ** 31)

They are those of TFLite Micro, bit for bit, and CMSIS-NN (99f736a6), NMSIS-NN and muRISCV-NN take them as they are:
`QuantizeMultiplier` of lite/kernels/internal/quantization_util.cc; the real multiplier is computed in
`PopulateConvolutionQuantizationParams` and `GetQuantizedConvolutionMultipler` of lite/kernels/kernel_util.cc:

    double(scale_in) * double(scale_w[c]) / double(scale_out)

So do the builds of TFLite Micro from 2026-10-13 on. Those up to 2026-10-08, and LiteRT (f6745779), round the product to
float where a FULLY_CONNECTED has one scale for its whole weight: there their multipliers may differ by 128 at most, and
results in the rare place where that moves one across a half.

The kernels are meant to round twice, which is the default; with TFLITE_SINGLE_ROUNDING or CMSIS_NN_USE_SINGLE_ROUNDING
multipliers stay the same unless a shift is above 30, but results change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.formats.cheader.arrays import Array
from nibblecast.formats.cheader.device.kernels import named
from nibblecast.formats.cheader.literals.notation import INT32

#: The operators whose kernels requantize so, and whether their kernels want one multiplier for each output channel even
#: where the weight has a single scale.
_BROADCASTS: Mapping[str, bool] = MappingProxyType(
    {"CONV_2D": True, "DEPTHWISE_CONV_2D": True, "TRANSPOSE_CONV": True, "FULLY_CONNECTED": False}
)
_WEIGHTS = frozenset(np.dtype(t) for t in (ml_dtypes.int2, ml_dtypes.int4, np.int8))
_ACTIVATIONS = frozenset(np.dtype(t) for t in (np.int8, np.int16))

_LEAST_SHIFT = -31  # what is smaller shifts all bits out


@dataclass(frozen=True, slots=True, eq=False)
class FixedPoint:
    """How a kernel turns the accumulators of a weight's channels into codes of its result.

    `count` is the number of multipliers and of shifts: the output channels, or 1 for FULLY_CONNECTED with one scale for
    the whole weight. Only headers are read until `multipliers` or `shifts` is asked for.
    """

    weight: str
    scale: Tensor
    count: int
    activation: Activation
    result: Activation

    @property
    def input_offset(self) -> int:
        """What kernels add to each code of their input: the zero point negated."""
        return -self.activation.zero_point

    @property
    def output_offset(self) -> int:
        """What kernels add to each code of their output: the zero point."""
        return self.result.zero_point

    def multipliers(self) -> NDArray[np.int32]:
        """The multipliers, Q31: int32 of shape (count,). Raises CorruptFile for scales that are no numbers, Unsupported
        for negative ones."""
        return self.multipliers_of(self.scale)

    def shifts(self) -> NDArray[np.int32]:
        """The shifts, positive to the left: int32 of shape (count,). Raises CorruptFile like `multipliers`."""
        return self.shifts_of(self.scale)

    def multipliers_of(self, scale: Tensor) -> NDArray[np.int32]:
        """The multipliers of a part of the scales."""
        return self._requantized(scale)[0]

    def shifts_of(self, scale: Tensor) -> NDArray[np.int32]:
        """The shifts of a part of the scales."""
        return self._requantized(scale)[1]

    def _requantized(self, scale: Tensor) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        weight_scale = scale.dequantize(np.float32).reshape(-1)
        with np.errstate(all="ignore"):
            real = np.float64(self.activation.scale) * weight_scale.astype(np.float64) / np.float64(self.result.scale)
        if not np.isfinite(real).all():
            wrong = weight_scale[~np.isfinite(real)][0]
            raise CorruptFile(
                f"scale {wrong} with activations of scale {self.activation.scale} and {self.result.scale} has no "
                "fixed-point multiplier: leave out --opt fixed-point, or the tensor with --skip",
                tensor=self.weight,
            )
        if (real < 0).any():
            raise Unsupported(
                f"scale {weight_scale[real < 0][0]} is negative, and kernels multiply by positive numbers only: "
                "quantize with `narrow`, or leave out --opt fixed-point",
                tensor=self.weight,
            )
        multipliers, shifts = quantize_multiplier(real)
        if self.scale.size == 1:
            return np.repeat(multipliers, self.count), np.repeat(shifts, self.count)
        return multipliers, shifts


def quantize_multiplier(real: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Multipliers (Q31) and shifts of shape (n,) for finite real multipliers of shape (n,).

    real = q * 2 ** shift with q in [0.5, 1); multiplier = q * 2 ** 31, rounded half away from zero. One that rounds up
    to 2 ** 31 is halved and its shift incremented; with a shift below -31 both become 0.
    """
    fraction, exponent = np.frexp(real)
    scaled = fraction * float(1 << 31)
    rounded = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
    overflowed = rounded == 1 << 31
    rounded[overflowed] >>= 1
    shift = exponent.astype(np.int32) + overflowed
    lost = shift < _LEAST_SHIFT
    rounded[lost] = 0
    shift[lost] = 0
    return rounded.astype(np.int32), shift.astype(np.int32)


def fixed_point(tensor: Tensor) -> FixedPoint | None:
    """How kernels requantize what they compute with this weight; None where `obstacle` says why not, and for tensors
    that are no quantized weights of such kernels. Reads no payload."""
    uses = _weight_uses(tensor)
    if not uses or obstacle(tensor) is not None:
        return None
    use = uses[0]
    quantization, axis = tensor.quantization, use.channel_axis
    if quantization is None or axis is None or use.activation is None or use.result is None:
        return None
    count = tensor.shape[axis] if _BROADCASTS[use.operator] else quantization.scale.size
    return FixedPoint(tensor.name, quantization.scale, count, use.activation, use.result)


def obstacle(tensor: Tensor) -> str | None:
    """Why there are no multipliers for this weight, as the end of a sentence; None where there are, and where nobody
    would look for them: for what is not a quantized weight of a convolution or a fully connected layer."""
    uses = _weight_uses(tensor)
    quantization = tensor.quantization
    if not uses or quantization is None or not is_integer(tensor.dtype):
        return None
    if tensor.dtype not in _WEIGHTS or quantization.offset is not None or quantization.codebook is not None:
        return "codes that are no symmetric int2, int4 or int8"
    if quantization.group_index is not None or not _per_channel(tensor, uses[0].channel_axis):
        return "scales that are neither one for all nor one for each output channel"
    if any(use.activation is None or use.result is None for use in uses):
        return "activations that are not quantized"
    first = uses[0]
    if any((u.operator, u.activation, u.result) != (first.operator, first.activation, first.result) for u in uses):
        return "several operators that use it with activations of different scales"
    if first.activation is None or first.result is None:
        return None
    if first.activation.dtype not in _ACTIVATIONS or first.result.dtype != first.activation.dtype:
        return f"activations of {first.activation.dtype} and {first.result.dtype}, where int8 or int16 are needed"
    if not first.activation.scale > 0 or not first.result.scale > 0:
        return "an activation whose scale is not positive"
    return None


def fixed_point_arrays(tensor: Tensor) -> tuple[Array, ...]:
    """The arrays of multipliers and of shifts, int32_t each; none where there are no multipliers."""
    found = fixed_point(tensor)
    if found is None:
        return ()
    return (
        Array("multiplier", INT32, found.count, found.scale, found.multipliers_of, payload=INT32.nbytes * found.count),
        Array("shift", INT32, found.count, found.scale, found.shifts_of, payload=INT32.nbytes * found.count),
    )


def notes(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """A sentence for each reason why weights got no multipliers, or one that none of the tensors could have any."""
    reasons: dict[str, list[str]] = {}
    count = 0
    for tensor in tensors:
        reason = obstacle(tensor)
        if reason is not None:
            reasons.setdefault(reason, []).append(tensor.name)
        count += fixed_point(tensor) is not None
    if not reasons and not count:
        return ("fixed-point: no multipliers, as no tensor is known to be a weight that meets quantized activations",)
    return tuple(f"fixed-point: no multipliers for {named(names)} because of {why}" for why, names in reasons.items())


def _weight_uses(tensor: Tensor) -> list[Use]:
    rank = len(tensor.shape)
    return [use for use in tensor.uses if use.operator in _BROADCASTS and use.channel_axis in range(rank)]


def _per_channel(tensor: Tensor, channel_axis: int | None) -> bool:
    """Whether the scales are shared by all elements, or by those of one position along the channels."""
    if tensor.quantization is None:
        return False
    pairs = zip(tensor.quantization.block_shape, tensor.shape, strict=True)
    split = {axis for axis, (block, size) in enumerate(pairs) if block < size}
    if not split:
        return True
    return split == {channel_axis} and tensor.quantization.block_shape[channel_axis or 0] == 1
