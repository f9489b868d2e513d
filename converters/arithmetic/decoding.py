"""Codes -> floats, arrays only: the one implementation of the formula.

    value = (scale * (code - zero_point) + offset) * factor

Integer zero points are subtracted exactly. The multiplication and the addition are one float32 operation each, in this
order. The result is rounded once to the wanted dtype. This is bit for bit what LiteRT 2.3 and onnxruntime 1.32 compute.
If the quantization names another `compute_dtype`, each operation is rounded to it. This is what PyTorch computes with
tensors of float16 and bfloat16, and with the float64 scales of its own quantized tensors. If it has a `value_dtype`,
values wanted in another dtype of 16 bits are rounded to it first, as `Tensor.to` would find them; float32 values are
not. The work is done in pieces that stay in the processor's cache.

Why NumPy is the reference. Each NumPy operation is one rounding of IEEE 754, so the order of operations here is the
definition of the result. It runs wherever NumPy does. Compiled loops (`compiled`) are optional and must give the same
bits: whether numba is installed changes the speed of a conversion, never its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic import compiled
from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT32, FLOAT64, SUB_BYTE, bits_of, is_integer
from nibblecast.converters.arithmetic.float16 import Float16
from nibblecast.converters.arithmetic.packing import Workspace, byte_table, packed_size, unpack

_PIECE_ELEMENTS = 1 << 17  # 512 KiB of float32: inside a common second-level cache

_EXACT_IN_INT8 = 112  # largest zero point for which 4-bit codes give -128 <= code - zero_point <= 127
_EXACT_IN_FLOAT32 = 1 << 23  # below it, zero points and 16-bit codes give differences below 2 ** 24


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """The parameters of the formula as arrays of the grid's shape: one element for each block of `block_shape`.

    `scale` and `offset` are float32, or float64 if the library computes in float64. `zero_point` has an integer dtype
    (int8 or uint8 for sub-byte ones), or float32 if it is not an integer. `codebook` has shape (2 ** bits,).
    `group_index` is an axis and the group of each of its positions. `compute_dtype`, `factor` and `value_dtype` are as
    in `ir.Quantization`.
    """

    block_shape: tuple[int, ...]
    scale: NDArray[Any]
    zero_point: NDArray[Any] | None = None
    offset: NDArray[Any] | None = None
    codebook: NDArray[np.float32] | None = None
    group_index: tuple[int, NDArray[Any]] | None = None
    compute_dtype: np.dtype[Any] = FLOAT32
    factor: float = 1.0
    value_dtype: np.dtype[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Where:
    """Positions [start, stop) along `axis` of a tensor seen in `view_shape`, in which a block is an axis of its own."""

    view_shape: tuple[int, ...]
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One operation of the formula; `parameter` broadcasts to the view. An integer parameter is for integer codes. The
    result is rounded to `rounded_to` (None: it keeps the dtype of `values`)."""

    operation: np.ufunc
    parameter: NDArray[Any]
    rounded_to: np.dtype[Any] | None = None

    def apply(self, values: NDArray[Any], where: _Where, rounding: _Rounding) -> None:
        """Applies the operation in place; `values` are the flat elements at `where`."""
        parameter = self.parameter
        if not where.view_shape:
            view = values.reshape(())
        else:
            shape, axis = where.view_shape, where.axis
            view = values.reshape(*shape[:axis], where.stop - where.start, *shape[axis + 1 :])
            if parameter.shape[axis] > 1:
                parameter = parameter[(slice(None),) * axis + (slice(where.start, where.stop),)]
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32's range is infinity, as in every framework
            self.operation(view, parameter, out=view)
            if self.rounded_to is not None and values.dtype.kind == "f":
                rounding.round(values, self.rounded_to)


class _Rounding:
    """Casts and rounds up to `most` floats at a time, in memory that is allocated once."""

    def __init__(self, most: int) -> None:
        self._most = most

    @cached_property
    def _float16(self) -> Float16:
        return Float16()

    @cached_property
    def _bfloat16(self) -> NDArray[Any]:
        return np.empty(self._most, ml_dtypes.bfloat16)

    def cast(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Writes `values` to `out`; beyond a dtype's range is infinity, as in every framework."""
        if out.dtype == np.float16 and values.dtype == np.float32:
            self._float16.cast(values, out)
            return
        with np.errstate(over="ignore", invalid="ignore"):  # signalling NaNs
            out[...] = values

    def round(self, values: NDArray[Any], dtype: np.dtype[Any]) -> None:
        """Rounds `values` in place to `dtype`, float16 or bfloat16; the array keeps its own dtype."""
        if dtype == np.float16 and values.dtype == np.float32:
            self._float16.round(values)
            return
        rounded = self._bfloat16[: values.size].view(dtype)
        self.cast(values, rounded)
        values[...] = rounded


def decode(
    packed: NDArray[np.uint8],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    parameters: Parameters | None,
    out: NDArray[Any],
) -> None:
    """Writes the values of elements of `dtype` and `shape`, given as canonical bytes, flat to `out`, an array of shape
    (n,) and one of FLOAT_DTYPES. Without parameters the elements are plain values, which are cast. Each piece stays in
    the cache from unpacking to rounding."""
    if not out.size:
        return
    bits = bits_of(dtype)
    table = _table(dtype, parameters)
    steps = [] if parameters is None else _steps(parameters, dtype, shape, table, out.dtype)
    if steps and steps[-1].rounded_to == out.dtype:  # writing to `out` rounds anyway
        steps[-1] = replace(steps[-1], rounded_to=None)
    is_double = parameters is not None and parameters.compute_dtype == FLOAT64
    computed = FLOAT64 if is_double else FLOAT32
    view_shape = (out.size,) if parameters is None else _view_shape(shape, parameters)
    if computed == FLOAT32 and steps:
        operations = [(step.operation, step.parameter, step.rounded_to) for step in steps]
        if compiled.decode(packed, dtype, table, operations, view_shape, out):
            return
    axis = next((axis for axis, size in enumerate(view_shape) if size != 1), 0)
    count, unit = (view_shape[axis], prod(view_shape[axis + 1 :])) if view_shape else (1, 1)
    whole = 8 // gcd(8, unit * bits)  # so many units end on a whole byte
    piece = max(1, _PIECE_ELEMENTS // max(1, unit * whole)) * whole
    most = min(piece, count) * unit
    elements_of, rounding = _unpacker(dtype, most), _Rounding(most)
    scratch = None if out.dtype == computed else np.empty(most, computed)
    for start in range(0, count, piece):
        where = _Where(view_shape, axis, start, min(count, start + piece))
        first, last = start * unit, where.stop * unit
        target = out[first:last]
        values = target if scratch is None else scratch[: target.size]
        codes = packed[first * bits // 8 : packed_size(last, bits)]
        remaining: Sequence[_Step] = steps
        if table is not None:
            _look_up(table, codes, values)
        else:
            remaining = _widen(elements_of(codes, target.size), steps, where, values, rounding)
        for step in remaining:
            step.apply(values, where, rounding)
        if scratch is not None:
            rounding.cast(values, target)


def _unpacker(dtype: np.dtype[Any], most: int) -> Callable[[NDArray[np.uint8], int], NDArray[Any]]:
    """A function that unpacks up to `most` elements of canonical bytes; its result is valid until the next call."""
    if dtype not in SUB_BYTE:
        return lambda packed, count: packed.view(dtype)
    workspace = Workspace(dtype, packed_size(most, bits_of(dtype)))
    return lambda packed, count: unpack(packed, dtype, count, workspace)


def _widen(
    elements: NDArray[Any], steps: Sequence[_Step], where: _Where, out: NDArray[Any], rounding: _Rounding
) -> Sequence[_Step]:
    """Writes `elements` to `out`, after subtracting their zero points if that is done in integers. Returns the steps
    that remain."""
    if steps and steps[0].parameter.dtype.kind == "i":
        wanted = steps[0].parameter.dtype
        exact = elements.astype(wanted, copy=wanted != np.int8)  # unpacked codes are a private copy
        steps[0].apply(exact, where, rounding)
        out[...] = exact
        if steps[0].rounded_to is not None:
            rounding.round(out, steps[0].rounded_to)
        return steps[1:]
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32; signalling NaNs
        out[...] = elements
    return steps


def _steps(
    parameters: Parameters,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    table: NDArray[np.float32] | None,
    wanted: np.dtype[Any],
) -> list[_Step]:
    """The operations after the look-up, in order, for values of dtype `wanted`."""
    rounded_to = None if parameters.compute_dtype in (FLOAT32, FLOAT64) else parameters.compute_dtype

    def step(operation: np.ufunc, parameter: NDArray[Any]) -> _Step:
        spread = _spread(parameter, shape, parameters)
        if spread.dtype.kind == "i" and (spread == spread.flat[0]).all():
            spread = spread[(slice(1),) * spread.ndim]  # NumPy is faster with a single one than with one per block
        return _Step(operation, spread, rounded_to)

    steps = []
    if parameters.zero_point is not None:
        zero_point = _zero_point(parameters.zero_point, None if table is not None else dtype)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            is_needed = bool(zero_point.any())
        # symmetric schemes often store zeros, which need no step; but uint64 codes need it to become int64
        if is_needed or dtype == np.uint64:
            steps.append(step(np.subtract, zero_point))
    steps.append(step(np.multiply, parameters.scale))
    if parameters.offset is not None:
        steps.append(step(np.add, parameters.offset))
    if parameters.factor != 1:
        factor = np.full((1,) * len(_view_shape(shape, parameters)), parameters.factor, np.float32)
        steps.append(_Step(np.multiply, factor, rounded_to))
    if parameters.value_dtype is not None and wanted != FLOAT32:
        steps[-1] = replace(steps[-1], rounded_to=parameters.value_dtype)
    return steps


def _zero_point(zero_point: NDArray[Any], codes: np.dtype[Any] | None) -> NDArray[Any]:
    """The zero points in the dtype of the subtraction: int8 for sub-byte codes, which is fastest; float32 where the
    difference is exact in it; int64 for wide codes or zero points; float32 for zero points that are not integers.
    `codes` is the dtype of the codes, None if these are looked up."""
    if codes is None or not is_integer(codes) or zero_point.dtype.kind == "f":
        return zero_point.astype(np.float32, copy=False)
    stored = zero_point.astype(np.int64)
    largest = max(int(stored.max(initial=0)), -int(stored.min(initial=0)))
    if codes.itemsize >= 4 or largest >= _EXACT_IN_FLOAT32:
        return stored
    return stored.astype(np.int8 if codes in SUB_BYTE and largest <= _EXACT_IN_INT8 else np.float32)


def _table(dtype: np.dtype[Any], parameters: Parameters | None) -> NDArray[np.float32] | None:
    """The float32 elements of each of the 256 bytes, shape (256, elements per byte). None unless codes stand for other
    numbers: they index a codebook, or are the bit patterns of a small float."""
    if parameters is not None and parameters.codebook is not None:
        entries = parameters.codebook
        return entries[byte_table(dtype)] if dtype in SUB_BYTE else entries.reshape(256, 1)
    return byte_table(dtype).view(dtype).astype(np.float32) if dtype == FLOAT4 else None


def _look_up(table: NDArray[np.float32], packed: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Writes the elements of `packed` to `out`; surplus elements of the last byte are dropped."""
    if out.dtype != np.float32:
        out[...] = table[packed].reshape(-1)[: out.size]
        return
    per_byte = table.shape[1]
    whole = out.size // per_byte
    entry = np.dtype({1: np.uint32, 2: np.uint64, 4: np.complex128}[per_byte])
    entries = np.ascontiguousarray(table).view(entry)[:, 0]
    np.take(entries, packed[:whole], out=out[: whole * per_byte].view(entry), mode="clip")
    if whole * per_byte < out.size:
        out[whole * per_byte :] = table[packed[whole]][: out.size - whole * per_byte]


def _splits(size: int, block: int) -> bool:
    """Whether the view splits an axis into (blocks, elements of a block). Else parameters are repeated as needed."""
    return 1 < block < size and size % block == 0


def _view_shape(shape: tuple[int, ...], parameters: Parameters) -> tuple[int, ...]:
    """`shape` with every axis of several whole blocks split in two."""
    indexed = None if parameters.group_index is None else parameters.group_index[0]
    view: list[int] = []
    for axis, (size, block) in enumerate(zip(shape, parameters.block_shape, strict=True)):
        view += [size // block, block] if _splits(size, block) and axis != indexed else [size]
    return tuple(view)


def _spread(parameter: NDArray[Any], shape: tuple[int, ...], parameters: Parameters) -> NDArray[Any]:
    """`parameter`, of the grid's shape, as it broadcasts to the view of `_view_shape`."""
    indexed, index = parameters.group_index or (None, None)
    at = 0
    for axis, (size, block) in enumerate(zip(shape, parameters.block_shape, strict=True)):
        if index is not None and axis == indexed:
            parameter = parameter.take(index, axis=at)
        elif _splits(size, block):
            at += 1
            parameter = np.expand_dims(parameter, at)
        elif 1 < block < size:  # the last block is shorter
            parameter = parameter.repeat(block, axis=at).take(range(size), axis=at)
        at += 1
    return parameter
