"""Offsets that are zero points in another form.

With 2 bits and more MLX 0.32 quantizes so that zero has a code: its biases are multiples of its scales, but for the
last place, and so are those that zero points become when codes move to MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT16, is_integer
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.formats.encodings.values.exactness import largest_change
from nibblecast.formats.encodings.values.refit import flat, from_elements, in_pieces

_MOST_MULTIPLE = 1 << 14
#: Of a scale: bfloat16's last place is a whole step of 8-bit codes, which is no rounding any more.
_MOST_STEP = 1 / 8
_FRACTION_BITS: Mapping[np.dtype[Any], int] = MappingProxyType(
    {
        FLOAT16: 10,
        BFLOAT16: 7,
        FLOAT32: 23,
        FLOAT64: 52,
    }
)


def offsets_as_zero_points(weight: Tensor) -> tuple[Tensor, tuple[Loss, ...]]:
    """The weight with zero points, of int16, in the place of its offsets, and the loss where a value changes. Raises
    Unsupported where an offset is further from a multiple of its scale than the last place of its dtype, or than an
    eighth of the scale, or where zero points that there are already are no integers."""
    quantization = weight.quantization
    if quantization is None or quantization.offset is None:
        return weight, ()
    if flat(quantization.offset).dtype not in _FRACTION_BITS:
        raise Unsupported(f"has offsets of {quantization.offset.dtype}", tensor=weight.name)
    if quantization.zero_point is not None and not is_integer(quantization.zero_point.dtype):
        raise Unsupported("has offsets beside zero points that are not integers", tensor=weight.name)
    for piece in in_pieces({"scale": quantization.scale, "offset": quantization.offset}):
        _check(weight.name, piece["scale"].astype(np.float64), piece["offset"])
    changed = _with_zero_points(weight)
    own = quantization.value_dtype or quantization.compute_dtype
    own = own if own != np.float64 else FLOAT32
    change = largest_change(weight, _with_zero_points, own)
    if not change:
        return changed, ()
    detail = f"its offsets become zero points: as {own} values change by at most {change:.2g}"
    return changed, (Loss(weight.name, "rounded", detail),)


def _check(name: str, scale: NDArray[np.float64], offset: NDArray[Any]) -> None:
    """Raises Unsupported unless offsets are multiples of their scales that int16 holds beside those of codes."""
    wide, multiples = offset.astype(np.float64), _multiples(scale, offset)
    last_place = 2.0 ** (np.frexp(wide)[1] - 1.0 - _FRACTION_BITS[offset.dtype])
    with np.errstate(invalid="ignore"):
        most = np.minimum(last_place, np.abs(scale) * _MOST_STEP)
        fits = (np.abs(multiples * scale - wide) <= most) & (np.abs(multiples) <= _MOST_MULTIPLE)
    if not fits.all():
        at = int(np.argmin(fits))
        seen = f"{offset.flat[at]} where the scale is {scale.flat[at]}"
        raise Unsupported(
            f"has offsets that are not multiples of its scales ({seen}), so they cannot become zero points", tensor=name
        )


def _multiples(scale: NDArray[np.float64], offset: NDArray[Any]) -> NDArray[np.float64]:
    """The integers next to offset / scale; zeros where the scale is zero."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(scale == 0, 0.0, np.rint(offset.astype(np.float64) / scale))


def _with_zero_points(weight: Tensor) -> Tensor:
    quantization = weight.quantization
    if quantization is None or quantization.offset is None:
        return weight

    def zero_points(
        scale: NDArray[Any], offset: NDArray[Any], zero_point: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        subtracted = -_multiples(scale.astype(np.float64), offset)
        return subtracted if zero_point is None else subtracted + zero_point

    zero_point = from_elements("zero_point", dict(quantization.parameters()), INT16, zero_points)
    return replace(weight, quantization=replace(quantization, zero_point=zero_point, offset=None))
