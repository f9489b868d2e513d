"""Quantized tensors rearranged into one of ggml's block types, with exactly the same values.

    Q4_0     int4 codes (or 2-bit ones) less their zero point, if int4 holds the result, e.g. uint4 with zero point 8
    Q4_1     other 4-bit and 2-bit codes, unsigned; the minimum is offset - scale * zero point
    Q8_0     int8 codes, or uint8 ones less the zero point 128
    IQ4_NL   uint4 codes with its codebook
    MXFP4    float4 with scales that are powers of two       NVFP4    float4 with scales that E4M3 holds

A parameter that spans several blocks is repeated. Where zero points become minima, all codes are decoded both ways to
compare them. The parameters are read for these checks when a file is planned, in pieces. +0 and -0 count as the same
value, because ggml's zero may have the other sign.

The alternative was to round scales to float16, as ggml's quantizers do. That would change weights silently, and a
conversion promises the same values. So scales and minima must be numbers of the type's dtype, mostly float16. All else
is refused, and the message says how to quantize the tensor so that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT4,
    FLOAT8_E4M3,
    FLOAT8_E8M0,
    FLOAT16,
    INT2,
    INT4,
    INT8,
    SUB_BYTE,
    UINT2,
    UINT4,
    UINT8,
    bits_of,
    code_range,
    is_float,
)
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor, blocked
from nibblecast.converters.storage import Computed, Data
from nibblecast.formats.encodings.bytes.rows import by_rows
from nibblecast.formats.gguf.blocks import iq4_codebook

#: The lowest and the highest code of each dtype that can be arranged.
_CODES = frozenset((INT2, UINT2, INT4, UINT4, INT8, UINT8))
_PIECE_BLOCKS = 1 << 16
#: Zero points beyond this are far from any code. Up to it, code - zero point is exact in float32.
_LARGEST_ZERO_POINT = 1 << 16

_Floats = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A block type to write: `elements` in a block, of which each `shared` have the same scale."""

    type_id: int
    name: str
    elements: int
    shared: int
    dtype: np.dtype[Any]
    scale_dtype: np.dtype[Any]


Q4_0 = Kind(2, "Q4_0", 32, 32, INT4, FLOAT16)
Q4_1 = Kind(3, "Q4_1", 32, 32, UINT4, FLOAT16)
Q8_0 = Kind(8, "Q8_0", 32, 32, INT8, FLOAT16)
IQ4_NL = Kind(20, "IQ4_NL", 32, 32, UINT4, FLOAT16)
MXFP4 = Kind(39, "MXFP4", 32, 32, FLOAT4, FLOAT8_E8M0)
NVFP4 = Kind(40, "NVFP4", 64, 16, FLOAT4, FLOAT8_E4M3)


def arrange(tensor: Tensor, quantization: Quantization) -> tuple[Kind, Tensor, tuple[Loss, ...]]:
    """Returns the type for a quantized tensor, the tensor as reading that type's blocks gives it, and the losses of its
    codes. Reads parameters that may not fit. Raises Unsupported if no type has exactly these values."""
    source = _Source(tensor, quantization)
    kind = _kind(source)
    if source.scale_is_doubtful(kind):
        _check_scales(source, kind)
    if kind is Q4_1:
        _check_minima(source)
    losses = []
    if tensor.dtype in (INT2, UINT2):
        losses.append(
            Loss(tensor.name, "widened", f"its {tensor.dtype} codes become 4 bits wide, as {kind.name} has them")
        )
    return kind, arranged(tensor, quantization, kind), tuple(losses)


def arranged(tensor: Tensor, quantization: Quantization, kind: Kind) -> Tensor:
    """A tensor that fits `kind`, in the codes and parameters of `kind`."""
    source = _Source(tensor, quantization)
    scale = source.parameter("scale", kind, source.scale)
    offset = source.parameter("offset", kind, source.minimum) if kind is Q4_1 else None
    block_shape = blocked(tensor.shape, len(tensor.shape) - 1, kind.shared)
    codebook = iq4_codebook() if kind is IQ4_NL else None
    wanted = Quantization(scale, block_shape, None, offset, codebook)
    return replace(tensor, dtype=kind.dtype, data=source.codes(kind), quantization=wanted)


def _kind(source: _Source) -> Kind:
    """The type that can hold these codes, in blocks that fit."""
    tensor, q = source.tensor, source.quantization
    if tensor.dtype == FLOAT4:
        kind = _float_kind(source)
    elif tensor.dtype not in _CODES:
        raise source.refusal(f"has codes of {tensor.dtype}, which no type of ggml has")
    elif q.codebook is not None:
        kind = IQ4_NL
        if not source.is_iq4():
            raise source.refusal("has a codebook that is not that of IQ4_NL, the only one of ggml")
    elif tensor.bits == 8:
        kind = Q8_0
        if q.offset is not None or not source.less_zero_point_fits(kind):
            raise source.refusal(f"has {tensor.dtype} codes that are not symmetric around zero, as those of Q8_0 are")
    else:
        kind = Q4_0 if q.offset is None and source.less_zero_point_fits(Q4_0) else Q4_1
    source.check_blocks(kind)
    return kind


def _float_kind(source: _Source) -> Kind:
    """MXFP4 if all scales are powers of two or if the blocks fit no other type, else NVFP4."""
    q = source.quantization
    if q.zero_point is not None or q.offset is not None:
        raise source.refusal("has float4 codes with a zero point or an offset, which no type of ggml has")
    if not source.has_blocks_for(NVFP4):
        return MXFP4
    if not source.has_blocks_for(MXFP4):
        return NVFP4
    return MXFP4 if q.scale.dtype == MXFP4.scale_dtype or source.scales_fit(MXFP4) else NVFP4


def _check_scales(source: _Source, kind: Kind) -> None:
    for first, last in source.pieces():
        scale = source.scale(first, last)
        wrong = scale[~_fits(scale, kind)]
        if wrong.size:
            raise source.refusal(f"has the scale {wrong[0]!s}, which {kind.scale_dtype} ({kind.name}) does not hold")


def _check_minima(source: _Source) -> None:
    """Raises Unsupported unless d * q + m, in float32, is the value of every code."""
    lowest, highest = code_range(source.tensor.dtype)
    codes = np.arange(lowest, highest + 1, dtype=np.float32)[:, None]
    for first, last in source.pieces():
        scale, minimum = source.scale(first, last), source.minimum(first, last)
        zero_point = source.zero_point(first, last)
        with np.errstate(over="ignore", invalid="ignore"):
            stored = minimum.astype(np.float16).astype(np.float32)
            wanted = scale * (codes - zero_point.astype(np.float32))
            if source.quantization.offset is not None:
                wanted += source.offset(first, last)
            equal = _equal(scale * (codes - np.float32(lowest)) + stored, wanted).all(axis=0)
            equal &= (np.abs(zero_point) < _LARGEST_ZERO_POINT) & _equal(stored, minimum)
        if not equal.all():
            place = int(np.argmin(equal))
            raise source.refusal(
                f"has the scale {scale[place]!s} with the minimum {minimum[place]!s} (its zero points and offsets), "
                "which a block of Q4_1, d * q + m with float16 numbers, does not give exactly"
            )


def _fits(scale: _Floats, kind: Kind) -> NDArray[np.bool_]:
    """Which scales the kind's dtype holds exactly. ggml's E8M0 has no NaN, and its E4M3 has no sign."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = _equal(scale.astype(kind.scale_dtype).astype(np.float32), scale)
    if kind.scale_dtype == FLOAT16:
        return exact
    positive: NDArray[np.bool_] = exact & (scale >= 0) & ~np.signbit(scale)
    return positive


@np.errstate(over="ignore", invalid="ignore")  # signalling NaNs
def _float32(values: _Floats) -> _Floats:
    return values.astype(np.float32)


def _equal(a: _Floats, b: _Floats) -> NDArray[np.bool_]:
    return np.asarray((a == b) | ((a != a) & (b != b)))


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A quantized tensor whose parameters are read by their flat position in their grid."""

    tensor: Tensor
    quantization: Quantization

    def scale(self, first: int, last: int) -> _Floats:
        """Scales as float32; infinite where they are beyond its range."""
        return _float32(_values(self.quantization.scale, first, last))

    def zero_point(self, first: int, last: int) -> _Floats:
        """Zero points as float64; zeros if the tensor has none."""
        parameter = self.quantization.zero_point
        return np.zeros(last - first) if parameter is None else _values(parameter, first, last)

    def offset(self, first: int, last: int) -> _Floats:
        """Offsets; zeros if the tensor has none."""
        parameter = self.quantization.offset
        if parameter is None:
            return np.zeros(last - first, np.float32)
        return _float32(_values(parameter, first, last))

    def minimum(self, first: int, last: int) -> _Floats:
        """The value of the lowest code."""
        lowest = code_range(self.tensor.dtype)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            steps = self.scale(first, last).astype(np.float64) * (lowest - self.zero_point(first, last))
            minimum: _Floats = (steps + self.offset(first, last)).astype(np.float32) + np.float32(0)
        return minimum

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of the grid."""
        count = self.quantization.scale.size
        for first in range(0, count, _PIECE_BLOCKS):
            yield first, min(count, first + _PIECE_BLOCKS)

    def has_blocks_for(self, kind: Kind) -> bool:
        """Whether elements that share a parameter in a block of `kind` share it in this tensor as well."""
        if not self.tensor.shape or self.tensor.shape[-1] % kind.elements:
            return False
        block = self.quantization.block_shape[-1]
        return block >= self.tensor.shape[-1] or block % kind.shared == 0

    def check_blocks(self, kind: Kind) -> None:
        """Raises Unsupported unless this tensor has blocks for `kind`."""
        shape = self.tensor.shape
        if not shape or shape[-1] % kind.elements:
            last = f"has the last size {shape[-1]}" if shape else "has no axes"
            raise self.refusal(f"{last}, and {kind.name} has blocks of {kind.elements} elements along the last axis")
        if not self.has_blocks_for(kind):
            raise self.refusal(
                f"has parameters for blocks of {self.quantization.block_shape}: "
                f"those of {kind.name} are for {kind.shared} elements along the last axis"
            )

    def scale_is_doubtful(self, kind: Kind) -> bool:
        """Whether scales must be read to know that the kind holds them."""
        scale = self.quantization.scale
        return scale.dtype != FLOAT16 or kind.scale_dtype != FLOAT16 or scale.quantization is not None

    def scales_fit(self, kind: Kind) -> bool:
        """Whether the kind holds all scales."""
        return all(_fits(self.scale(*piece), kind).all() for piece in self.pieces())

    def less_zero_point_fits(self, kind: Kind) -> bool:
        """Whether code - zero point is a code of the kind, whatever the code."""
        if self.quantization.zero_point is None and self.tensor.dtype not in (UINT4, UINT8):
            return True
        lowest, highest = code_range(self.tensor.dtype)
        least, most = code_range(kind.dtype)
        for piece in self.pieces():
            zero_point = self.zero_point(*piece)
            is_within = (zero_point >= highest - most) & (zero_point <= lowest - least)
            if not is_within.all() or (zero_point % 1).any():
                return False
        return True

    def is_iq4(self) -> bool:
        """Whether the codebook is IQ4_NL's and the tensor has neither zero points nor offsets."""
        q = self.quantization
        if q.codebook is None or self.tensor.dtype != UINT4 or q.zero_point is not None or q.offset is not None:
            return False
        return bool(np.array_equal(q.codebook.dequantize(np.float32), iq4_codebook().numpy()))

    def refusal(self, what: str) -> Unsupported:
        """The error, with the options that would make a tensor that can be written."""
        advice = "add --dequantize float16 (or float32)"
        if len(self.tensor.shape) >= 2 and self.tensor.shape[-1] % Q4_0.elements == 0:
            advice += ", or --quantize int4,block=32,axis=-1,scale=float16,requantize"
        return Unsupported(f"{what}: {advice}, or leave it out with --skip", tensor=self.tensor.name)

    def parameter(self, role: str, kind: Kind, of_grid: Callable[[int, int], _Floats]) -> Tensor:
        """A parameter of the kind's dtype, one for each of its blocks."""
        shape = (*self.tensor.shape[:-1], self.tensor.shape[-1] // kind.shared)

        def rows(first: int, last: int) -> NDArray[Any]:
            return self._spread(of_grid, kind, first, last).astype(kind.scale_dtype)

        count = self.tensor.size // kind.shared
        sources = [data for _, parameter in self.quantization.parameters() for data in parameter.stored()]
        return Tensor(role, shape, kind.scale_dtype, by_rows((count, 1), kind.scale_dtype, rows, *sources))

    def codes(self, kind: Kind) -> Data:
        """The codes of the kind, as canonical bytes."""
        tensor = self.tensor
        if tensor.dtype == kind.dtype:
            return tensor.data
        if tensor.bits == bits_of(kind.dtype):  # the zero point is the middle of the range, or becomes a minimum
            signs = np.uint8(0x88 if tensor.bits == 4 else 0x80)
            return Computed(tensor.nbytes, lambda start, stop: tensor.data.read(start, stop) ^ signs, (tensor.data,))
        is_less_zero_point = kind is Q4_0 and self.quantization.zero_point is not None

        def rows(first: int, last: int) -> NDArray[Any]:
            stored = _elements(tensor, first * kind.shared, last * kind.shared).reshape(-1, kind.shared)
            if is_less_zero_point:
                stored = stored - self._spread(self.zero_point, kind, first, last).astype(np.int8)[:, None]
            elif kind is Q4_1:
                stored = stored - np.int8(code_range(tensor.dtype)[0])
            return pack(stored.astype(np.int8), 4)

        return by_rows((tensor.size // kind.shared, kind.shared), kind.dtype, rows, *tensor.stored())

    def _spread(self, of_grid: Callable[[int, int], _Floats], kind: Kind, first: int, last: int) -> _Floats:
        """A parameter of the kind's blocks [first, last)."""
        shape = (*self.tensor.shape[:-1], self.tensor.shape[-1] // kind.shared)
        blocks = (*self.quantization.block_shape[:-1], max(1, self.quantization.block_shape[-1] // kind.shared))
        index = np.unravel_index(np.arange(first, last), shape)
        where = tuple(positions // block for positions, block in zip(index, blocks, strict=True))
        at = np.ravel_multi_index(where, self.quantization.scale.shape)
        lowest = int(at.min())
        return of_grid(lowest, int(at.max()) + 1)[at - lowest]


def _elements(tensor: Tensor, first: int, last: int) -> NDArray[Any]:
    """Stored elements [first, last) of the flat tensor."""
    stored = tensor.data.read(first * tensor.bits // 8, packed_size(last, tensor.bits))
    if tensor.dtype not in SUB_BYTE:
        return stored.view(tensor.dtype)
    skipped = first - first * tensor.bits // 8 * 8 // tensor.bits
    return unpack(stored, tensor.dtype, skipped + last - first)[skipped:]


def _values(parameter: Tensor, first: int, last: int) -> NDArray[np.float64]:
    """Values [first, last) of a flat parameter. A second-level scale is applied as decoding does it."""
    if parameter.quantization is not None:
        return parameter.dequantize(np.float32).reshape(-1)[first:last].astype(np.float64)
    elements = _elements(parameter, first, last)
    if parameter.dtype in SUB_BYTE and is_float(parameter.dtype):
        elements = elements.view(parameter.dtype)
    return elements.astype(np.float64)
