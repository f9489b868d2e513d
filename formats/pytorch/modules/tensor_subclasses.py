"""Tensors of classes that wrap others, out of a pickle, as torchao's encodings take them."""

from __future__ import annotations

from typing import Any

from nibblecast.converters.errors import CorruptFile
from nibblecast.formats.encodings.torchao.inner_tensors import WrappedTensor
from nibblecast.formats.pytorch.modules.tensors import tensor_of
from nibblecast.formats.pytorch.pickle.limits import LEAF, STEP, Limits
from nibblecast.formats.pytorch.pickle.records import Global, StridedTensor, SubclassTensor, UnknownObject

_DEEPEST = 8  # nested attributes: a weight in a wrapper, codes in an implementation, planes in these


def wrapped(name: str, value: SubclassTensor, limits: Limits, depth: int = 0) -> WrappedTensor:
    """The tensor `name` with its attributes: tensors as tensors, dtypes by name, enumerations by value. Raises
    CorruptFile for attributes that are no attributes, and for a tensor inside a tensor inside a tensor without end."""
    if depth > _DEEPEST:
        raise CorruptFile(f"wraps tensors more than {_DEEPEST} deep: it is damaged", tensor=name)
    limits.spend(LEAF + STEP * len(value.attributes))
    attributes = {
        role: _attribute(name, item, limits, depth + 1)
        for role, item in value.attributes.items()
        if isinstance(role, str)
    }
    return WrappedTensor(value.class_name, value.shape, value.dtype, attributes)


def _attribute(name: str, value: Any, limits: Limits, depth: int) -> Any:
    if isinstance(value, StridedTensor):
        limits.spend(LEAF)
        return tensor_of(name, value)
    if isinstance(value, SubclassTensor):
        return wrapped(name, value, limits, depth)
    if isinstance(value, tuple | list):
        # of numbers and dtypes: a tensor in a tuple is none of torchao's attributes
        limits.spend(STEP * len(value))
        return tuple(item.name if isinstance(item, Global) else _number(item) for item in value)
    if isinstance(value, UnknownObject) and len(value.arguments) == 1:
        return _number(value.arguments[0])
    return value.name if isinstance(value, Global) else _number(value)


def _number(value: Any) -> Any:
    """A number, a text or None; the name of its type for anything else, which nothing is decoded by."""
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
