"""Which kernels take a weight as it is, and what to do about one that none takes.

The facts are those of the sources of TFLite Micro (90b983c2), CMSIS-NN (99f736a6), NMSIS-NN (dc728b98) and muRISCV-NN
(4eb6a1f6): one packing serves them all, and the last two have a twin of each `arm_..._s4` function (`riscv_`,
`muriscv_nn_`). What TFLite Micro refuses is tested with its interpreter. ESP-NN (d45b843c) takes int8 only: int4 is for
storage there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import is_integer
from nibblecast.converters.ir import Tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.formats.cheader.packings import DENSE, Packing, packing_for

_BITS: Mapping[np.dtype[np.generic], int] = MappingProxyType({np.dtype(ml_dtypes.int4): 4, np.dtype(np.int8): 8})
_SIGNED = frozenset(np.dtype(t) for t in (ml_dtypes.int2, ml_dtypes.int4))
_TWO_BITS = frozenset(np.dtype(t) for t in (ml_dtypes.int2, ml_dtypes.uint2))
_INT8, _INT16 = np.dtype(np.int8), np.dtype(np.int16)
_CMSIS = " (CMSIS-NN)"
_TWINS = f"{_CMSIS}, riscv_... (NMSIS-NN), muriscv_nn_... (muRISCV-NN)"
_REFERENCE = "reference kernels"

#: What takes a weight: the operator, the bits of a code, the activations -> functions besides TFLite Micro's operator.
_KERNELS: Mapping[tuple[str, int, np.dtype[np.generic]], str] = MappingProxyType(
    {
        ("CONV_2D", 4, _INT8): f"arm_convolve_wrapper_s4{_TWINS}",
        ("DEPTHWISE_CONV_2D", 4, _INT8): f"arm_depthwise_conv_wrapper_s4{_TWINS}",
        ("FULLY_CONNECTED", 4, _INT8): f"arm_fully_connected_s4{_TWINS}",
        ("CONV_2D", 8, _INT8): f"arm_convolve_wrapper_s8{_CMSIS}",
        ("DEPTHWISE_CONV_2D", 8, _INT8): f"arm_depthwise_conv_wrapper_s8{_CMSIS}",
        ("FULLY_CONNECTED", 8, _INT8): f"arm_fully_connected_wrapper_s8{_CMSIS}",
        ("TRANSPOSE_CONV", 8, _INT8): f"arm_transpose_conv_wrapper_s8{_CMSIS}",
        ("CONV_2D", 8, _INT16): f"arm_convolve_wrapper_s16{_CMSIS}",
        ("DEPTHWISE_CONV_2D", 8, _INT16): f"arm_depthwise_conv_wrapper_s16{_CMSIS}",
        ("FULLY_CONNECTED", 8, _INT16): f"arm_fully_connected_s16{_CMSIS}",
        ("TRANSPOSE_CONV", 8, _INT16): "",
    }
)
_OPERATORS = frozenset(operator for operator, _, _ in _KERNELS)


@dataclass(frozen=True, slots=True)
class _KernelWeight:
    """A quantized weight in one of its uses, as far as kernels care."""

    tensor: Tensor
    use: Use
    packing: Packing = DENSE

    @property
    def bits(self) -> int:
        """4 or 8 for the signed codes that kernels take, 0 for all others."""
        return 8 if self.packing.unpacked and self.tensor.dtype in _SIGNED else _BITS.get(self.tensor.dtype, 0)

    @property
    def is_packed_otherwise(self) -> bool:
        """Whether its bytes are neither those that kernels read nor one for each code."""
        return not self.packing.unpacked and not self.packing.is_dense(self.tensor.shape, self.tensor.bits)

    @property
    def activation(self) -> Activation | None:
        """The operator's input, where its result is quantized as well."""
        return self.use.activation if self.use.result is not None else None

    @property
    def input_channels(self) -> int:
        """Channels of the operator's input, 0 where they are not known."""
        shape = () if self.use.activation is None else self.use.activation.shape
        return shape[-1] if shape else 0

    @property
    def split(self) -> tuple[int, ...]:
        """The axes along which there is more than one scale."""
        quantization = self.tensor.quantization
        blocks = self.tensor.shape if quantization is None else quantization.block_shape
        pairs = zip(blocks, self.tensor.shape, strict=True)
        return tuple(axis for axis, (block, size) in enumerate(pairs) if block < size)

    @property
    def per_channel(self) -> bool:
        """Whether there is one scale for each of several output channels."""
        return bool(self.split)

    def is_(self, operator: str, bits: int) -> bool:
        """Whether it is such a weight."""
        return (self.use.operator, self.bits) == (operator, bits)

    def takes(self, dtype: np.dtype[np.generic]) -> bool:
        """Whether its activations are of this dtype."""
        return self.activation is not None and self.activation.dtype == dtype


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of weight that some or all kernels cannot take: the problem, the way out, and what runs it nevertheless
    (empty: nothing does; the reference kernels are those of TFLite Micro)."""

    applies: Callable[[_KernelWeight], bool]
    problem: str
    way_out: str
    runs: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """Which kernels take a weight (empty: none), and the rule that keeps others, or all, from it."""

    kernels: str
    rule: Rule | None

    def line(self) -> str:
        """The same in one line of ASCII for a comment."""
        if self.rule is None:
            return f"fits: {self.kernels}"
        return f"fits {f'only {self.kernels}' if self.kernels else 'no kernel'}: {self.rule.problem}"


def _odd_scales(weight: _KernelWeight) -> bool:
    """Scales other than one for all or one for each output channel; whatever else codes may need to become values."""
    quantization, axis = weight.tensor.quantization, weight.use.channel_axis
    if quantization is None or axis is None:
        return True
    if quantization.group_index is not None or quantization.offset is not None or quantization.codebook is not None:
        return True
    return bool(weight.split) and (weight.split != (axis,) or quantization.block_shape[axis] != 1)


def _has_zero_points(weight: _KernelWeight) -> bool:
    quantization = weight.tensor.quantization
    zero_point = None if quantization is None else quantization.zero_point
    return zero_point is not None and bool(zero_point.codes().any())


def _multiplies_odd_channels(weight: _KernelWeight) -> bool:
    channels = weight.input_channels
    return weight.is_("DEPTHWISE_CONV_2D", 4) and channels % 2 == 1 and weight.tensor.shape[-1] > channels


def _is_grouped(weight: _KernelWeight) -> bool:
    return weight.is_("CONV_2D", 4) and weight.input_channels > weight.tensor.shape[-1]


_UNPACK = "write it with --opt packing=unpacked, or unpack it into int8 when the program starts"
#: In order: the first that applies counts.
RULES = (
    Rule(
        lambda weight: weight.is_packed_otherwise,
        "kernels take codes with the first in the lowest bits and no padding between rows",
        "leave out --opt nibble-order and --opt packing=rows",
    ),
    Rule(
        lambda weight: weight.tensor.dtype in _TWO_BITS and not weight.bits,
        "codes of 2 bits are for storage, no kernel takes them",
        _UNPACK,
    ),
    Rule(
        lambda weight: not weight.bits,
        "kernels take codes of int4 and int8 only",
        "quantize it to symmetric int4 or int8",
    ),
    Rule(
        _odd_scales,
        "kernels take one scale in all or one for each output channel, nothing blockwise",
        "quantize it per channel, or decode it with nibblecast_value",
    ),
    Rule(
        lambda weight: weight.activation is None,
        "its activations are floats, and TFLite Micro and CMSIS-NN have no kernels for that",
        "quantize activations too (representative_dataset and int8 input and output in the TFLite converter), "
        "or decode it with nibblecast_value",
    ),
    Rule(
        _has_zero_points,
        "kernels take zero points of 0 only, and it has others",
        "quantize it symmetrically",
    ),
    Rule(
        lambda weight: not (weight.takes(_INT8) or weight.takes(_INT16)),
        "kernels take activations of int8 and int16 only",
        "convert the model with int8 activations",
    ),
    Rule(
        lambda weight: weight.bits == 4 and weight.takes(_INT16),
        "int4 weights with int16 activations have no kernel",
        "convert with int8 activations, or keep the weight in int8",
    ),
    Rule(
        lambda weight: weight.is_("TRANSPOSE_CONV", 4),
        "TRANSPOSE_CONV has no kernel for int4",
        _UNPACK,
    ),
    Rule(
        lambda weight: weight.is_("FULLY_CONNECTED", 4) and weight.per_channel,
        "per-channel int4 FULLY_CONNECTED runs neither in TFLite Micro nor in arm_fully_connected_s4",
        "convert with _experimental_disable_per_channel_quantization_for_dense_layers = True, "
        "or call arm_convolve_1x1_s4_fast with an input of 1x1 and as many channels as the layer has inputs",
    ),
    Rule(
        lambda weight: weight.is_("FULLY_CONNECTED", 8) and weight.per_channel and weight.takes(_INT16),
        "per-channel FULLY_CONNECTED with int16 activations has no kernel in CMSIS-NN",
        "convert with _experimental_disable_per_channel_quantization_for_dense_layers = True for it",
        runs=_REFERENCE,
    ),
    Rule(
        _multiplies_odd_channels,
        "arm_depthwise_conv_wrapper_s4 is wrong where odd input channels are multiplied",
        "make the channels even, or keep the weight in int8",
        runs=_REFERENCE,
    ),
    Rule(
        _is_grouped,
        "arm_convolve_wrapper_s4 knows no groups",
        "keep the weight in int8, which arm_convolve_wrapper_s8 takes",
        runs=_REFERENCE,
    ),
)


def advice(tensor: Tensor, packing: Packing = DENSE) -> Advice | None:
    """Which kernels take this weight when it is packed so; None for what is no quantized weight of a convolution or a
    fully connected layer, and where the source does not tell what it is used for. Reads zero points, no other data. Of
    several uses, the first that has a problem counts."""
    if tensor.quantization is None or not is_integer(tensor.dtype):
        return None
    axes = range(len(tensor.shape))
    uses = [use for use in tensor.uses if use.operator in _OPERATORS and use.channel_axis in axes]
    found = [_advice(_KernelWeight(tensor, use, packing)) for use in uses]
    return next((each for each in found if each.rule is not None), found[0] if found else None)


def notes(tensors: Iterable[Tensor], packing: Packing = DENSE) -> tuple[str, ...]:
    """A sentence for each rule that applies to one or more of the tensors: how many, the first one's name, the problem
    and the way out."""
    affected: dict[int, list[str]] = {}
    for tensor in tensors:
        found = advice(tensor, packing_for(tensor, packing))
        if found is not None and found.rule is not None:
            affected.setdefault(RULES.index(found.rule), []).append(tensor.name)
    return tuple(f"{named(names)}: {RULES[i].problem}; {RULES[i].way_out}" for i, names in sorted(affected.items()))


def named(names: list[str]) -> str:
    """One or more tensors, by the name of the first."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _advice(weight: _KernelWeight) -> Advice:
    for rule in RULES:
        if rule.applies(weight):
            return Advice(rule.runs, rule)
    activation = weight.activation
    function = "" if activation is None else _KERNELS[weight.use.operator, weight.bits, activation.dtype]
    return Advice("TFLite Micro" + (f", {function}" if function else ""), None)
