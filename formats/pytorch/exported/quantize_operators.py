"""The operators of programs that quantize and dequantize, where their inputs are stored tensors.

    quantized_decomposed.quantize_per_tensor …   torch 2.13, torch/ao/quantization/fx/_decomposed.py
    torchao.quantize_affine, dequantize_affine   torchao 0.18, quantization/quant_primitives.py
    aten.fake_quantize_per_tensor_affine …       torch 2.13, aten/src/ATen/native/quantized/cpu/kernels

What they compute is (code - zero_point) * scale, each operation rounded to what PyTorch promotes its operands to:
numbers of Python and per-tensor parameters never promote, tensors do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT32, FLOAT64, INT32, bits_of, code_range, is_float, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.widths import dtype_for, narrowed
from nibblecast.formats.encodings.values.fake_quantize import quantized
from nibblecast.formats.pytorch.exported.program import ProgramNode, Ref
from nibblecast.formats.pytorch.modules.tensors import row_major
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import StridedTensor, TorchDtype, described, shortened

_INT32 = np.iinfo(np.int32)
_LARGEST_FLOAT = float(np.finfo(np.float64).max)

#: Which operators give codes of floats, values of codes, and rounded floats of floats; by these, how parameters lie.
QUANTIZE: Mapping[str, str] = {
    "quantized_decomposed.quantize_per_tensor": "tensor",
    "quantized_decomposed.quantize_per_channel": "channel",
    "quantized_decomposed.quantize_per_channel_group": "group",
    "quantized_decomposed.quantize_per_token": "token",
    "torchao.quantize_affine": "affine",
}
DEQUANTIZE: Mapping[str, str] = {
    "quantized_decomposed.dequantize_per_tensor": "tensor",
    "quantized_decomposed.dequantize_per_channel": "channel",
    "quantized_decomposed.dequantize_per_channel_group": "group",
    "quantized_decomposed.dequantize_per_token": "token",
    "torchao.dequantize_affine": "affine",
}
FAKE_QUANTIZE: Mapping[str, str] = {
    "aten.fake_quantize_per_tensor_affine": "tensor",
    "aten.fake_quantize_per_tensor_affine_cachemask": "tensor",
    "aten.fake_quantize_per_channel_affine": "channel",
    "aten.fake_quantize_per_channel_affine_cachemask": "channel",
}
#: These add the zero point before they round.
_ZERO_POINT_FIRST = frozenset({"group", "token"})


class NotStored(Exception):
    """An input of an operator is computed when the program runs."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A node whose inputs are known where they are stored: `stored` gives the views that values are."""

    node: ProgramNode
    stored: Mapping[str, StridedTensor]
    limits: Limits

    @property
    def name(self) -> str:
        """What messages call it."""
        return shortened(f"{self.node.operator}.{self.node.overload}")

    def any(self, *names: str) -> Any:
        """The first input that there is under one of these names, None where there is none of them."""
        return next((value for name in names if (value := self.node.argument(name)) is not None), None)

    def integer(self, name: str, default: int | None = None) -> int:
        """An input that is an integer. Raises CorruptFile where it is none."""
        value = self.node.argument(name, default)
        if isinstance(value, Ref):
            raise NotStored
        if type(value) is not int or not -(1 << 62) < value < 1 << 62:
            raise CorruptFile(f"is taken by {self.name}, whose {name} is {described(value)}: an integer is needed")
        return value

    def dtype(self, *names: str) -> np.dtype[Any]:
        """An input that is a floating-point dtype: float32 where it is not given."""
        value = self.any(*names)
        if value is None:
            return FLOAT32
        if not isinstance(value, TorchDtype) or not is_float(value.numpy):
            raise CorruptFile(f"is taken by {self.name}, where {described(value)} is not a float dtype for {names[0]}")
        return value.numpy

    def parameter(self, role: str, grid: tuple[int, ...], *names: str) -> Tensor | None:
        """A scale or zero points in the grid's shape: float64 or int32 where they are a number of Python."""
        value = self.any(*names)
        if value is None:
            return None
        if isinstance(value, Ref):
            view = self.stored.get(value.name)
            if view is None:
                raise NotStored
            if prod(view.shape) != prod(grid):
                raise CorruptFile(
                    f"has {role}s of shape {brief(view.shape)} in {self.name}, where {brief(grid)} are needed"
                )
            return Tensor(role, grid, view.dtype.numpy, row_major(role, view))
        dtype: np.dtype[Any]
        if role == "scale":
            dtype, fits = FLOAT64, type(value) in (int, float) and abs(value) <= _LARGEST_FLOAT
        else:
            dtype, fits = INT32, type(value) is int and _INT32.min <= value <= _INT32.max
        if not fits:
            raise CorruptFile(f"has the {role} {described(value)} in {self.name}: a number is needed")
        self.limits.take(prod(grid) * dtype.itemsize, self.name)
        return Tensor.from_array(role, np.full(grid, value, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class _Parameters:
    family: str
    block_shape: tuple[int, ...]
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, call: Call, family: str, shape: tuple[int, ...]) -> _Parameters:
        block_shape = _block_shape(call, family, shape)
        grid = grid_shape(shape, block_shape)
        scale = call.parameter("scale", grid, "scale", "scales")
        if scale is None or not is_float(scale.dtype):
            raise CorruptFile(f"has no floating-point scale in {call.name}: it is damaged")
        return cls(family, block_shape, scale, call.parameter("zero point", grid, "zero_point", "zero_points"))


def codes_of(call: Call, family: str, weight: Tensor) -> Tensor:
    """The codes that a quantizing node computes from `weight`, a plain float tensor. Raises NotStored where parameters
    are computed when the program runs, CorruptFile where they do not fit."""
    found = _Parameters.of(call, family, weight.shape)
    # all but groups and rows of float16 and bfloat16 become float32 before
    if family == "tensor":
        compute_dtype = FLOAT32
    else:
        compute_dtype = _promoted(FLOAT32 if family == "channel" else weight.dtype, found.scale.dtype)
    if family == "affine" and found.zero_point is None:
        raise Unsupported(f"has no zero points in {call.name}, which torchao itself refuses")
    lowest, highest = _limits(call, None)
    return quantized(
        weight,
        found.scale,
        found.zero_point,
        found.block_shape,
        lowest,
        highest,
        compute_dtype=compute_dtype,
        zero_point_first=family in _ZERO_POINT_FIRST,
    )


def decoded(call: Call, family: str, codes: Tensor) -> Tensor:
    """`codes`, integers without quantization, as a dequantizing node decodes them: as narrow as its limits allow.
    Raises as `codes_of` does."""
    found = _Parameters.of(call, family, codes.shape)
    limits = _limits(call, codes.dtype)
    dtype = dtype_for(*limits)
    if bits_of(dtype) < bits_of(codes.dtype):
        codes = replace(codes, dtype=dtype, data=narrowed(codes, dtype))
    result = call.dtype("out_dtype", "output_dtype")
    scale = found.scale
    if family == "tensor":
        compute_dtype = result
        if scale.dtype == FLOAT64:  # numbers of Python are float32 beside a tensor of that
            scale = Tensor.from_array("scale", scale.dequantize(np.float32))
    elif family == "affine":  # codes and zero points become the result's dtype first
        compute_dtype = FLOAT64 if scale.dtype == FLOAT64 else result
    else:
        _refuse_wrapping(call, found.zero_point, limits)
        compute_dtype = result if scale.dtype == FLOAT32 else scale.dtype
    quantization = Quantization(scale, found.block_shape, found.zero_point, compute_dtype=compute_dtype)
    return replace(codes, quantization=quantization)


def rounded(call: Call, family: str, weight: Tensor) -> Tensor:
    """The codes that a node of fake quantization rounds `weight` to, and how it decodes them. Raises as `codes_of`."""
    found = _Parameters.of(call, family, weight.shape)
    scale = found.scale
    if scale.dtype == FLOAT64:  # its kernels take the number as float32
        scale = Tensor.from_array("scale", scale.dequantize(np.float32))
    lowest, highest = _limits(call, None)
    compute_dtype = FLOAT64 if weight.dtype == FLOAT64 else FLOAT32
    codes = quantized(weight, scale, found.zero_point, found.block_shape, lowest, highest, compute_dtype=compute_dtype)
    small = weight.dtype if weight.dtype.itemsize == 2 else FLOAT32  # the result has the weight's dtype
    return replace(codes, quantization=Quantization(scale, found.block_shape, found.zero_point, compute_dtype=small))


def _block_shape(call: Call, family: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if family == "tensor":
        return per_tensor(shape)
    if family == "channel":
        axis = call.integer("axis")
        if not -len(shape) <= axis < len(shape):
            raise CorruptFile(f"is quantized along axis {axis} of shape {brief(shape)} by {call.name}: it is damaged")
        return per_axis(shape, axis % len(shape))
    if family == "affine":
        block_shape = call.node.argument("block_size")
        if not isinstance(block_shape, tuple) or len(block_shape) != len(shape):
            raise CorruptFile(
                f"has blocks of {brief(block_shape)} over shape {brief(shape)} in {call.name}: it is damaged"
            )
        if not all(type(b) is int and b > 0 and size % b == 0 for b, size in zip(block_shape, shape, strict=True)):
            raise CorruptFile(
                f"has blocks of {brief(block_shape)} over shape {brief(shape)} in {call.name}, which do not divide it"
            )
        return block_shape
    if not shape or not shape[-1]:
        raise CorruptFile(f"has the shape {brief(shape)} in {call.name}, which has no rows")
    if family == "token":
        return blocked(shape, len(shape) - 1, shape[-1])
    size = call.integer("group_size", 128)
    if size > shape[-1]:  # allowed where there is one scale for each row
        size = shape[-1]
    if size <= 1 or shape[-1] % size or len(shape) != 2:
        raise CorruptFile(f"has groups of {size} over shape {brief(shape)} in {call.name}: it is damaged")
    return blocked(shape, 1, size)


def _limits(call: Call, stored: np.dtype[Any] | None) -> tuple[int, int]:
    """The least and the largest code: quant_min and quant_max, or what the codes' dtype holds."""
    if call.any("quant_min") is None and call.any("quant_max") is None:
        given = call.any("output_dtype", "dtype")
        dtype = stored if stored is not None else given.numpy if isinstance(given, TorchDtype) else None
        if dtype is None or dtype.kind not in "iu":
            raise CorruptFile(f"is taken by {call.name} without limits of its codes: it is damaged")
        return code_range(dtype)
    return call.integer("quant_min"), call.integer("quant_max")


def _promoted(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """torch.promote_types of two floats."""
    if a == b:
        return a
    return FLOAT64 if FLOAT64 in (a, b) else FLOAT32


def _refuse_wrapping(call: Call, zero_point: Tensor | None, limits: tuple[int, int]) -> None:
    """Raises Unsupported where code - zero_point leaves the integers that PyTorch computes it in."""
    codes = call.any("dtype")
    if zero_point is None or not isinstance(codes, TorchDtype) or codes.numpy.kind not in "iu":
        return
    if not is_integer(zero_point.dtype):
        return
    wide = np.promote_types(codes.numpy, zero_point.dtype)
    if wide.itemsize > 2 or not zero_point.size:
        return
    values, held = zero_point.numpy(), np.iinfo(wide)
    if limits[0] - int(values.max()) < held.min or limits[1] - int(values.min()) > held.max:
        raise Unsupported(
            f"is decoded by {call.name} with zero points of {zero_point.dtype}: "
            f"PyTorch's difference of codes and zero points overflows {wide}"
        )
