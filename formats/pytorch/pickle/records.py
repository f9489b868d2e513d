"""What an unpickled PyTorch file consists of: plain Python data and the inert values below. None of them can act.

Nor is anything done with them that goes through all of a value: Python's own `repr`, `hash` and `==` go as deep as it
is nested, and as often as its parts are shared. A tuple that holds itself twice, sixty levels deep, is 240 bytes of a
pickle and takes them for ever; one nested 300 000 deep ends the process. So values are described by `described`, their
types are checked before they are compared, and what is hashed is a text, bytes, a `Key` or an object that is compared
by identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.storage import FileRange
from nibblecast.formats.pytorch.pickle.limits import STEP

_LONGEST_KEY = 1 << 14
_MOST_KEY_PARTS = 64
_MOST_KEY_BITS = 256
_DEEPEST_KEY = 2
_SHORT_NAME = 200


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names: a name and nothing more, of a length that `checked_global` bounds."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Both parts, with a dot between them."""
        return f"{self.module}.{self.name}"


class AttributedDict(dict[Any, Any]):
    """An OrderedDict, which may have attributes of its own (a state dict's `_metadata`), in `attributes`."""

    attributes: Any = None
    __repr__ = object.__repr__


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a dictionary, or an element of a set, that is no text: its text, and whether it is an integer. Texts are
    hashed with a secret of the process; numbers and tuples are not, and a file could choose them so that all of them
    fall on one place of the table."""

    text: str
    is_integer: bool = False


@dataclass(slots=True, eq=False, repr=False)
class UnknownObject:
    """An object of a class that is not known here, or the result of a function that is not: what it would have been
    made of. `state` is what its `__setstate__` would have got, `items` what would have been appended to it, `entries`
    what would have been set in it."""

    made_by: Global
    arguments: tuple[Any, ...] = ()
    keywords: dict[Any, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The last part of the name of what made it."""
        return self.made_by.name.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The module of what made it."""
        return self.made_by.module

    def attributes(self) -> dict[Any, Any]:
        """The attributes that its state sets: a dictionary, or one and another for slots."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, dict | None) for s in state):
            return {**(state[0] or {}), **(state[1] or {})}
        return state if isinstance(state, dict) else {}


@dataclass(slots=True, eq=False, repr=False)
class Storage:
    """The memory that tensors are views of: `count` elements of `dtype` (None: bytes of no type). Its bytes are `data`,
    which a legacy file tells only after the pickle, or a part of `root`, from its element `root_offset` on."""

    key: str
    dtype: TorchDtype | None
    count: int
    data: FileRange | None = None
    root: Storage | None = None
    root_offset: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.count * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 1 if self.dtype is None else self.dtype.numpy.itemsize

    def range(self) -> FileRange:
        """Its bytes in the file. Raises CorruptFile where the file has none."""
        if self.root is not None:
            whole = self.root.range()
            return whole.file.range(whole.offset + self.root_offset * self.itemsize, self.nbytes)
        if self.data is None:
            raise CorruptFile(f"has no data for its storage {brief(self.key)}")
        return self.data


@dataclass(frozen=True, slots=True)
class TorchDtype:
    """A dtype of PyTorch: its name, how its elements lie in memory, whether it is one of the quantized ones, and how
    many elements there are in one of memory (2 for quint4x2)."""

    name: str
    numpy: np.dtype[Any]
    quantized: bool = False
    elements: int = 1


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Quantizer:
    """The parameters of a quantized tensor: a number or a tensor each; `axis` is None for one of each."""

    scale: Any
    zero_point: Any
    axis: int | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StridedTensor:
    """A view of a storage; `offset` and `strides` count elements, and all of them lie inside the storage."""

    storage: Storage
    dtype: TorchDtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    quantizer: Quantizer | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SubclassTensor:
    """A tensor of a class that wraps others (torchao's): the class's name, its shape and dtype, and the attributes."""

    class_name: str
    shape: tuple[int, ...]
    dtype: str
    attributes: dict[Any, Any]


def is_tensor(value: Any) -> TypeGuard[StridedTensor | SubclassTensor]:
    """Whether it is one of the two kinds of tensor."""
    return isinstance(value, StridedTensor | SubclassTensor)


def described(value: object) -> str:
    """A value out of a pickle as a short text for a message, in time that does not depend on the value: the names of
    classes and functions as they are, what else is known here by its kind, anything else as `brief` has it."""
    if isinstance(value, Global):
        return shortened(value.path)
    if isinstance(value, UnknownObject):
        return f"an object of {described(value.made_by)}"
    if isinstance(value, StridedTensor | SubclassTensor):
        return f"a tensor of shape {brief(value.shape)}"
    return value.name if isinstance(value, TorchDtype) else brief(value)


def shortened(text: str) -> str:
    """A name out of a file, without quotes, cut where it is too long for a message."""
    return text if len(text) <= _SHORT_NAME else f"{text[:_SHORT_NAME]}…"


def reason_of(error: Exception) -> str:
    """What went wrong, without the values that it went wrong with: the text of KeyError is the whole key's `repr`."""
    said = error.args[0] if error.args else None
    return f"{type(error).__name__}: {shortened(said)}" if isinstance(said, str) else type(error).__name__


def key_of(value: Any, spend: Callable[[int], None]) -> Any:
    """What a dictionary or a set has for the key `value`: texts, bytes and what is compared by identity as they are,
    None, numbers, names and tuples of these as a `Key`. Raises TypeError for anything else, ValueError for what is so
    large that hashing or comparing it takes long; `spend` counts what making a key takes."""
    if isinstance(value, str | bytes):
        if len(value) > _LONGEST_KEY:
            raise ValueError(f"a key of {len(value)} characters")
        return value
    if isinstance(value, UnknownObject | StridedTensor | SubclassTensor):
        return value
    return Key(_key_text(value, spend, 0), isinstance(value, int))


def _key_text(value: Any, spend: Callable[[int], None], depth: int) -> str:
    """The text of a key that is none, or of a part of one: different for different keys."""
    spend(STEP)
    if isinstance(value, tuple):
        if depth == _DEEPEST_KEY or len(value) > _MOST_KEY_PARTS:
            raise ValueError(f"a key that is a tuple of {len(value)}, {depth} deep")
        text = f"({', '.join(_key_text(part, spend, depth + 1) for part in value)})"
        if len(text) > _LONGEST_KEY:
            raise ValueError(f"a key of {len(text)} characters")
        return text
    if isinstance(value, str | bytes):
        spend(len(value))
        return brief(value, _LONGEST_KEY)
    if isinstance(value, int) and value.bit_length() > _MOST_KEY_BITS:
        raise ValueError(f"a key that is an integer of {value.bit_length()} bits")
    if isinstance(value, UnknownObject):
        return f"object {id(value)}"
    if not isinstance(value, int | float | None | Global):
        raise TypeError(f"a key of type {type(value).__name__}")
    return value.path if isinstance(value, Global) else brief(value)
