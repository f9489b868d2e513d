"""What an unpickled PyTorch file consists of: plain Python data and the inert values below. None of them can act."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from converters.errors import CorruptFile
from converters.storage import FileRange


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names: a name and nothing more."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class AttributedDict(dict[Any, Any]):
    """An OrderedDict, which may have attributes of its own (a state dict's `_metadata`), in `attributes`."""

    attributes: Any = None


@dataclass(slots=True, eq=False)
class Record:
    """An object of a class that is not known here, or the result of a function that is not: what it would have been
    made of. `state` is what its `__setstate__` would have got, `items` what would have been appended to it, `entries`
    what would have been set in it."""

    made_by: Any
    arguments: tuple[Any, ...] = ()
    keywords: dict[Any, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """The last part of the name of what made it; empty where that is no name."""
        return self.made_by.name.rpartition(".")[2] if isinstance(self.made_by, Global) else ""

    @property
    def module(self) -> str:
        """The module of what made it; empty where that is no name."""
        return self.made_by.module if isinstance(self.made_by, Global) else ""

    def attributes(self) -> dict[Any, Any]:
        """The attributes that its state sets: a dictionary, or one and another for slots."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(s, dict | None) for s in state):
            return {**(state[0] or {}), **(state[1] or {})}
        return state if isinstance(state, dict) else {}


@dataclass(slots=True, eq=False)
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
            raise CorruptFile(f"has no data for its storage '{self.key}'")
        return self.data


@dataclass(frozen=True, slots=True)
class TorchDtype:
    """A dtype of PyTorch: its name, how its elements lie in memory, whether it is one of the quantized ones, and how
    many elements there are in one of memory (2 for quint4x2)."""

    name: str
    numpy: np.dtype[Any]
    quantized: bool = False
    elements: int = 1


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The parameters of a quantized tensor: a number or a tensor each; `axis` is None for one of each."""

    scale: Any
    zero_point: Any
    axis: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StridedTensor:
    """A view of a storage; `offset` and `strides` count elements, and all of them lie inside the storage."""

    storage: Storage
    dtype: TorchDtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    quantizer: Quantizer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SubclassTensor:
    """A tensor of a class that wraps others (torchao's): the class's name, its shape and dtype, and the attributes."""

    class_name: str
    shape: tuple[int, ...]
    dtype: str
    attributes: dict[Any, Any]


def is_tensor(value: Any) -> TypeGuard[StridedTensor | SubclassTensor]:
    """Whether it is one of the two kinds of tensor."""
    return isinstance(value, StridedTensor | SubclassTensor)


def checked_key(key: Any, depth: int = 2) -> Any:
    """`key`, where it can be one: hashing it must neither fail nor recurse deeply."""
    if isinstance(key, tuple) and depth:
        for part in key:
            checked_key(part, depth - 1)
    elif not isinstance(key, _KEYS):
        raise ValueError(f"a key of type {type(key).__name__}")
    return key


_KEYS = (str, bytes, int, float, complex, type(None), Global, Record)
