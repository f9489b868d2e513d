"""TFLite's quantization parameters -> the IR's.

    real = (code - zero_point) * scale

Integers are subtracted, and float32 numbers multiplied. LiteRT 2.3 computes the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Protocol

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.formats.tflite.schema import BlockwiseQuantization, MultiAxisQuantization, QuantizationParameters

_SCALE_DTYPES = frozenset((FLOAT16, FLOAT32, FLOAT64, BFLOAT16))


class ParameterSource(Protocol):
    """The constant tensors of a subgraph, for a tensor that has others as its parameters."""

    def look(self, index: int) -> Tensor:
        """The tensor at `index`. Raises CorruptFile if it holds no constant numbers or is the asking tensor itself."""
        ...

    def take(self, index: int) -> Tensor:
        """The tensor at `index`, which becomes a parameter."""
        ...


def quantization_of(
    name: str, shape: tuple[int, ...], parameters: QuantizationParameters | None, source: ParameterSource
) -> tuple[Quantization | None, list[Loss]]:
    """The parameters of a constant integer tensor; None if it is not quantized (no table, or one without scales).
    Raises CorruptFile if they contradict the shape, Unsupported for details without a public meaning."""
    if parameters is None:
        return None, []
    if parameters.details_type:
        return _details(shape, parameters, source), []
    return _affine(name, shape, parameters)


def _affine(
    name: str, shape: tuple[int, ...], parameters: QuantizationParameters
) -> tuple[Quantization | None, list[Loss]]:
    scale, zero_point = parameters.scale, parameters.zero_point
    if scale is None or scale.size == 0:
        return None, []
    if zero_point is None or zero_point.size != scale.size:
        count = 0 if zero_point is None else zero_point.size
        raise CorruptFile(f"has {scale.size} scales but {count} zero points; both must be as many")
    if not np.isfinite(scale).all():
        position = int(np.argmin(np.isfinite(scale)))
        raise CorruptFile(f"has scale {scale[position]} for channel {position}; a finite number is needed")
    losses: list[Loss] = []
    axis = parameters.quantized_dimension
    if len(shape) == 1 and axis != 0 and shape[0] == scale.size > 1:
        # tflite-micro's own person_detect gives its 1-D biases the axis of the weights
        losses.append(Loss(name, "reinterpreted", f"its quantized dimension {axis} is taken as 0, because it is 1-D"))
        axis = 0
    # LiteRT refuses an impossible dimension even if a single scale does not need one
    exists = 0 <= axis < len(shape)
    fits = exists and shape[axis] == scale.size if scale.size > 1 else exists or len(shape) < 2
    if not fits:
        raise CorruptFile(
            f"has {scale.size} scales along dimension {axis} of shape {shape}; "
            "one for the tensor or one for each index of the dimension is needed"
        )
    block_shape = per_tensor(shape) if scale.size == 1 else per_axis(shape, axis)
    grid = grid_shape(shape, block_shape)
    return Quantization(
        scale=Tensor.from_array(f"{name}.scale", scale.reshape(grid)),
        block_shape=block_shape,
        zero_point=Tensor.from_array(f"{name}.zero_point", zero_point.reshape(grid)),
    ), losses


def _details(shape: tuple[int, ...], parameters: QuantizationParameters, source: ParameterSource) -> Quantization:
    kind = parameters.details_type
    if kind == BlockwiseQuantization.TYPE and parameters.blockwise is not None:
        blockwise = parameters.blockwise
        if blockwise.block_shape is not None and blockwise.block_shape.size:
            raise Unsupported(
                f"has a block shape {blockwise.block_shape.tolist()} in its blockwise quantization: no producer of it "
                "is known, and its meaning is not documented"
            )
        if not shape or blockwise.block_size < 1 or shape[-1] % blockwise.block_size:
            raise CorruptFile(
                f"has blocks of {blockwise.block_size} along the last dimension of shape {shape}; a divisor is needed"
            )
        # quantized_dimension is 0 in every real file, although the blocks run along the last dimension
        block_shape = blocked(shape, len(shape) - 1, blockwise.block_size)
        return _with_parameter_tensors(shape, block_shape, blockwise, source)
    if kind == MultiAxisQuantization.TYPE and parameters.multi_axis is not None:
        block_shape = _multi_axis_blocks(shape, parameters.multi_axis)
        return _with_parameter_tensors(shape, block_shape, parameters.multi_axis, source)
    raise Unsupported(
        f"has quantization details of type {kind}; blockwise ({BlockwiseQuantization.TYPE}) and "
        f"multi-axis ({MultiAxisQuantization.TYPE}) are known"
    )


def _multi_axis_blocks(shape: tuple[int, ...], details: MultiAxisQuantization) -> tuple[int, ...]:
    axes = [] if details.quantized_dimensions is None else details.quantized_dimensions.tolist()
    if not axes or len(set(axes)) != len(axes) or any(not 0 <= axis < len(shape) for axis in axes):
        raise CorruptFile(f"is quantized along dimensions {axes} of shape {shape}")
    block_shape = list(per_tensor(shape))
    for axis in axes:
        block_shape[axis] = 1
    if details.block_size < 0 or (details.block_size and shape[axes[-1]] % details.block_size):
        raise CorruptFile(f"has blocks of {details.block_size} along dimension {axes[-1]} of shape {shape}")
    block_shape[axes[-1]] = details.block_size or 1
    return tuple(block_shape)


def _with_parameter_tensors(
    shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    details: BlockwiseQuantization | MultiAxisQuantization,
    source: ParameterSource,
) -> Quantization:
    grid = grid_shape(shape, block_shape)
    scale = source.look(details.scales)
    if scale.dtype not in _SCALE_DTYPES or scale.size != prod(grid):
        raise CorruptFile(
            f"takes its scales from tensor '{scale.name}' of {scale.dtype} and shape {scale.shape}; "
            f"floats of shape {grid} are needed"
        )
    zero_point = _zero_point(details.zero_points, grid, source)
    return Quantization(_in_shape(source.take(details.scales), grid), block_shape, zero_point)


def _zero_point(index: int, grid: tuple[int, ...], source: ParameterSource) -> Tensor | None:
    if index < 0:
        return None
    try:
        zero_point = source.look(index)
        fits = is_integer(zero_point.dtype) and zero_point.size == prod(grid)
    except CorruptFile:
        fits = False
    if fits:
        return _in_shape(source.take(index), grid)
    if index == 0:  # the schema's default for an absent field, so it cannot mean tensor 0
        return None
    raise CorruptFile(f"takes its zero points from tensor {index}, which holds no integers of shape {grid}")


def _in_shape(parameter: Tensor, grid: tuple[int, ...]) -> Tensor:
    return parameter if parameter.shape == grid else replace(parameter, shape=grid)
