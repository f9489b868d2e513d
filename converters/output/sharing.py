"""Computes small tensors once for several outputs of one read.

Outputs are written one after the other, each front to back, so each would compute the same tensors again. A computed
tensor of at most 64 MiB, with its parameters, is kept from the first output that reads it to the end of the run, while
all kept tensors have at most 256 MiB. Data in a file, or in memory already, are never kept.

Why limits. Larger tensors, and those beyond the 256 MiB, are computed once per output. A second target then costs as
much time as a second command, without reading headers again; but memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.interfaces import Plan
from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.storage import Data, FileRange, InMemory

_MOST_OF_ONE = 1 << 26
_MOST_IN_ALL = 1 << 28


@dataclass(slots=True)
class _Room:
    free: int = _MOST_IN_ALL


@dataclass(slots=True, eq=False)
class _Once:
    """The data of a tensor and of its parameters, computed together: quantizing fits the parameters before it makes the
    codes, and would fit them again later."""

    made_from: Sequence[Data]
    room: _Room
    outputs: int = 0
    _arrays: list[NDArray[np.uint8]] = field(default_factory=list)
    _lock: Any = field(default_factory=Lock)

    def array(self, number: int) -> NDArray[np.uint8] | None:
        """All bytes of data `number`; None if they are not kept."""
        if self.outputs < 2:
            return None
        with self._lock:
            nbytes = sum(data.nbytes for data in self.made_from)
            if not self._arrays and nbytes <= self.room.free:
                self._arrays += [data.read(0, data.nbytes) for data in self.made_from]
                self.room.free -= nbytes
                for data in self.made_from:
                    data.release(0, data.nbytes)
            return self._arrays[number] if self._arrays else None

    def forget(self) -> None:
        """Releases the kept arrays."""
        self.outputs = 0
        self.room.free += sum(array.size for array in self._arrays)
        self._arrays.clear()


@dataclass(frozen=True, slots=True, eq=False)
class SharedData(Data):
    """Computed data that are kept as long as another output will read them."""

    data: Data
    once: _Once
    number: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def made_of(self) -> tuple[Data, ...]:
        return (self.data,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        kept = self.once.array(self.number)
        return self.data.read(start, stop) if kept is None else kept[start:stop]

    def read_into(self, start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        kept = self.once.array(self.number)
        return self.data.read_into(start, stop, out) if kept is None else kept[start:stop]

    def release(self, start: int, stop: int) -> None:
        self.data.release(start, stop)


def shared(model: Model, read: Model) -> Model:
    """The model with data that are computed once for all outputs. `read` is the model before the stages. Data of a
    reader's own class, and those of a model with a graph, stay the same objects: writers compare objects to see what is
    unchanged."""
    parameters = {id(one) for t in model.values() if t.quantization for _, one in t.quantization.parameters()}
    room = _Room()
    tensors = dict(model.tensors)
    for name, tensor in model.items():
        before = read.get(name)
        is_as_read = before is not None and before.data is tensor.data
        is_ours = type(tensor.data).__module__.startswith("nibblecast.converters.")
        if is_as_read and (model.graph is not None or not is_ours):
            continue
        if tensor.parameter_of is None and id(tensor) not in parameters:
            tensors[name] = _shared_tensor(tensor, room)
    return replace(model, tensors=tensors)


def _shared_tensor(tensor: Tensor, room: _Room) -> Tensor:
    quantization = tensor.quantization
    of_it = {"": tensor} | {
        role: one
        for role, one in (quantization.parameters() if quantization else ())
        if role != "group_index" and one.parameter_of is None and one.quantization is None
    }
    computed = {role: one for role, one in of_it.items() if not isinstance(one.data, FileRange | InMemory)}
    if "" not in computed or sum(one.nbytes for one in computed.values()) > _MOST_OF_ONE:
        return tensor
    once = _Once([one.data for one in computed.values()], room)
    made: dict[str, Any] = {}
    for number, (role, one) in enumerate(computed.items()):
        made[role] = replace(one, data=SharedData(one.data, once, number))
    data: Data = made.pop("").data
    return replace(tensor, data=data, quantization=quantization and replace(quantization, **made))


@contextmanager
def sharing(plans: Sequence[Plan]) -> Iterator[None]:
    """A block that writes these plans one after the other; data that several of them read are kept meanwhile."""
    found = [] if len(plans) < 2 else [{id(once): once for once in _taken(plan)} for plan in plans]
    for of_one in found:
        for once in of_one.values():
            once.outputs += 1
    try:
        yield
    finally:
        for of_one in found:
            for once in of_one.values():
                once.forget()


def _taken(plan: Plan) -> Iterator[_Once]:
    for shard in plan.shards:
        for tensor in shard.tensors:
            yield from _within(tensor.stored())


def _within(many: Iterable[Data]) -> Iterator[_Once]:
    for data in many:
        if isinstance(data, SharedData):
            yield data.once
        yield from _within(data.made_of())
