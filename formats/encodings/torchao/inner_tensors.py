"""What a torchao tensor consists of, and checked access to it: nothing in a file is what it should be until it is.

A torchao tensor is a class of PyTorch tensors that wraps others: its class name says how they make one weight, its
attributes are those tensors, block sizes, dtypes and enumerations (torchao 0.18, utils.py, TorchAOBaseTensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, is_float, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.converters.metadata import LossKind

#: The instruction sets for which PyTorch packs int4 weights differently.
Cpu = Literal["avx512", "avx2", "generic"]

_COMPUTE_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(t) for name, t in (("float32", np.float32), ("float16", np.float16))} | {"bfloat16": BFLOAT16}
)


_LARGEST_SIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True, eq=False)
class WrappedTensor:
    """A tensor of a class that wraps others: the class's name without its module, the shape and the dtype that it shows
    (PyTorch's name: "bfloat16"), and its attributes.

    An attribute is a plain `Tensor`, another `WrappedTensor`, the name of a dtype ("int4"), an enumeration's value or
    name, a number, a tuple of such, or None.
    """

    class_name: str
    shape: tuple[int, ...]
    dtype: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class InnerTensors:
    """The attributes of one wrapped tensor, which belong to the tensor `name`, by role; several names of a role are
    those that torchao gave it over time. Raises CorruptFile for what is missing or of another kind than it must be."""

    name: str
    wrapped: WrappedTensor
    cpu: Cpu
    losses: list[Loss]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.wrapped.shape

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """The dtype of the weight, to which torchao rounds each operation on it."""
        if self.wrapped.dtype not in _COMPUTE_DTYPES:
            raise self.corrupt(
                f"is of dtype {brief(self.wrapped.dtype)}, where {', '.join(_COMPUTE_DTYPES)} are possible"
            )
        return _COMPUTE_DTYPES[self.wrapped.dtype]

    def corrupt(self, message: str) -> CorruptFile:
        """The error that says so of this tensor."""
        return CorruptFile(f"is a torchao {self.wrapped.class_name:.60} that {message}", tensor=self.name)

    def unsupported(self, reason: str) -> Unsupported:
        """Likewise, for what is not read."""
        return Unsupported(f"is a torchao {self.wrapped.class_name:.60}, {reason}", tensor=self.name)

    def lose(self, kind: LossKind, detail: str) -> None:
        """Records a loss."""
        self.losses.append(Loss(self.name, kind, detail))

    def of(self, wrapped: WrappedTensor) -> InnerTensors:
        """Those of a tensor that this one wraps."""
        return replace(self, wrapped=wrapped)

    def get(self, *roles: str) -> Any:
        """The first attribute of those names; None where there is none."""
        return next((self.wrapped.attributes[role] for role in roles if role in self.wrapped.attributes), None)

    def tensor(self, *roles: str) -> Tensor:
        """An attribute that must be a plain tensor of numbers."""
        tensor = self.optional(*roles)
        if tensor is None:
            raise self.corrupt(f"has no {roles[0]}")
        return tensor

    def optional(self, *roles: str) -> Tensor | None:
        """Likewise; None where there is none."""
        tensor = self.get(*roles)
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor) or tensor.quantization is not None:
            raise self.corrupt(f"has a {roles[0]} that is not a plain tensor but {type(tensor).__name__}")
        if not (is_integer(tensor.dtype) or is_float(tensor.dtype)):
            raise self.corrupt(f"has a {roles[0]} of dtype {tensor.dtype}, which holds no real numbers")
        return tensor

    def nested(self, *roles: str) -> WrappedTensor:
        """An attribute that must be a wrapped tensor itself."""
        wrapped = self.get(*roles)
        if not isinstance(wrapped, WrappedTensor):
            raise self.corrupt(f"has a {roles[0]} that is not a tensor of torchao but {type(wrapped).__name__}")
        return wrapped

    def count(self, *roles: str) -> int:
        """An attribute that must be a positive integer."""
        value = self.get(*roles)
        if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:
            raise self.corrupt(f"has the {roles[0]} {brief(value)}, where a positive integer is needed")
        return value

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The attribute `block_size`: how many elements along each axis share a scale."""
        blocks = self.get("block_size")
        if not isinstance(blocks, tuple) or len(blocks) != len(shape):
            raise self.corrupt(f"has the block_size {brief(blocks)}, where one for each axis of {shape} is needed")
        if any(type(block) is not int or not 1 <= block <= _LARGEST_SIZE for block in blocks):
            raise self.corrupt(f"has the block_size {brief(blocks)}, where positive integers are needed")
        return blocks

    def fits(self, role: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`tensor`, which must have that shape."""
        if tensor.shape != shape:
            raise self.corrupt(f"has {role} of shape {tensor.shape}, where {shape} is needed")
        return tensor

    def parameter(self, role: str, tensor: Tensor, grid: tuple[int, ...]) -> Tensor:
        """`tensor` as a parameter of blocks, which it must have one of each for, in whichever shape."""
        if prod(tensor.shape) != prod(grid):
            raise self.corrupt(f"has {role} of shape {tensor.shape}, where {grid} is needed")
        return replace(tensor, name=role, shape=grid)
