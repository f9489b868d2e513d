"""Tensors that are plainly codes of some encoding, and that none here took: found by a scale of theirs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nibblecast.converters.arithmetic.dtypes import SMALL_FLOATS, is_integer
from nibblecast.converters.ir import Tensor

#: What follows a weight's or a module's name in the names of its scales, and of its codes (the name itself is one).
_SCALES = (
    *("_scale", "_scales", "_scale_2", "_scale_inv", "_weight_scale", "_weight_scale_2", "_absmax", "_qzeros"),
    *(".scale", ".scales", ".scale_weight", ".qscale_weight", ".absmax", ".qzeros", ".SCB", "._scale"),
)
_CODES = ("", "_packed", "_blocks", "_qdata", ".weight", ".qweight", ".weight_packed", ".W_q", "._data")
_WIDEST_CODES = 4  # int64 tensors are indices and counters


def unread_codes(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys of plain integers and floats of a byte or less that have a scale beside them."""
    stems = {stem for key in tensors for stem in _stems(key, _SCALES)}
    return [
        key for key, tensor in tensors.items() if _may_be_codes(tensor) and not stems.isdisjoint(_stems(key, _CODES))
    ]


def _may_be_codes(tensor: Tensor) -> bool:
    if tensor.quantization is not None or tensor.size <= 1:
        return False
    dtype = tensor.dtype
    return (is_integer(dtype) and dtype.itemsize <= _WIDEST_CODES) or (dtype in SMALL_FLOATS and dtype.itemsize == 1)


def _stems(key: str, ends: tuple[str, ...]) -> Iterator[str]:
    """The names that such a tensor could belong to."""
    for end in ends:
        if key.endswith(end) and len(key) > len(end):
            yield key[: len(key) - len(end)]
