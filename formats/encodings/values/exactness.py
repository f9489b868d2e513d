"""How far values change when a weight gets parameters of another form.

Codes are not read for it: for each set of parameters that some block has, every code that there can be is decoded in
both forms. This costs about what dequantizing the weight does, and much less where blocks have parameters in common, as
those of float16 and bfloat16 have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.values.refit import in_pieces

_PIECE_ELEMENTS = 1 << 22
_KEY_BYTES = 8


def largest_change(weight: Tensor, function: Callable[[Tensor], Tensor], dtype: np.dtype[Any]) -> float:
    """The largest difference between a value that a code of up to 8 bits can have and the one that `function` makes of
    it, both as `dtype`: 0 where none can change, infinity where a number becomes none. `function` takes a quantized
    weight of any shape and gives one of the same codes, with other parameters for the same blocks, which follow from
    those that each has. NaN equals NaN, and zeros are equal whatever their signs."""
    largest = 0.0
    for part in _every_code(weight):
        before, after = (each.dequantize(dtype).astype(np.float32) for each in (part, function(part)))
        changed = (before != after) & ~(np.isnan(before) & np.isnan(after))
        if not changed.any():
            continue
        with np.errstate(invalid="ignore"):
            differences = np.abs(before[changed].astype(np.float64) - after[changed])
        largest = max(largest, float(differences.max()) if np.isfinite(differences).all() else np.inf)
    return largest


def _every_code(weight: Tensor) -> Iterator[Tensor]:
    """All codes there can be with the parameters of every block: a row of 2 ** bits for each set of these, a few rows
    in each tensor."""
    quantization = weight.quantization
    if quantization is None:
        return
    roles = ("scale", "zero_point", "offset")
    parameters = {role: parameter for role, parameter in quantization.parameters() if role in roles}
    codes = np.arange(1 << weight.bits, dtype=np.uint8).view(weight.dtype)
    step = _PIECE_ELEMENTS // codes.size
    for arrays in in_pieces(parameters):
        rows = _distinct(arrays)
        for start in range(0, rows.size, step):
            wanted = rows[start : start + step]
            taken: dict[str, Any] = {
                role: Tensor.from_array(role, array[wanted, None]) for role, array in arrays.items()
            }
            taken |= {"block_shape": (1, codes.size), "group_index": None}
            all_codes = np.tile(codes, (wanted.size, 1))
            yield Tensor.from_array(weight.name, all_codes, replace(quantization, **taken))


def _distinct(parameters: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """A block for each set of parameters; every block where these are too wide to be told apart at once."""
    count = next(iter(parameters.values())).size
    itemsizes = [array.dtype.itemsize for array in parameters.values()]
    if sum(itemsizes) > _KEY_BYTES:
        return np.arange(count)
    keys = np.zeros((count, _KEY_BYTES), np.uint8)
    for end, array in zip(np.cumsum(itemsizes), parameters.values(), strict=True):
        keys[:, end - array.dtype.itemsize : end] = np.ascontiguousarray(array).view(np.uint8).reshape(count, -1)
    return np.unique(keys.view(np.uint64).reshape(-1), return_index=True)[1]
