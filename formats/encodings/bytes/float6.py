"""float6 elements of six bits: four in three bytes, lowest bits first, taken apart when they are read.

compressed-tensors packs its mxfp6 weights so (0.20, compressors/mxfp6/helpers.py). safetensors has the dtypes F6_E2M3
and F6_E3M2 since 0.6, of which it says the number of bits and nothing else (0.8, tensor.rs): no order of the bits, and
no library is known here that writes them. They are read in this order, which is also that of its F4 as torch writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT6_E2M3, FLOAT6_E3M2
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Computed, Data
from nibblecast.formats.encodings.bytes.bit_fields import dense_fields

BITS = 6
#: The dtypes by what safetensors calls them.
BY_NAME: Mapping[str, np.dtype[Any]] = MappingProxyType({"F6_E2M3": FLOAT6_E2M3, "F6_E3M2": FLOAT6_E3M2})

_ELEMENTS, _BYTES = 8, 6  # what `dense_fields` takes apart at once


def one_in_a_byte(packed: Data, count: int) -> Data:
    """The canonical bytes of `count` float6 elements, one in each (ml_dtypes has no denser form)."""

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start // _ELEMENTS, -(-min(stop, count) // _ELEMENTS)
        taken = packed.read(first * _BYTES, min(last * _BYTES, packed_size(count, BITS)))
        fields = dense_fields(taken.reshape(1, -1), BITS).reshape(-1)
        return fields[start - first * _ELEMENTS : min(stop, count) - first * _ELEMENTS]

    return Computed(count, read, (packed,))


def float6(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], packed: Data) -> Tensor:
    """The tensor of that shape, plain, of the bits in `packed`."""
    return Tensor(name, shape, dtype, one_in_a_byte(packed, prod(shape)))
