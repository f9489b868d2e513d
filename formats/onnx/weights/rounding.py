"""QuantizeLinear of constants: the codes that a runtime computes from floats when it loads the model."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of, code_range
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.converters.storage import Computed, Data

_PIECE_ELEMENTS = 1 << 16


def rounded_codes(floats: Tensor, quantization: Quantization, dtype: np.dtype[Any]) -> Data:
    """Codes of `dtype` for floats whose shape is the one of the quantization: x / scale rounded half to even, plus the
    zero point, saturated (ONNX operators, QuantizeLinear 21). They are computed in pieces when they are read."""
    bits = bits_of(dtype)
    lowest, highest = code_range(dtype)
    scale, zero_point = quantization.scale, quantization.zero_point

    def codes(first: int, last: int) -> NDArray[np.int64]:
        at = _parameter_indices(first, last, floats.shape, quantization.block_shape)
        low, high = int(at.min()), int(at.max()) + 1
        with np.errstate(all="ignore"):
            rounded = np.rint(_floats(floats, first, last) / _floats(scale, low, high)[at - low])
            if zero_point is not None:
                rounded += _floats(zero_point, low, high)[at - low]
            integers: NDArray[np.int64] = np.nan_to_num(np.clip(rounded, lowest, highest)).astype(int)
        return integers

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start * 8 // bits, min(floats.size, -(-stop * 8 // bits))
        pieces = []
        for begin in range(first, last, _PIECE_ELEMENTS):
            piece = codes(begin, min(begin + _PIECE_ELEMENTS, last))
            pieces.append(pack(piece, bits) if bits < 8 else piece.astype(dtype).view(np.uint8))
        offset = start - first * bits // 8
        return np.concatenate([*pieces, np.zeros(0, np.uint8)])[offset : offset + stop - start]

    return Computed(packed_size(floats.size, bits), compute, (floats.data,))


def _floats(tensor: Tensor, first: int, last: int) -> NDArray[np.float32]:
    """Stored elements [first, last) of a tensor."""
    begin = first * tensor.bits // 8
    packed = tensor.data.read(begin, packed_size(last, tensor.bits))
    if tensor.dtype in SUB_BYTE:
        elements = unpack(packed, tensor.dtype, packed.size * 8 // tensor.bits)
        skipped = first - begin * 8 // tensor.bits
        return elements[skipped : skipped + last - first].astype(np.float32)
    return packed.view(tensor.dtype).astype(np.float32)


def _parameter_indices(
    first: int, last: int, shape: tuple[int, ...], block_shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """The index of the parameter for each of the elements [first, last)."""
    elements = np.arange(first, last)
    indices = np.zeros(last - first, np.int64)
    for axis, (size, block) in enumerate(zip(shape, block_shape, strict=True)):
        position = elements // prod(shape[axis + 1 :]) % size
        indices = indices * -(-size // block) + position // block
    return indices
