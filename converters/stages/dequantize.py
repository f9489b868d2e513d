"""Stage: codes -> floats.

    value = (scale * (code - zero_point) + offset) * factor

Integer zero points are subtracted exactly; the multiplication and the addition are one float32 operation each, in this
order; the result is rounded once to the wanted dtype. This is bit for bit what LiteRT 2.3 and onnxruntime 1.32 compute.
Where the quantization names another `compute_dtype`, each of the operations is rounded to it, which is what
PyTorch computes with tensors of float16 and bfloat16, and with the float64 scales of its own quantized tensors. Where
it has a `value_dtype`, values are rounded to that first when another dtype of 16 bits is wanted: as `Tensor.to` finds
them. float32 values are not.
The work is done in pieces that stay in the processor's cache.
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
from nibblecast.converters.arithmetic.float16 import Float16
from nibblecast.converters.arithmetic.packing import SUB_BYTE, Workspace, bits_of, byte_table, packed_size, unpack
from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.ir import Loss, Model, Quantization, Tensor, dtype_name, is_float, is_integer
from nibblecast.converters.storage import Computed

#: What values can be dequantized to, by name.
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_PART_ELEMENTS = 1 << 22
_NOTHING = np.empty(0, np.uint8)
_PIECE_ELEMENTS = 1 << 17  # 512 KiB of float32: inside a common second-level cache

_EXACT_IN_INT8 = 112  # less 4-bit codes, that is: -128 <= code - zero_point <= 127
_EXACT_IN_FLOAT32 = 1 << 23  # likewise, less 16-bit codes: below 2 ** 24


def dequantize(tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of `tensor` in its shape, as `dtype`: float32, float16 or bfloat16.

    Raises UsageError for another dtype and Unsupported for complex tensors and for opaque blocks, which have no real
    values.
    """
    _check_real(tensor, dtype)
    values = np.empty(tensor.size, dtype)
    _decode_parts(tensor, values)
    return values.reshape(tensor.shape)


def dequantized(tensor: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """`tensor` with its values as plain `dtype` elements, computed when they are read; a plain tensor as it is."""
    if tensor.quantization is None:
        return tensor
    _check_real(tensor, dtype)
    itemsize = dtype.itemsize

    def compute_into(start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        part, begin = tensor.around(start // itemsize, -(-stop // itemsize))
        nbytes, skipped = part.size * itemsize, start - begin * itemsize
        held = out if out.size >= nbytes else np.empty(nbytes, np.uint8)
        _decode_parts(part, held[:nbytes].view(dtype))
        part.release()
        return held[skipped : skipped + stop - start]

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        return compute_into(start, stop, _NOTHING)

    data = Computed(tensor.size * itemsize, compute, tuple(tensor.stored()), compute_into=compute_into)
    return replace(tensor, dtype=dtype, data=data, quantization=None)


def _decode_parts(tensor: Tensor, values: NDArray[Any]) -> None:
    """Writes the values of `tensor`, flat, to `values`."""
    start = 0
    for part in tensor.parts(_PART_ELEMENTS * tensor.bits // 8):
        _decode(part, values[start : start + part.size])
        start += part.size


def _check_real(tensor: Tensor, dtype: np.dtype[Any]) -> None:
    if dtype not in FLOAT_DTYPES.values():
        raise UsageError(f"dtype {dtype}: values come as {', '.join(FLOAT_DTYPES)}", tensor=tensor.name)
    if tensor.dtype.kind == "c" or tensor.dtype.names:
        name = dtype_name(tensor.dtype)
        raise Unsupported(f"{name} values have no float form: leave it out with --skip", tensor=tensor.name)


def dequantize_model(model: Model, dtype: np.dtype[Any]) -> Model:
    """Every quantized tensor as plain floats; tensors that are only parameters of those are left out."""
    tensors = {
        name: dequantized(tensor, dtype) for name, tensor in model.items() if tensor.parameter_of not in model.tensors
    }
    return replace(model, tensors=tensors)


def flatten_scales(model: Model) -> Model:
    """Every parameter that has a second-level scale multiplied out to float32: the decoded values stay the same bit for
    bit, because decoding computes exactly these numbers first. A Loss records each."""
    tensors, losses = dict(model.tensors), list(model.losses)
    for name, tensor in model.items():
        quantization = tensor.quantization
        if quantization is None:
            continue
        roles = [role for role, parameter in quantization.parameters() if parameter.quantization is not None]
        if not roles:
            continue
        flat = replace(
            quantization,
            scale=_flattened(quantization.scale),
            zero_point=quantization.zero_point and _flattened(quantization.zero_point),
            offset=quantization.offset and _flattened(quantization.offset),
        )
        tensors[name] = replace(tensor, quantization=flat)
        details = (f"the second-level scale of its {role} is multiplied out to float32" for role in roles)
        losses += [Loss(name, "widened", detail) for detail in details]
    return replace(model, tensors=tensors, losses=tuple(losses))


def fold_factors(model: Model) -> Model:
    """Every factor multiplied into the scales and the offsets; a Loss records each, for values round differently."""
    tensors, losses = dict(model.tensors), list(model.losses)
    for name, tensor in model.items():
        quantization = tensor.quantization
        if quantization is None or quantization.factor == 1:
            continue
        factor = np.float32(quantization.factor)
        scale, offset = (
            parameter and Tensor.from_array(parameter.name, parameter.dequantize(np.float32) * factor)
            for parameter in (quantization.scale, quantization.offset)
        )
        folded = replace(quantization, scale=scale or quantization.scale, offset=offset, factor=1.0)
        tensors[name] = replace(tensor, quantization=folded)
        losses.append(Loss(name, "rounded", f"the factor {factor!s} of its values is multiplied into its scales"))
    return replace(model, tensors=tensors, losses=tuple(losses))


def _flattened(parameter: Tensor) -> Tensor:
    return parameter if parameter.quantization is None else dequantized(parameter, _FLOAT32)


def compute_in_float32(model: Model) -> Model:
    """Every quantization with another `compute_dtype`, or a `value_dtype`, as one that is computed in float32 and not
    rounded further; a Loss records each whose values change. Reads the scales of float64, of which most are float32
    numbers: nothing changes by those."""
    tensors, losses = dict(model.tensors), list(model.losses)
    for name, tensor in model.items():
        quantization = tensor.quantization
        if quantization is None or (quantization.compute_dtype == _FLOAT32 and quantization.value_dtype is None):
            continue
        scale, offset = (_as_float32(t) for t in (quantization.scale, quantization.offset))
        changed = replace(quantization, scale=scale, offset=offset, compute_dtype=_FLOAT32, value_dtype=None)
        tensors[name] = replace(tensor, quantization=changed)
        rounded = quantization.value_dtype or quantization.compute_dtype
        if rounded != _FLOAT64:
            detail = f"values are computed in float32, and not rounded to {rounded} as its producer does"
            losses.append(Loss(name, "widened", detail))
        elif offset is not None or not _equal(scale, quantization.scale):
            losses.append(Loss(name, "rounded", "its scales of float64, and the products with them, become float32"))
    return replace(model, tensors=tensors, losses=tuple(losses))


def _as_float32(parameter: Tensor | None) -> Any:
    if parameter is None or parameter.dtype != _FLOAT64:
        return parameter
    return Tensor.from_array(parameter.name, parameter.dequantize(np.float32))


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(np.array_equal(a.numpy(), b.numpy(), equal_nan=True))


@dataclass(frozen=True, slots=True, eq=False)
class _Where:
    """Positions [start, stop) along `axis` of a tensor seen in `view_shape`, in which a block is an axis of its own."""

    view_shape: tuple[int, ...]
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One operation of the formula; `parameter` broadcasts to the view. An integer one is for integer codes. The result
    is rounded to `rounded_to` (None: it is what `values` hold)."""

    operation: np.ufunc
    parameter: NDArray[Any]
    rounded_to: np.dtype[Any] | None = None

    def apply(self, values: NDArray[Any], where: _Where, rounding: _Rounding) -> None:
        """Does it in place; `values` are the flat elements at `where`."""
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
    """Casts and rounds up to `most` floats at a time, in memory that is held."""

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
        """Rounds in place to `dtype`, float16 or bfloat16; their dtype stays."""
        if dtype == np.float16 and values.dtype == np.float32:
            self._float16.round(values)
            return
        rounded = self._bfloat16[: values.size].view(dtype)
        self.cast(values, rounded)
        values[...] = rounded


def _decode(part: Tensor, out: NDArray[Any]) -> None:
    """Writes the values of `part`, flat, to `out`, in pieces that stay in the cache from unpacking to rounding."""
    steps = _steps(part, out.dtype)
    if steps and steps[-1].rounded_to == out.dtype:  # as `out` does by itself
        steps[-1] = replace(steps[-1], rounded_to=None)
    table = _table(part)
    computed = _FLOAT64 if _compute_dtype(part) == _FLOAT64 else _FLOAT32
    view_shape = _view_shape(part) if steps else (part.size,)
    packed = part.packed()
    if computed == _FLOAT32 and steps:
        operations = [(step.operation, step.parameter, step.rounded_to) for step in steps]
        if compiled.decode(packed, part.dtype, table, operations, view_shape, out):
            return
    axis = next((axis for axis, size in enumerate(view_shape) if size != 1), 0)
    count, unit = (view_shape[axis], prod(view_shape[axis + 1 :])) if view_shape else (1, 1)
    whole = 8 // gcd(8, unit * part.bits)  # that many end on a whole byte
    piece = max(1, _PIECE_ELEMENTS // max(1, unit * whole)) * whole
    most = min(piece, count) * unit
    elements_of, rounding = _unpacker(part.dtype, most), _Rounding(most)
    scratch = None if out.dtype == computed else np.empty(most, computed)
    for start in range(0, count, piece):
        where = _Where(view_shape, axis, start, min(count, start + piece))
        first, last = start * unit, where.stop * unit
        target = out[first:last]
        values = target if scratch is None else scratch[: target.size]
        codes = packed[first * part.bits // 8 : packed_size(last, part.bits)]
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
    """A function that gives so many elements of canonical bytes, `most` at the most, valid until it is called again."""
    if dtype not in SUB_BYTE:
        return lambda packed, count: packed.view(dtype)
    workspace = Workspace(dtype, packed_size(most, bits_of(dtype)))
    return lambda packed, count: unpack(packed, dtype, count, workspace)


def _widen(
    elements: NDArray[Any], steps: Sequence[_Step], where: _Where, out: NDArray[Any], rounding: _Rounding
) -> Sequence[_Step]:
    """Writes `elements` to `out`, less their zero points where those are subtracted as integers; gives the steps that
    remain."""
    if steps and steps[0].parameter.dtype.kind == "i":
        wanted = steps[0].parameter.dtype
        exact = elements.astype(wanted, copy=wanted != np.int8)  # unpacked codes are no one else's
        steps[0].apply(exact, where, rounding)
        out[...] = exact
        if steps[0].rounded_to is not None:
            rounding.round(out, steps[0].rounded_to)
        return steps[1:]
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32; signalling NaNs
        out[...] = elements
    return steps


def _steps(part: Tensor, wanted: np.dtype[Any]) -> list[_Step]:
    """The operations that follow the look-up, in order, for values that are wanted as that dtype."""
    quantization = part.quantization
    if quantization is None or part.size == 0:
        return []
    dtype = quantization.compute_dtype
    rounded_to = None if dtype in (_FLOAT32, _FLOAT64) else dtype

    def step(operation: np.ufunc, parameter: NDArray[Any]) -> _Step:
        spread = _spread(parameter, part.shape, quantization)
        if spread.dtype.kind == "i" and (spread == spread.flat[0]).all():
            spread = spread[(slice(1),) * spread.ndim]  # NumPy is faster with one for all than with one for each block
        return _Step(operation, spread, rounded_to)

    steps = []
    if quantization.zero_point is not None:
        zero_point = _zero_point(part, quantization.zero_point)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            is_needed = bool(zero_point.any())
        # symmetric schemes often store their zeros; uint64 codes are still to be taken as int64
        if is_needed or part.dtype == np.uint64:
            steps.append(step(np.subtract, zero_point))
    steps.append(step(np.multiply, _parameter(quantization.scale, dtype)))
    if quantization.offset is not None:
        steps.append(step(np.add, _parameter(quantization.offset, dtype)))
    if quantization.factor != 1:
        factor = np.full((1,) * len(_view_shape(part)), quantization.factor, np.float32)
        steps.append(_Step(np.multiply, factor, rounded_to))
    if quantization.value_dtype is not None and wanted != _FLOAT32:
        steps[-1] = replace(steps[-1], rounded_to=quantization.value_dtype)
    return steps


def _compute_dtype(part: Tensor) -> np.dtype[Any]:
    return _FLOAT32 if part.quantization is None else part.quantization.compute_dtype


def _parameter(parameter: Tensor, compute_dtype: np.dtype[Any]) -> NDArray[Any]:
    """A scale or an offset as it is computed with: in float64 where all is, and there are no more than its own bits."""
    if compute_dtype == _FLOAT64 and parameter.dtype == _FLOAT64 and parameter.quantization is None:
        return parameter.numpy()
    return parameter.dequantize(np.float32)


def _zero_point(part: Tensor, zero_point: Tensor) -> NDArray[Any]:
    """The zero points in the type that they are subtracted in: int8 for sub-byte codes, which is fastest; float32 where
    the difference is exact in it; int64 for wide codes or zero points; float32 for any that are no integers."""
    integers = is_integer(part.dtype) and is_integer(zero_point.dtype) and _table(part) is None
    if not integers or zero_point.quantization is not None:
        return zero_point.dequantize(np.float32)
    stored = zero_point.numpy().astype(np.int64)
    largest = max(int(stored.max(initial=0)), -int(stored.min(initial=0)))
    if part.dtype.itemsize >= 4 or largest >= _EXACT_IN_FLOAT32:
        return stored
    return stored.astype(np.int8 if part.dtype in SUB_BYTE and largest <= _EXACT_IN_INT8 else np.float32)


def _table(part: Tensor) -> NDArray[np.float32] | None:
    """The float32 elements of each of the 256 bytes, shape (256, elements of a byte), where codes are not numbers
    themselves: they are looked up in a codebook, or are the patterns of a small float."""
    codebook = part.quantization.codebook if part.quantization is not None else None
    if codebook is not None:
        entries: NDArray[np.float32] = codebook.dequantize(np.float32)
        return entries[byte_table(part.dtype)] if part.dtype in SUB_BYTE else entries.reshape(256, 1)
    if part.dtype in SUB_BYTE and is_float(part.dtype):
        return byte_table(part.dtype).view(part.dtype).astype(np.float32)
    return None


def _look_up(table: NDArray[np.float32], packed: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Writes the elements of `packed` to `out`; of the last byte only what still fits."""
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
    """Whether an axis is seen as (blocks, elements of a block); else as it is, its parameters repeated if need be."""
    return 1 < block < size and size % block == 0


def _view_shape(part: Tensor) -> tuple[int, ...]:
    """The shape of `part` with every axis of several whole blocks split in two."""
    quantization = part.quantization
    if quantization is None:
        return part.shape
    shape: list[int] = []
    for axis, (size, block) in enumerate(zip(part.shape, quantization.block_shape, strict=True)):
        indexed = quantization.group_index is not None and quantization.group_index.axis == axis
        shape += [size // block, block] if _splits(size, block) and not indexed else [size]
    return tuple(shape)


def _spread(parameter: NDArray[Any], shape: tuple[int, ...], quantization: Quantization) -> NDArray[Any]:
    """`parameter`, of the grid's shape, as it broadcasts to the view of `_view_shape`."""
    at = 0
    for axis, (size, block) in enumerate(zip(shape, quantization.block_shape, strict=True)):
        if quantization.group_index is not None and quantization.group_index.axis == axis:
            parameter = parameter.take(quantization.group_index.index.numpy(), axis=at)
        elif _splits(size, block):
            at += 1
            parameter = np.expand_dims(parameter, at)
        elif 1 < block < size:  # the last block is shorter
            parameter = parameter.repeat(block, axis=at).take(range(size), axis=at)
        at += 1
    return parameter
