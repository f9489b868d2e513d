"""QuantizeLinear of constants: the codes that a runtime makes of floats when it loads the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.ir import Quantization, Tensor
from converters.packing import SUB_BYTE, bits_of, pack, packed_size
from converters.storage import Data


@dataclass(slots=True, eq=False)
class RoundedCodes:
    """Codes of floats, made when they are first read: round half to even of x / scale, plus the zero point, saturated
    (ONNX operators, QuantizeLinear 21)."""

    floats: Tensor
    quantization: Quantization
    dtype: np.dtype[Any]
    made: NDArray[np.uint8] | None = field(default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes."""
        return packed_size(self.floats.size, bits_of(self.dtype))

    @property
    def sources(self) -> tuple[Data, ...]:
        """What the codes are made of."""
        return (self.floats.data,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""
        if self.made is None:
            self.made = self._make()
        return self.made[start:stop]

    def _make(self) -> NDArray[np.uint8]:
        q, bits = self.quantization, bits_of(self.dtype)
        signed = (SUB_BYTE[self.dtype][1] if self.dtype in SUB_BYTE else self.dtype).kind == "i"
        lowest = -(1 << (bits - 1)) if signed else 0
        with np.errstate(all="ignore"):
            codes = np.rint(self.floats.dequantize(np.float32) / self._spread(q.scale.dequantize(np.float32)))
        if q.zero_point is not None:
            codes = codes + self._spread(q.zero_point.codes().astype(np.float32))
        integers = np.nan_to_num(np.clip(codes, lowest, lowest + (1 << bits) - 1)).astype(np.int64)
        if self.dtype in SUB_BYTE:
            return pack(integers, bits)
        return np.ascontiguousarray(integers.astype(self.dtype)).reshape(-1).view(np.uint8)

    def _spread(self, grid: NDArray[Any]) -> NDArray[Any]:
        """Parameters in the shape of the tensor."""
        for axis, (size, block) in enumerate(zip(self.floats.shape, self.quantization.block_shape, strict=True)):
            grid = grid.take(np.arange(size) // block, axis=axis)
        return grid
