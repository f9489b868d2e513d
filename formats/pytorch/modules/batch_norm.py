"""The batch norm of QAT's ConvBn and LinearBn modules (`<m>.bn`), multiplied into the weight before it.

    weight = weight * (gamma * rsqrt(running_var + eps))        bias = (bias - running_mean) * rsqrt(...) * gamma + beta

in float32, in this order, as torch.nn.utils.fusion.fuse_conv_bn_weights does at `convert` (torch 2.13).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32
from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.converters.storage import Computed

_DEFAULT_EPS = 1e-5


def fold_batch_norms(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[Any, Any]]
) -> tuple[dict[str, Tensor], list[Loss]]:
    """The model with every `<m>.bn` folded into `<m>.weight` and `<m>.bias`. Raises CorruptFile where shapes do not
    fit."""
    result, losses = dict(tensors), []
    names = sorted(tensors)  # those of one module one after the other
    for module in batch_norm_modules(tensors):
        prefix = f"{module}.bn." if module else "bn."
        weight_name, bias_name = (f"{module}.{role}" if module else role for role in ("weight", "bias"))
        weight = tensors[weight_name]
        eps = settings.get(prefix[:-1], {}).get("eps")
        if not isinstance(eps, float):
            eps = _DEFAULT_EPS
            losses.append(
                Loss(
                    weight_name,
                    "reinterpreted",
                    f"batch norm is folded with eps {eps}, PyTorch's default: the file does not say it",
                )
            )
        mean, variance, gamma, beta = (
            _channels(tensors.get(prefix + role), default, weight, weight_name)
            for role, default in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0))
        )
        bias = _channels(tensors.get(bias_name), 0, weight, weight_name)
        reciprocal = np.float32(1) / np.sqrt(variance + np.float32(eps))
        result[weight_name] = _scaled(weight, gamma * reciprocal)
        result[bias_name] = Tensor.from_array(bias_name, (bias - mean) * reciprocal * gamma + beta)
        for position in range(bisect_left(names, prefix), len(names)):
            if not names[position].startswith(prefix):
                break
            result.pop(names[position], None)
    return result, losses


def batch_norm_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that have a weight, a fake quantizer for it and a batch norm."""
    modules = []
    for name in tensors:
        prefix = name.removesuffix("bn.running_var")
        if prefix != name and f"{prefix}weight_fake_quant.scale" in tensors and f"{prefix}weight" in tensors:
            modules.append(prefix.removesuffix("."))
    return modules


def _channels(tensor: Tensor | None, default: float, weight: Tensor, name: str) -> NDArray[np.float32]:
    """One float32 for each output channel of `weight`."""
    count = weight.shape[0] if weight.shape else 0
    if tensor is None:
        return np.full(count, default, np.float32)
    if tensor.shape != (count,):
        raise CorruptFile(
            f"has {count} channels, but {brief(tensor.name)} is of shape {brief(tensor.shape)}", tensor=name
        )
    return np.asarray(tensor.dequantize(np.float32))


def _scaled(weight: Tensor, factors: NDArray[np.float32]) -> Tensor:
    """`weight` with each output channel multiplied by its factor, when it is read."""
    per_channel, itemsize = max(1, prod(weight.shape[1:])), weight.dtype.itemsize

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start // 4, -(-stop // 4)
        values = weight.data.read(first * itemsize, last * itemsize).view(weight.dtype).astype(np.float32)
        values *= factors[np.arange(first, last) // per_channel]
        return values.view(np.uint8)[start - first * 4 : stop - first * 4]

    return replace(weight, dtype=FLOAT32, data=Computed(weight.size * 4, read, (weight.data,)))
