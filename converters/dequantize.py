"""Stage: codes -> floats.

    value = scale * (code - zero_point) + offset

Integer zero points are subtracted exactly; the multiplication and the addition are one float32 operation each, in this
order; the result is rounded once to the wanted dtype. This is bit for bit what LiteRT 2.3 and onnxruntime 1.32 compute.
The work is done in pieces that stay in the processor's cache, by table look-up where a byte holds the codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from converters.errors import Unsupported, UsageError
from converters.ir import Loss, Model, Quantization, Tensor, is_float, is_integer
from converters.packing import SUB_BYTE, byte_table
from converters.storage import Computed

#: What values can be dequantized to, by name.
FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_FLOAT32 = np.dtype(np.float32)
_PIECE_ELEMENTS = 1 << 17  # 512 KiB of float32: half of a common second-level cache


def dequantize(tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of `tensor` in its shape, as `dtype`: float32, float16 or bfloat16.

    Raises UsageError for another dtype and Unsupported for complex tensors, which have no real values.
    """
    if dtype not in FLOAT_DTYPES.values():
        raise UsageError(f"dtype {dtype}: values come as {', '.join(FLOAT_DTYPES)}", tensor=tensor.name)
    if tensor.dtype.kind == "c":
        raise Unsupported(f"{tensor.dtype} values have no float form: leave it out with --skip", tensor=tensor.name)
    values = np.empty(tensor.size, dtype)
    scratch = None if dtype == _FLOAT32 else np.empty(0, np.float32)
    start = 0
    for part in tensor.parts(_PIECE_ELEMENTS * tensor.bits // 8):
        out = values[start : start + part.size]
        if scratch is None:
            _decode(part, out)
        else:
            if scratch.size < part.size:
                scratch = np.empty(part.size, np.float32)
            _decode(part, scratch[: part.size])
            with np.errstate(over="ignore"):  # beyond float16's range is infinity, as in every framework
                out[...] = scratch[: part.size]
        start += part.size
    return values.reshape(tensor.shape)


def dequantized(tensor: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """`tensor` with its values as plain `dtype` elements, computed when they are read; a plain tensor as it is."""
    if tensor.quantization is None:
        return tensor
    itemsize = dtype.itemsize
    rows = next((size for size in tensor.shape if size != 1), 1)
    row_bytes = tensor.size // max(1, rows) * itemsize

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        if not row_bytes or (start == 0 and stop >= tensor.size * itemsize):
            return dequantize(tensor, dtype).reshape(-1).view(np.uint8)[start:stop]
        step_bytes = row_bytes * tensor.row_step
        first = start // step_bytes * tensor.row_step
        last = min(rows, -(-stop // step_bytes) * tensor.row_step)
        values = dequantize(tensor.rows(first, last), dtype).reshape(-1).view(np.uint8)
        return values[start - first * row_bytes : stop - first * row_bytes]

    return replace(tensor, dtype=dtype, data=Computed(tensor.size * itemsize, compute), quantization=None)


def dequantize_model(model: Model, dtype: np.dtype[Any]) -> Model:
    """Every quantized tensor as plain floats; tensors that are only parameters of those are left out."""
    tensors = {
        name: dequantized(tensor, dtype) for name, tensor in model.items() if tensor.parameter_of not in model.tensors
    }
    return replace(model, tensors=tensors)


def flatten_scales(model: Model) -> Model:
    """Every second-level scale multiplied out to one float32 scale: the decoded values stay the same bit for bit,
    because decoding computes exactly this scale first. A Loss records each."""
    tensors, losses = dict(model.tensors), list(model.losses)
    for name, tensor in model.items():
        quantization = tensor.quantization
        if quantization is not None and quantization.scale.quantization is not None:
            scale = dequantized(quantization.scale, _FLOAT32)
            tensors[name] = replace(tensor, quantization=replace(quantization, scale=scale))
            losses.append(Loss(name, "widened", "its second-level scale is multiplied out to one float32 scale"))
    return replace(model, tensors=tensors, losses=tuple(losses))


def _decode(part: Tensor, out: NDArray[np.float32]) -> None:
    """Writes the float32 values of `part`, flat, to `out`."""
    quantization = part.quantization
    if quantization is None or part.size == 0:
        _widen(part, None, out)
        return
    zero_point = quantization.zero_point
    if zero_point is not None and part.dtype.itemsize >= 4 and is_integer(zero_point.dtype):
        # wide codes do not fit float32 before the subtraction
        codes = part.codes().astype(np.int64)
        _broadcast(np.subtract, codes, zero_point.numpy().astype(np.int64), quantization)
        out[...] = codes.reshape(-1)
        zero_point = None
    else:
        _widen(part, quantization.codebook, out)
    values = out.reshape(part.shape)
    if zero_point is not None:
        _broadcast(np.subtract, values, zero_point.dequantize(np.float32), quantization)
    _broadcast(np.multiply, values, quantization.scale.dequantize(np.float32), quantization)
    if quantization.offset is not None:
        _broadcast(np.add, values, quantization.offset.dequantize(np.float32), quantization)


def _widen(part: Tensor, codebook: Tensor | None, out: NDArray[np.float32]) -> None:
    """Writes the elements of `part`, or what the codebook says for them, to `out` as float32."""
    if part.dtype in SUB_BYTE:
        table = byte_table(part.dtype)
        if codebook is not None:
            entries = codebook.dequantize(np.float32)[table]
        elif is_float(part.dtype):
            entries = table.view(part.dtype).astype(np.float32)
        else:
            entries = table.astype(np.float32)
        _look_up(entries, part.packed(), out)
    elif codebook is not None:
        np.take(codebook.dequantize(np.float32), part.packed(), out=out, mode="clip")
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32; signalling NaNs
            out[...] = part.codes().reshape(-1)


def _look_up(table: NDArray[np.float32], packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """`table` has the float32 elements of each byte, shape (256, elements of a byte); an odd end is cut."""
    per_byte = table.shape[1]
    whole = out.size // per_byte
    entry = np.dtype(f"V{4 * per_byte}") if per_byte > 2 else np.dtype(np.uint64)
    entries = np.ascontiguousarray(table).view(entry)[:, 0]
    np.take(entries, packed[:whole], out=out[: whole * per_byte].view(entry), mode="clip")
    if whole * per_byte < out.size:
        out[whole * per_byte :] = table[packed[whole]][: out.size - whole * per_byte]


def _broadcast(operation: np.ufunc, values: NDArray[Any], parameter: NDArray[Any], quantization: Quantization) -> None:
    """`values` = operation(values, parameter) in place, each parameter for its whole block."""
    group_index = quantization.group_index
    view_shape: list[int] = []
    for axis, (size, block) in enumerate(zip(values.shape, quantization.block_shape, strict=True)):
        at = len(view_shape)
        if group_index is not None and group_index.axis == axis:
            parameter = parameter.take(group_index.index.numpy(), axis=at)
            view_shape.append(size)
        elif parameter.shape[at] == 1 or block == 1:
            view_shape.append(size)
        elif size % block == 0:
            view_shape += [size // block, block]
            parameter = np.expand_dims(parameter, at + 1)
        else:  # the last block is shorter
            parameter = parameter.repeat(block, axis=at).take(range(size), axis=at)
            view_shape.append(size)
    view = values.reshape(view_shape)
    operation(view, parameter, out=view)
