"""Stages that turn codes into floats, or parameters into simpler ones: Model -> Model, lazily.

The arithmetic of decoding is in `converters.arithmetic.decoding`, below `ir`: arrays know nothing of models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT32, FLOAT64
from nibblecast.converters.ir import Loss, Model, Tensor


def dequantize_model(model: Model, dtype: np.dtype[Any]) -> Model:
    """The model with every quantized tensor as plain floats, without the tensors that were only their parameters."""
    tensors = {
        name: tensor.dequantized(dtype) for name, tensor in model.items() if tensor.parameter_of not in model.tensors
    }
    return replace(model, tensors=tensors)


def flatten_scales(model: Model) -> Model:
    """The model with every second-level scale multiplied out to float32. Decoded values stay the same bit for bit,
    because decoding computes exactly these numbers first. A note records each."""
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
    """The model with every factor multiplied into scales and offsets. A Loss records each: values round differently."""
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
        losses.append(
            Loss(name, "rounded", f"its factor {factor!s} is multiplied into its scales, so values round differently")
        )
    return replace(model, tensors=tensors, losses=tuple(losses))


def _flattened(parameter: Tensor) -> Tensor:
    return parameter if parameter.quantization is None else parameter.dequantized(FLOAT32)


def compute_in_float32(model: Model) -> Model:
    """The model with every quantization computed in float32, without a `value_dtype`. A Loss records each tensor whose
    values change. This reads float64 scales: most of them are float32 numbers, and then nothing changes."""
    tensors, losses = dict(model.tensors), list(model.losses)
    for name, tensor in model.items():
        quantization = tensor.quantization
        if quantization is None or (quantization.compute_dtype == FLOAT32 and quantization.value_dtype is None):
            continue
        scale, offset = (_as_float32(t) for t in (quantization.scale, quantization.offset))
        changed = replace(quantization, scale=scale, offset=offset, compute_dtype=FLOAT32, value_dtype=None)
        tensors[name] = replace(tensor, quantization=changed)
        rounded = quantization.value_dtype or quantization.compute_dtype
        if rounded != FLOAT64:
            detail = f"its values are computed in float32 and not rounded to {rounded}, as its producer rounds them"
            losses.append(Loss(name, "rounded", detail))
        elif offset is not None or not _equal(scale, quantization.scale):
            losses.append(Loss(name, "rounded", "its float64 scales become float32, and so do the products with them"))
    return replace(model, tensors=tensors, losses=tuple(losses))


def _as_float32(parameter: Tensor | None) -> Any:
    if parameter is None or parameter.dtype != FLOAT64:
        return parameter
    return Tensor.from_array(parameter.name, parameter.dequantize(np.float32))


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(np.array_equal(a.numpy(), b.numpy(), equal_nan=True))
