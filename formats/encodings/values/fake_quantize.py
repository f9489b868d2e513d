"""Float weights whose codes a program computes when it runs: the codes, as PyTorch rounds them.

    code = clamp(round(weight * (1 / scale)) + zero_point, lowest, highest)         ties to the even number

The inverse is rounded to the scale's dtype first, which is not dividing: results differ near ties. torch 2.13,
aten/src/ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp (fake_quantize_*) and
torch/ao/quantization/fx/_decomposed.py (quantize_per_tensor, quantize_per_channel); torchao 0.18,
quantization/quant_primitives.py (_quantize_affine_no_dtype_cast). Where `zero_point` is a float, or the operator is
quantize_per_token or quantize_per_channel_group, it is added before rounding instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32, bits_of, is_float
from nibblecast.converters.arithmetic.packing import pack, packed_size
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.converters.storage import Computed
from nibblecast.formats.encodings.bytes.widths import dtype_for

_PIECE_ELEMENTS = 1 << 20


def quantized(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_shape: tuple[int, ...],
    lowest: int,
    highest: int,
    *,
    compute_dtype: np.dtype[Any] = FLOAT32,
    zero_point_first: bool = False,
) -> Tensor:
    """The codes of a plain float `weight`, from `lowest` to `highest` in the narrowest dtype that holds these, made
    when they are read. Its shape, name and uses stay; it has no quantization yet.

    `scale` and `zero_point` have the grid's shape (`converters.ir.grid_shape`). The scale's dtype is what 1 / scale is
    rounded to: float64 for the numbers of Python that per-tensor operators get. Each operation is rounded to
    `compute_dtype`: what PyTorch promotes the weight and the tensor of scales to. Raises CorruptFile for parameters
    that do not fit; reading raises Unsupported for NaN, which has no code.
    """
    dtype = dtype_for(lowest, highest)
    first = zero_point_first or (zero_point is not None and is_float(zero_point.dtype))
    # as if the weights were codes: so that parameters are checked, and cut where rows are
    quantization = Quantization(scale, block_shape, zero_point)
    source = replace(weight, quantization=quantization)
    codes = _Codes(source, quantization, dtype, (lowest, highest), compute_dtype, first)
    nbytes = packed_size(weight.size, bits_of(dtype))
    return replace(weight, dtype=dtype, data=Computed(nbytes, codes.read, tuple(source.stored())), quantization=None)


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    """Codes of `source`, which is quantized so."""

    source: Tensor
    quantization: Quantization
    dtype: np.dtype[Any]
    limits: tuple[int, int]
    compute_dtype: np.dtype[Any]
    zero_point_first: bool

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Canonical bytes [start, stop) of the codes."""
        source, bits = self.source, bits_of(self.dtype)
        count = next((size for size in source.shape if size != 1), 1)
        unit = source.size // max(1, count)
        if stop <= start or not unit:
            return np.zeros(0, np.uint8)
        step = lcm(source.row_step, 8 // gcd(8, unit * bits))
        first = start * 8 // (bits * unit) // step * step
        last = min(count, -(-stop * 8 // (bits * unit * step)) * step)
        rows = max(1, _PIECE_ELEMENTS // (unit * step)) * step
        pieces = [self._packed(row, min(last, row + rows), whole=count) for row in range(first, last, rows)]
        skipped = first * unit * bits // 8
        return np.concatenate(pieces)[start - skipped : stop - skipped]

    def _packed(self, first: int, last: int, whole: int) -> NDArray[np.uint8]:
        part = self.source if last - first == whole else self.source.rows(first, last)
        codes = self._codes(part, part.quantization or self.quantization)
        part.release()
        bits = bits_of(self.dtype)
        return pack(codes, bits) if bits < 8 else codes.astype(self.dtype).view(np.uint8)

    def _codes(self, part: Tensor, quantization: Quantization) -> NDArray[Any]:
        """The codes of some rows, flat, as int32."""
        # NumPy's float16 and ml_dtypes' bfloat16 round each operation as PyTorch does: computed in float32, then once
        with np.errstate(all="ignore"):
            scale = quantization.scale.numpy()
            inverse = (np.ones((), scale.dtype) / scale).astype(self.compute_dtype)
            values = part.numpy().astype(self.compute_dtype) * _spread(inverse, part.shape, quantization)
            if quantization.zero_point is None:
                values = np.rint(values)
            else:
                zero_point = quantization.zero_point.numpy().astype(self.compute_dtype)
                added = _spread(zero_point, part.shape, quantization)
                values = np.rint(values + added) if self.zero_point_first else np.rint(values) + added
        if np.isnan(values).any():
            raise Unsupported("holds NaN, or has scales of zero, which codes cannot represent", tensor=part.name)
        wide = np.float64 if bits_of(self.dtype) > 16 else np.float32  # exact for both limits
        codes: NDArray[Any] = np.clip(values.astype(wide), *self.limits).astype(np.int32).reshape(-1)
        return codes


def _spread(parameter: NDArray[Any], shape: tuple[int, ...], quantization: Quantization) -> NDArray[Any]:
    """`parameter`, of the grid's shape, as it broadcasts to `shape`."""
    for axis, (size, block) in enumerate(zip(shape, quantization.block_shape, strict=True)):
        if 1 < block < size:
            parameter = parameter.repeat(block, axis=axis).take(range(size), axis=axis)
    return parameter
