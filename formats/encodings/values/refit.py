"""A weight's codes and parameters in the form that an encoding has, with the same values.

Codes are lazy as ever; parameters, which are small, are computed whole each time that any of one is read. What would
change a value is refused, or is a Loss that the caller gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    FLOAT4,
    FLOAT32,
    INT2,
    INT4,
    INT8,
    INT16,
    SUB_BYTE,
    UINT2,
    UINT4,
    UINT8,
    bits_of,
    is_integer,
)
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor, grid_shape
from nibblecast.converters.storage import Computed, Data
from nibblecast.formats.encodings.bytes.rows import by_rows
from nibblecast.formats.encodings.values.parameters import FLOATS, value_dtype

_UNSIGNED: Mapping[np.dtype[Any], np.dtype[Any]] = MappingProxyType({INT2: UINT2, INT4: UINT4, INT8: UINT8})
_SIGNED = MappingProxyType({unsigned: signed for signed, unsigned in _UNSIGNED.items()})
#: In every code of a byte the highest bit, by which signed and unsigned codes differ.
_HIGHEST_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}
#: So many elements of any dtype are whole bytes.
_WHOLE_BYTES = 4
_PIECE_ELEMENTS = 1 << 18


def integer_quantization(weight: Tensor) -> Quantization:
    """The quantization of a weight that has integer codes of up to 8 bits, which are numbers themselves. Raises
    Unsupported for others."""
    quantization = weight.quantization
    if quantization is None or not (weight.dtype in _UNSIGNED or weight.dtype in _SIGNED):
        raise Unsupported(f"has codes of {weight.dtype}, where integers of up to 8 bits are needed", tensor=weight.name)
    if quantization.codebook is not None:
        raise Unsupported("has codes that are looked up in a codebook", tensor=weight.name)
    return quantization


def unsigned(weight: Tensor) -> Tensor:
    """int2, int4 and int8 codes as unsigned ones: 2 ** (bits - 1) is added to them and to their zero points, which are
    then there, of int16. Raises Unsupported for other codes, and for zero points that are no integers."""
    quantization = integer_quantization(weight)
    added = 1 << weight.bits - 1 if weight.dtype in _UNSIGNED else 0
    zero_point = _shifted_zero_point(weight, quantization, added)
    return _shifted(weight, replace(quantization, zero_point=zero_point), _UNSIGNED)


def signed(weight: Tensor) -> Tensor:
    """uint2, uint4 and uint8 codes as signed ones: 2 ** (bits - 1) is subtracted from them and from their zero points,
    which are of int16, and left out where signed codes have none. Raises Unsupported as `unsigned` does."""
    quantization = integer_quantization(weight)
    subtracted = 1 << weight.bits - 1 if weight.dtype in _SIGNED else 0
    if quantization.zero_point is not None or subtracted:
        quantization = replace(quantization, zero_point=_shifted_zero_point(weight, quantization, -subtracted))
    return _shifted(weight, quantization, _SIGNED)


def _shifted(weight: Tensor, quantization: Quantization, dtypes: Mapping[np.dtype[Any], np.dtype[Any]]) -> Tensor:
    if weight.dtype not in dtypes:
        return replace(weight, quantization=quantization)
    mask, data = _HIGHEST_BITS[weight.bits], weight.data
    last = packed_size(weight.size, weight.bits)
    unused = last * 8 - weight.size * weight.bits

    def flipped(start: int, stop: int) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] = data.read(start, stop) ^ np.uint8(mask)
        if unused and stop >= last and codes.size:  # what follows the last code stays zero
            codes[-1] &= np.uint8(0xFF >> unused)
        return codes

    return replace(
        weight, dtype=dtypes[weight.dtype], data=Computed(data.nbytes, flipped, (data,)), quantization=quantization
    )


def _shifted_zero_point(weight: Tensor, quantization: Quantization, added: int) -> Tensor:
    zero_point = quantization.zero_point
    if zero_point is None:
        return constant("zero_point", added, quantization.scale.shape, INT16)
    values = flat(zero_point).numpy()
    if not is_integer(zero_point.dtype) or zero_point.quantization is not None:
        values = values.astype(np.float32)
        if not (values == np.rint(values)).all():
            seen = values[values != np.rint(values)].flat[0]
            raise Unsupported(f"has the zero point {seen}, where integers are needed", tensor=weight.name)
    wide = values.astype(np.int64) + added
    if wide.size and (wide.min() < -(1 << 15) or wide.max() >= 1 << 15):
        raise Unsupported(f"has zero points from {wide.min()} to {wide.max()}", tensor=weight.name)
    return elementwise(zero_point, INT16, lambda stored: stored.astype(np.int64) + added)


def computed(
    role: str, shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[[], NDArray[Any]], *sources: Data
) -> Tensor:
    """A parameter that `make` gives whole, an array of `prod(shape)` elements (of dtypes narrower than a byte one in
    each)."""
    bits = bits_of(dtype)

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        elements = make()
        if dtype in SUB_BYTE:
            return pack(elements, bits)[start:stop]
        return np.ascontiguousarray(elements, dtype).reshape(-1).view(np.uint8)[start:stop]

    return Tensor(role, shape, dtype, Computed(packed_size(prod(shape), bits), compute, sources))


def constant(role: str, value: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """The same integer everywhere."""
    return computed(role, shape, dtype, lambda: np.full(shape, value, np.int64).astype(_stored(dtype)))


def elementwise(parameter: Tensor, dtype: np.dtype[Any], function: Callable[[NDArray[Any]], NDArray[Any]]) -> Tensor:
    """What `function` makes of a parameter's elements: its integers, or its float32 values where it is quantized
    itself, in its shape."""
    values = flat(parameter)

    @np.errstate(over="ignore", invalid="ignore")  # beyond a narrower dtype's range is infinity
    def elements() -> NDArray[Any]:
        return function(values.codes()).astype(_stored(dtype))

    return computed(parameter.name, parameter.shape, dtype, elements, values.data)


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return SUB_BYTE[dtype][1] if dtype in SUB_BYTE else dtype


def from_elements(
    role: str, parameters: Mapping[str, Tensor], dtype: np.dtype[Any], function: Callable[..., NDArray[Any]]
) -> Tensor:
    """What `function` makes of the elements of parameters of one shape, as many of each as are asked for, which it gets
    by their names: integers, or float32 values of those that are quantized themselves. `dtype` is a byte wide or more.
    """
    values = {name: flat(parameter) for name, parameter in parameters.items()}
    shape, sources = next(iter(values.values())).shape, tuple(each.data for each in values.values())

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first = start // dtype.itemsize // _WHOLE_BYTES * _WHOLE_BYTES
        last = -(-stop // dtype.itemsize)
        made = function(**{name: elements(each, first, last) for name, each in values.items()}).astype(dtype)
        return made.view(np.uint8)[start - first * dtype.itemsize : stop - first * dtype.itemsize]

    return Tensor(role, shape, dtype, Computed(prod(shape) * dtype.itemsize, compute, sources))


def elements(parameter: Tensor, first: int, last: int) -> NDArray[Any]:
    """Elements [first, last) of a parameter, flattened, as `codes` gives them; `first` is a multiple of 4, so that no
    byte is cut."""
    packed = parameter.data.read(first * parameter.bits // 8, packed_size(last, parameter.bits))
    if parameter.dtype in SUB_BYTE:
        return unpack(packed, parameter.dtype, last - first)
    return packed.view(parameter.dtype)


def in_pieces(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, NDArray[Any]]]:
    """The elements of parameters of one shape, flattened and of their dtypes, many at a time; float32 values of those
    that are quantized themselves."""
    values = {name: flat(parameter) for name, parameter in parameters.items()}
    size = next(iter(values.values())).size
    for first in range(0, size, _PIECE_ELEMENTS):
        last = min(first + _PIECE_ELEMENTS, size)
        yield {name: elements(each, first, last).view(each.dtype) for name, each in values.items()}


def flat(parameter: Tensor) -> Tensor:
    """A parameter that is quantized itself as its float32 values, which are what decoding computes first; any other as
    it is."""
    if parameter.quantization is None:
        return parameter
    if not parameter.shape:
        make = lambda: parameter.dequantize(np.float32)  # noqa: E731
        return computed(parameter.name, (), FLOAT32, make, *parameter.stored())
    outer = next((axis for axis, size in enumerate(parameter.shape) if size != 1), 0)

    def rows(first: int, last: int) -> NDArray[Any]:
        return parameter.rows(first, last).dequantize(np.float32)

    data = by_rows(parameter.shape[outer:], FLOAT32, rows, *parameter.stored(), step=parameter.row_step)
    return Tensor(parameter.name, parameter.shape, FLOAT32, data)


def refined(weight: Tensor, block_shape: tuple[int, ...]) -> Tensor:
    """The weight with parameters for smaller blocks, which repeat those of the larger ones. Raises Unsupported where
    these are not whole multiples."""
    quantization = weight.quantization
    if quantization is None or quantization.block_shape == block_shape:
        return weight
    for axis, (old, new) in enumerate(zip(quantization.block_shape, block_shape, strict=True)):
        if old < weight.shape[axis] and old % new:
            raise Unsupported(
                f"has parameters in blocks of {quantization.block_shape}, which are not whole blocks of {block_shape}",
                tensor=weight.name,
            )
    if quantization.group_index is not None:
        raise Unsupported("has a group index, which goes with its own blocks only", tensor=weight.name)
    grid = grid_shape(weight.shape, block_shape)
    places = tuple(
        np.arange(count) * new // max(old, 1)
        for count, old, new in zip(grid, quantization.block_shape, block_shape, strict=True)
    )

    def spread(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        values = flat(parameter)
        return computed(
            parameter.name,
            grid,
            values.dtype,
            lambda: values.codes()[np.ix_(*places)] if grid else values.codes(),
            values.data,
        )

    scale = spread(quantization.scale)
    if scale is None:
        return weight
    finer = replace(
        quantization,
        scale=scale,
        block_shape=block_shape,
        zero_point=spread(quantization.zero_point),
        offset=spread(quantization.offset),
    )
    return replace(weight, quantization=finer)


def in_row_groups(weight: Tensor) -> tuple[Tensor, int]:
    """The weight with parameters for groups along its last axis, for each position of the others, and the size of a
    group: the whole last axis where parameters do not differ along it. Raises Unsupported as `refined` does."""
    quantization = weight.quantization
    if quantization is None or not weight.shape:
        raise Unsupported("has no axis, where a matrix is needed", tensor=weight.name)
    size = max(1, min(quantization.block_shape[-1], weight.shape[-1]))
    if quantization.group_index is not None:
        return weight, size
    return refined(weight, (*(1,) * (len(weight.shape) - 1), size)), size


def computed_with_scales(weight: Tensor, dtype: np.dtype[Any] | None = None) -> tuple[Tensor, tuple[Loss, ...]]:
    """The weight as libraries compute that round each operation to the dtype of the scales: with scales of `dtype`
    (None: as they are; float64 and nested ones become float32), and the losses where values change."""
    scaled, losses = _scales_as(weight, dtype)
    if scaled.quantization is None:
        return weight, ()
    computed_so, changes = computed_in(scaled, scaled.quantization.scale.dtype, "the dtype of its scales")
    return computed_so, (*losses, *changes)


def rounded_with_scales(weight: Tensor, *, widened: bool) -> tuple[Tensor, tuple[Loss, ...]]:
    """The weight as libraries give it that multiply once, and round values to the dtype of the scales. These are made
    float32 where they are no plain floats and, `widened`, where values are float32; else these are rounded."""
    quantization = weight.quantization
    if quantization is None:
        return weight, ()
    scaled, losses = _scales_as(weight, FLOAT32 if widened and own_dtype(quantization) == FLOAT32 else None)
    scale = (scaled.quantization or quantization).scale
    rounded_so, changes = rounded_to(scaled, scale.dtype, "the dtype of its scales")
    return rounded_so, (*losses, *changes)


def _scales_as(weight: Tensor, dtype: np.dtype[Any] | None) -> tuple[Tensor, tuple[Loss, ...]]:
    """With scales and offsets of `dtype` (None: as they are; float64 and nested ones become float32), and the losses
    where they are rounded."""
    quantization = weight.quantization
    if quantization is None:
        return weight, ()
    wanted = dtype or (quantization.scale.dtype if quantization.scale.dtype in FLOATS else FLOAT32)
    losses: list[Loss] = []
    changed: dict[str, Any] = {}
    for role, parameter in (("scale", quantization.scale), ("offset", quantization.offset)):
        if parameter is None or (parameter.dtype == wanted and parameter.quantization is None):
            continue
        changed[role] = elementwise(parameter, wanted, lambda stored: stored)
        values = flat(parameter).numpy()
        with np.errstate(over="ignore"):
            exact = np.array_equal(values.astype(wanted).astype(values.dtype), values, equal_nan=True)
        if not exact:
            losses.append(Loss(weight.name, "rounded", f"its {role} is rounded to {wanted} ({values.dtype} before)"))
    return replace(weight, quantization=replace(quantization, **changed)), tuple(losses)


def own_dtype(quantization: Quantization) -> np.dtype[Any]:
    """The dtype of the values that the library gives that made the weight."""
    return quantization.value_dtype or quantization.compute_dtype


def computed_in(weight: Tensor, dtype: np.dtype[Any], what: str) -> tuple[Tensor, tuple[Loss, ...]]:
    """The weight as a library computes that rounds each operation to `dtype`, which is `what`, and the loss where
    values were of another one. Codes less zero points must be numbers of all these dtypes."""
    return _given_as(weight, dtype, what, dtype, None)


def rounded_to(weight: Tensor, dtype: np.dtype[Any], what: str) -> tuple[Tensor, tuple[Loss, ...]]:
    """Likewise of a library that computes in float32 and rounds values to `dtype` in the end."""
    return _given_as(weight, dtype, what, FLOAT32, value_dtype(dtype))


def _given_as(
    weight: Tensor, dtype: np.dtype[Any], what: str, compute: np.dtype[Any], value: np.dtype[Any] | None
) -> tuple[Tensor, tuple[Loss, ...]]:
    quantization = weight.quantization
    if quantization is None:
        return weight, ()
    given = replace(weight, quantization=replace(quantization, compute_dtype=compute, value_dtype=value))
    before = own_dtype(quantization)
    if before == dtype:
        return given, ()
    return given, (Loss(weight.name, "rounded", f"its values become {dtype}, {what} ({before} before)"),)


def powers_in_float32(weight: Tensor) -> tuple[Tensor, tuple[Loss, ...]]:
    """A weight of small floats, scales of which are powers of two, computed in float32, which holds the products; so
    does bfloat16 those of float4, so that nothing is lost."""
    quantization = weight.quantization
    exact, losses = rounded_to(weight, FLOAT32, "which holds them exactly")
    is_same = quantization is not None and weight.dtype == FLOAT4 and own_dtype(quantization) == BFLOAT16
    return exact, () if is_same else losses


def without_factor(weight: Tensor) -> tuple[Tensor, tuple[Loss, ...]]:
    """The factor multiplied into scales and offsets, and the loss, for values round differently."""
    quantization = weight.quantization
    if quantization is None or quantization.factor == 1:
        return weight, ()
    factor = np.float32(quantization.factor)

    def times(parameter: Tensor | None) -> Any:
        return parameter and elementwise(parameter, FLOAT32, lambda stored: stored.astype(np.float32) * factor)

    folded = replace(quantization, scale=times(quantization.scale), offset=times(quantization.offset), factor=1.0)
    loss = Loss(
        weight.name, "rounded", f"its factor {factor!s} is multiplied into its scales, so values round differently"
    )
    return replace(weight, quantization=folded), (loss,)


def extent(parameter: Tensor) -> tuple[int, int]:
    """The smallest and the largest of an integer parameter's elements; (0, 0) where there are none."""
    values = parameter.codes()
    return (int(values.min()), int(values.max())) if values.size else (0, 0)
