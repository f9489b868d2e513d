"""How codes of 2 and 4 bits lie in the bytes of an array: densely, as in the model, or as other kernels want them.

Dense is the canonical order of `converters.arithmetic.packing`: the first code of a byte in its lowest bits, nothing
between rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.ir import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """One code to a byte (`unpacked`), or several: the first of a byte in its highest bits (`high_first`), every row of
    the last axis from a byte of its own on (`rows_padded`), its last byte filled up with zeros."""

    unpacked: bool = False
    high_first: bool = False
    rows_padded: bool = False

    @property
    def macro(self) -> str:
        """`nibblecast_tensor.packing`, without NIBBLECAST_."""
        return PACKING_NAMES[self.unpacked + 2 * self.high_first + 4 * self.rows_padded]

    def nbytes(self, shape: tuple[int, ...], bits: int) -> int:
        """Bytes that the codes of a tensor of this shape take; `bits` is 2 or 4."""
        if self.unpacked:
            return prod(shape)
        if self.rows_padded:
            return prod(shape[:-1]) * packed_size(row_of(shape), bits)
        return packed_size(prod(shape), bits)

    def is_dense(self, shape: tuple[int, ...], bits: int) -> bool:
        """Whether a tensor of this shape has the very bytes that it has when it is packed densely."""
        whole_rows = not self.rows_padded or row_of(shape) * bits % 8 == 0 or prod(shape[:-1]) == 1
        return whole_rows and not self.unpacked and not self.high_first

    def stored(self, part: Tensor) -> NDArray[Any]:
        """The bytes of a tensor, or of a part that `Tensor.parts` gives, which cuts rows at whole bytes only: int8 for
        unpacked signed codes, else uint8, of shape (n,)."""
        packed = part.packed()
        bits = part.bits
        if self.unpacked:
            return unpack(packed, part.dtype, part.size)
        row = row_of(part.shape)
        if self.rows_padded and row * bits % 8:
            codes = unpack(packed, part.dtype, part.size).reshape(-1, row)
            packed = pack(np.pad(codes, ((0, 0), (0, -row % (8 // bits)))), bits)
        return in_other_order(packed, bits) if self.high_first else packed


#: `nibblecast_tensor.packing` by number, without NIBBLECAST_.
PACKING_NAMES: Mapping[int, str] = MappingProxyType(
    {0: "DENSE", 1: "UNPACKED", 2: "HIGH_FIRST", 4: "ROWS_PADDED", 6: "ROWS_PADDED_HIGH_FIRST"}
)
DENSE = Packing()
#: The packings by the same numbers.
PACKINGS: Mapping[int, Packing] = MappingProxyType(
    {number: Packing(bool(number & 1), bool(number & 2), bool(number & 4)) for number in PACKING_NAMES}
)


def packing_for(tensor: Tensor, packing: Packing) -> Packing:
    """The packing that a tensor has where `packing` is what the user wants: elements of whole bytes have none."""
    return packing if tensor.dtype in SUB_BYTE else DENSE


def row_of(shape: tuple[int, ...]) -> int:
    """Elements in a row: along the last axis."""
    return shape[-1] if shape else 1


def in_other_order(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Bytes with their codes of `bits` bits, 2 or 4, from the last to the first."""
    return np.take(_reversed(bits), packed)


@cache
def _reversed(bits: int) -> NDArray[np.uint8]:
    """Every byte with its codes in reverse."""
    codes = unpack(np.arange(256, dtype=np.uint8), _UNSIGNED[bits], 256 * 8 // bits).reshape(256, -1)
    return pack(codes[:, ::-1], bits)


_UNSIGNED = {bits: dtype for dtype, (bits, storage) in SUB_BYTE.items() if storage == np.uint8}
