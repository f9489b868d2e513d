"""Views of storages as tensors of the IR, PyTorch's own quantized tensors included.

    per tensor    (code - zero_point) * scale, in float32, the double scale rounded to float32 first
    per channel   the same in float64 (double scales), the product rounded once
    float qparams the same in float32 (float scales and zero points)

(torch rounds codes and zero points of qint32 to float32 first: beyond 2 ** 24 its values are less exact than these.)

torch 2.13, aten/src/ATen/native/quantized/AffineQuantizer.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT64, UINT4
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Quantization, Tensor, per_axis, per_tensor
from nibblecast.converters.storage import Computed, Data, FileRange, InMemory
from nibblecast.formats.pytorch.pickle.limits import STEP, Limits
from nibblecast.formats.pytorch.pickle.records import Quantizer, StridedTensor, SubclassTensor, TorchDtype, described

_DEEPEST = 8  # tensors in tensors that wrap others


def take(limits: Limits, name: str, value: Any, depth: int = 0) -> None:
    """Counts the bytes of a tensor, its parameters and the tensors that it wraps included, before any of them are
    read: views may repeat an element as often as they like, and the same elements may have many names. Raises
    Unsupported where they are out of all proportion to the file, CorruptFile where they are without end."""
    limits.spend(STEP)
    if isinstance(value, StridedTensor):
        limits.take(prod(value.shape) * value.dtype.numpy.itemsize, name)
        for parameter in (value.quantizer.scale, value.quantizer.zero_point) if value.quantizer is not None else ():
            if isinstance(parameter, StridedTensor):
                limits.take(prod(parameter.shape) * parameter.dtype.numpy.itemsize, name)
            elif isinstance(parameter, list):
                limits.spend(STEP * len(parameter))
                limits.take(len(parameter) * FLOAT64.itemsize, name)
    elif isinstance(value, SubclassTensor) and depth <= _DEEPEST:
        limits.spend(STEP * len(value.attributes))
        for inner in value.attributes.values():
            take(limits, name, inner, depth + 1)
    elif isinstance(value, np.ndarray):
        limits.take(value.nbytes, name)


def tensor_of(name: str, value: StridedTensor) -> Tensor:
    """The tensor under that name, quantized as it is stored. Raises CorruptFile for parameters that do not fit."""
    if value.dtype.elements > 1:
        return _nibbles(name, value)
    quantizer = value.quantizer
    quantization = None if quantizer is None else quantization_of(name, value.shape, quantizer)
    return Tensor(name, value.shape, value.dtype.numpy, row_major(name, value), quantization)


def row_major(name: str, value: StridedTensor) -> Data:
    """The elements in row-major order: a range of the file where they lie so, else gathered when they are read."""
    itemsize, count = value.dtype.numpy.itemsize, prod(value.shape)
    stored = value.storage.range()
    if count == 0:
        return InMemory(np.zeros(0, np.uint8))
    if is_row_major(value.shape, value.strides):
        return stored.file.range(stored.offset + value.offset * itemsize, count * itemsize)
    gather = _Gather(stored, value.dtype, value.offset, value.shape, value.strides)
    return Computed(count * itemsize, gather.read, (stored,), in_order=False)


def quantization_of(name: str, shape: tuple[int, ...], quantizer: Quantizer) -> Quantization:
    """The parameters of a quantized tensor of PyTorch itself."""
    if quantizer.axis is None:
        if not isinstance(quantizer.scale, float) or type(quantizer.zero_point) is not int:
            raise CorruptFile(
                f"has the scale {described(quantizer.scale)} and the zero point {described(quantizer.zero_point)}: "
                "numbers are needed",
                tensor=name,
            )
        grid = (1,) * len(shape)
        with np.errstate(over="ignore"):
            scale = np.full(grid, quantizer.scale, np.float32)
        if not -(1 << 31) <= quantizer.zero_point < 1 << 31:
            raise CorruptFile(f"has the zero point {brief(quantizer.zero_point)}: 32 bits are needed", tensor=name)
        zero_point = np.full(grid, quantizer.zero_point, np.int32)
        return Quantization(
            Tensor.from_array("scale", scale), per_tensor(shape), Tensor.from_array("zero_point", zero_point)
        )
    axis = quantizer.axis
    if type(axis) is not int or not 0 <= axis < len(shape):
        raise CorruptFile(
            f"is quantized along axis {described(axis)} of shape {brief(shape)}: it is damaged", tensor=name
        )
    parameters = [
        _along(axis, shape, role, values, name)
        for role, values in (("scale", quantizer.scale), ("zero_point", quantizer.zero_point))
    ]
    dtype = parameters[0].dtype
    if dtype not in (np.float32, np.float64):
        raise CorruptFile(f"has scales of {dtype}: float32 or float64 are needed", tensor=name)
    return Quantization(parameters[0], per_axis(shape, axis), parameters[1], compute_dtype=dtype)


def _along(axis: int, shape: tuple[int, ...], role: str, values: Any, name: str) -> Tensor:
    """One parameter for each position of an axis, in the grid's shape."""
    grid = tuple(size if position == axis else 1 for position, size in enumerate(shape))
    if isinstance(values, list) and all(isinstance(value, int | float) for value in values):
        try:
            array = np.array(values, FLOAT64 if role == "scale" else np.int64)
        except (ValueError, OverflowError):
            raise CorruptFile(f"has a {role} that no dtype of PyTorch holds: it is damaged", tensor=name) from None
        values = None
    elif not isinstance(values, StridedTensor):
        raise CorruptFile(f"has a {role} that is not a tensor but {type(values).__name__}", tensor=name)
    count = array.size if values is None else prod(values.shape)
    if count != shape[axis]:
        raise CorruptFile(f"has {count} of {role} for {shape[axis]} channels: it is damaged", tensor=name)
    if values is None:
        return Tensor.from_array(role, array.reshape(grid))
    return Tensor(role, grid, values.dtype.numpy, row_major(name, values))


def _nibbles(name: str, value: StridedTensor) -> Tensor:
    """quint4x2 and float4_e2m1fn_x2: bytes of two elements, low nibble first, over the flattened tensor."""
    count = prod(value.shape)
    if not is_row_major(value.shape, value.strides) or value.offset:
        raise Unsupported(f"is a view of packed {value.dtype.name}: save it after clone()", tensor=name)
    stored = value.storage.range()
    if value.quantizer is None:
        if not value.shape:
            raise CorruptFile(f"has no shape, but is of {value.dtype.name}", tensor=name)
        shape = (*value.shape[:-1], value.shape[-1] * 2)
        return Tensor(name, shape, FLOAT4, stored.file.range(stored.offset, count))
    data: Data = stored.file.range(stored.offset, packed_size(count, 4))
    if count % 2:  # its last nibble is whatever was there
        data = _without_last_nibble(data)
    return Tensor(name, value.shape, UINT4, data, quantization_of(name, value.shape, value.quantizer))


def _without_last_nibble(data: Data) -> Data:
    def read(start: int, stop: int) -> NDArray[np.uint8]:
        taken = data.read(start, stop)
        if stop >= data.nbytes and taken.size:
            taken = taken.copy()
            taken[-1] &= 0x0F
        return taken

    return Computed(data.nbytes, read, (data,))


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements of those strides lie in row-major order, without gaps."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass(frozen=True, slots=True, eq=False)
class _Gather:
    """A view whose elements do not lie in row-major order."""

    stored: FileRange
    dtype: TorchDtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the row-major elements: the rows that hold them are gathered."""
        axis = next(axis for axis, size in enumerate(self.shape) if size != 1)
        itemsize = self.dtype.numpy.itemsize
        row_bytes = prod(self.shape[axis + 1 :]) * itemsize
        first, last = start // row_bytes, -(-stop // row_bytes)
        elements = self.stored.read(0, self.stored.nbytes)
        elements = elements[: elements.size // itemsize * itemsize].view(self.dtype.numpy)[self.offset :]
        strides = tuple(step * itemsize for step in self.strides)
        view = np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False)
        rows = view[(0,) * axis + (slice(first, last),)]
        flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        return flat[start - first * row_bytes : stop - first * row_bytes]
