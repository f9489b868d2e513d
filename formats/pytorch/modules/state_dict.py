"""From what was saved to a flat state dict: names and their tensors, whatever they were wrapped in.

State dicts, training checkpoints around them, lists and single tensors, whole pickled modules and TorchScript modules
all come out as what `state_dict()` of the model would give.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import MOST_DIMENSIONS, Loss
from nibblecast.formats.pytorch.pickle.limits import ENTRY, LEAF, STEP, Limits
from nibblecast.formats.pytorch.pickle.records import (
    Global,
    Key,
    StridedTensor,
    SubclassTensor,
    UnknownObject,
    described,
    is_tensor,
)

#: Under which keys checkpoints keep the model, the most specific first.
_MODEL_KEYS = ("state_dict", "model_state_dict", "module", "model", "net", "generator", "params", "weights")
#: Prefixes that wrappers put before all names: DataParallel and DistributedDataParallel, torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_MOST_DEPTH = 256
#: What may hold tensors, or is one.
_NESTED = (StridedTensor, SubclassTensor, UnknownObject, np.ndarray, dict, list, tuple)

Leaf = StridedTensor | SubclassTensor | UnknownObject | np.ndarray | tuple[Any, ...]


@dataclass(slots=True, eq=False)
class StateDict:
    """`leaves` are tensors, NumPy arrays, and packed parameters (tuples, or records of script objects) by name;
    `settings` the plain attributes of modules, by the modules' names, for files that hold whole modules; `classes`
    their classes' names; `values` what else dictionaries hold by name: numbers, texts, tuples of numbers (sizes), the
    names of dtypes."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    settings: dict[str, Mapping[Any, Any]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)


def state_dict_of(saved: Any, limits: Limits) -> StateDict:
    """The tensors in what was saved. Raises CorruptFile where it nests without end, or has the same parts in it so
    often that going through them passes the limits."""
    found = as_saved(saved, limits)
    strip_wrappers(found)
    return found


def as_saved(saved: Any, limits: Limits) -> StateDict:
    """Likewise, under the names that they were saved by, those of wrappers included."""
    found = StateDict()
    model = _unwrapped(saved, found, limits)
    _Walk(found, limits).through("tensor" if is_tensor(model) or isinstance(model, np.ndarray) else "", model)
    return found


def strip_wrappers(found: StateDict) -> None:
    """Takes the prefixes off the names that wrappers of a model put before all of them."""
    for prefix in _WRAPPER_PREFIXES:
        _strip(found, prefix)


def _unwrapped(saved: Any, found: StateDict, limits: Limits) -> Any:
    """The part of a checkpoint that is the model; what else holds tensors is a Loss."""
    for _ in range(_MOST_DEPTH):
        if not isinstance(saved, dict):
            return saved
        limits.spend(STEP * len(saved))
        if any(is_tensor(value) for value in saved.values()):
            return saved
        keys = [key for key in _MODEL_KEYS if _may_be_model(saved.get(key), limits)]
        if not keys:
            return saved
        for key, value in saved.items():
            if key != keys[0] and (count := _count_tensors(value, limits)):
                of = described(key.text if isinstance(key, Key) else key)
                found.losses.append(Loss("", "dropped", f"{of} ({count} tensors) is not part of the model"))
        saved = saved[keys[0]]
    raise CorruptFile(f"nests its state dict more than {_MOST_DEPTH} deep")


def _may_be_model(value: Any, limits: Limits) -> bool:
    return (isinstance(value, dict) and len(value) > 0) or (
        isinstance(value, UnknownObject) and bool(_module_parts(value, limits))
    )


def _count_tensors(value: Any, limits: Limits) -> int:
    """How many tensors there are in nested containers, each container counted once."""
    count, seen, waiting = 0, set(), [value]
    while waiting:
        value = waiting.pop()
        if is_tensor(value):
            count += 1
        elif isinstance(value, dict | list | tuple | UnknownObject) and id(value) not in seen:
            seen.add(id(value))
            children = _children(value)
            limits.spend(ENTRY + STEP * len(children))
            waiting.extend(child for child in children if isinstance(child, _NESTED))
    return count


def _children(value: Any) -> Collection[Any]:
    if isinstance(value, UnknownObject):
        return (value.arguments, value.state, value.items, value.entries)
    return value.values() if isinstance(value, dict) else value


def _strip(found: StateDict, prefix: str) -> None:
    if found.leaves and all(name.startswith(prefix) for name in found.leaves):
        found.leaves = {name.removeprefix(prefix): leaf for name, leaf in found.leaves.items()}
        found.settings = {name.removeprefix(prefix): each for name, each in found.settings.items()}
        found.classes = {name.removeprefix(prefix): each for name, each in found.classes.items()}
        found.values = {name.removeprefix(prefix): each for name, each in found.values.items()}


@dataclass(slots=True, eq=False)
class _Walk:
    """A walk over nested values that ends: whatever the file shares or repeats, only so much is looked at."""

    found: StateDict
    limits: Limits

    def through(self, name: str, value: Any) -> None:
        """Adds the tensors in `value`, which is called `name`."""
        waiting: list[Iterator[tuple[str, Any]]] = [iter(((name, value),))]
        while waiting:
            entry = next(waiting[-1], None)
            inside = None if entry is None else self._inside(*entry)
            if entry is None:
                waiting.pop()
            elif inside is not None:
                waiting.append(inside)
            if len(waiting) > _MOST_DEPTH:
                raise CorruptFile("nests its values without end: it may be an attack, or holds itself")

    def _inside(self, name: str, value: Any) -> Iterator[tuple[str, Any]] | None:
        """What there is in a value, by name; None where it is a leaf, or nothing that holds tensors."""
        if is_tensor(value) or isinstance(value, np.ndarray) or _is_packed(value):
            self._add(name, value)
        elif isinstance(value, dict):
            self._add_plain(name, value)
            return self._named(name, value.items(), len(value))
        elif isinstance(value, list | tuple):
            return self._named(name, enumerate(value), len(value))
        elif isinstance(value, UnknownObject):
            return self._inside_record(name, value)
        return None

    def _inside_record(self, name: str, record: UnknownObject) -> Iterator[tuple[str, Any]] | None:
        array = _numpy_array(record)
        if array is not None:
            self._add(name, array)
            return None
        parts = _module_parts(record, self.limits)
        attributes = _attributes(record, self.limits)
        if parts is None:
            self.limits.spend(STEP * len(record.entries))
            parts = {**attributes, **record.entries}
        else:
            self.found.settings[name] = attributes
            self.found.classes[name] = record.made_by.path
        return self._named(name, parts.items(), len(parts))

    def _named(self, name: str, entries: Iterable[tuple[Any, Any]], count: int) -> Iterator[tuple[str, Any]]:
        """Those of `count` entries of a container that may hold tensors, by their names in the state dict."""
        self.limits.spend(STEP * count)
        for key, value in entries:
            part = _part_of_name(key) if isinstance(value, _NESTED) else None
            if part is not None:
                self.limits.spend(ENTRY + len(name) + len(part))
                yield f"{name}.{part}" if name else part, value

    def _add(self, name: str, leaf: Leaf) -> None:
        self.limits.spend(LEAF)
        self.found.leaves[name] = leaf

    def _add_plain(self, name: str, values: Mapping[Any, Any]) -> None:
        plain = {key: _plain(each) for key, each in values.items() if isinstance(key, str) and _is_plain(each)}
        self.limits.spend(sum(ENTRY + len(name) + len(key) for key in plain))
        self.found.values |= {f"{name}.{key}" if name else key: each for key, each in plain.items()}


def _part_of_name(key: Any) -> str | None:
    """What a key of a dictionary, or a position in a list, adds to the names below it; None: it is no part of names."""
    if isinstance(key, Key):
        return key.text if key.is_integer else None
    return key if isinstance(key, str) else str(key) if isinstance(key, int) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) <= MOST_DIMENSIONS and all(type(size) is int for size in value)
    return isinstance(value, str | int | float) or (isinstance(value, Global) and value.module == "torch")


def _plain(value: Any) -> Any:
    return value.path if isinstance(value, Global) else value


def _is_packed(value: Any) -> bool:
    """Whether it is a weight packed for a quantized operator: a script object, or the tuple of a weight and a bias."""
    if isinstance(value, tuple):
        return len(value) == 2 and is_tensor(value[0]) and (value[1] is None or is_tensor(value[1]))
    return isinstance(value, UnknownObject) and (
        value.made_by == Global("torch", "ScriptObject") or value.module.startswith("__torch__.torch.classes")
    )


def _attributes(record: UnknownObject, limits: Limits) -> dict[Any, Any]:
    """The attributes of a record, which may be put together anew each time."""
    parts = record.state if isinstance(record.state, tuple) and len(record.state) == 2 else (record.state,)
    limits.spend(STEP * (1 + sum(len(part) for part in parts if isinstance(part, dict))))
    return record.attributes()


def _module_parts(record: UnknownObject, limits: Limits) -> dict[str, Any] | None:
    """What the state dict of a module has of it and of the modules in it: parameters, persistent buffers, what
    quantized modules add. None where the record is no module."""
    attributes = _attributes(record, limits)
    if record.class_name.startswith("reduce_") and record.arguments and isinstance(record.arguments[0], dict):
        attributes = record.arguments[0]  # torch.fx.GraphModule
    groups = [attributes.get(group) for group in _GROUPS]
    limits.spend(STEP * (len(attributes) + sum(len(group) for group in groups if isinstance(group, dict))))
    if isinstance(record.state, tuple) and len(record.state) == len(_CONVOLUTION) and "quantized" in record.module:
        return {name: _number(name, part) for name, part in zip(_CONVOLUTION, record.state, strict=True) if name}
    if record.module.startswith("__torch__"):
        members = attributes
    elif isinstance(attributes.get("_modules"), dict):
        members = _members(attributes, groups)
    else:
        return None
    quantized = {}
    if ".quantized" in record.module:
        quantized = {name: _number(name, attributes[name]) for name in _NUMBERS if name in attributes}
    return {name: value for name, value in members.items() if not isinstance(value, list)} | quantized


#: Where an nn.Module keeps its parts.
_GROUPS = ("_parameters", "_buffers", "_modules")


def _members(attributes: Mapping[Any, Any], groups: Iterable[Any]) -> dict[str, Any]:
    """Parameters, persistent buffers, script objects and modules of an nn.Module, whose `groups` those of _GROUPS
    are."""
    transient = attributes.get("_non_persistent_buffers_set")
    left_out = transient if isinstance(transient, set) else set()
    members = {
        name: value
        for group in groups
        if isinstance(group, dict)
        for name, value in group.items()
        if value is not None and name not in left_out
    }
    return members | {
        name: value for name, value in attributes.items() if isinstance(value, UnknownObject) and _is_packed(value)
    }


#: What quantized convolutions pickle of themselves, in order (torch/ao/nn/quantized/modules/conv.py, __getstate__);
#: those with a name are in their state dicts.
_CONVOLUTION = (*("",) * 10, "weight", "bias", "scale", "zero_point", "")
#: The parameters of their results, numbers as attributes and tensors in state dicts.
_NUMBERS = {"scale": np.float32, "zero_point": np.int64}


def _number(name: str, value: Any) -> Any:
    """A number as the tensor that the state dict has instead."""
    if name in _NUMBERS and isinstance(value, int | float):
        try:
            with np.errstate(over="ignore"):
                return np.array(value, _NUMBERS[name])
        except (OverflowError, ValueError):
            role = name.replace("_", " ")
            raise CorruptFile(f"has the {role} {brief(value)}, which its dtype does not hold") from None
    return value


def _numpy_array(record: UnknownObject) -> np.ndarray | None:
    """A pickled NumPy array of numbers (numpy 1 and 2, `_reconstruct` and the state that follows)."""
    if record.class_name != "_reconstruct" or not record.module.startswith(("numpy.core", "numpy._core")):
        return None
    state = record.state
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, is_fortran, data = state
    kind = dtype.arguments[0] if isinstance(dtype, UnknownObject) and dtype.arguments else ""
    order = (
        dtype.state[1]
        if isinstance(dtype, UnknownObject) and isinstance(dtype.state, tuple) and dtype.state[1:]
        else "|"
    )
    if not isinstance(kind, str) or not isinstance(order, str) or not isinstance(data, bytes):
        return None
    if kind not in _NUMPY_KINDS or order not in ("<", "|", "="):
        return None
    numbers = np.dtype(kind)
    if not _is_shape(shape) or prod(shape) * numbers.itemsize != len(data):
        raise CorruptFile(f"has a NumPy array of shape {described(shape)}, which does not fit its {len(data)} bytes")
    try:
        return np.frombuffer(data, numbers).reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, OverflowError):  # no elements, and sizes that are larger than any memory
        raise CorruptFile(f"has a NumPy array of shape {brief(shape)}, which no memory holds") from None


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MOST_DIMENSIONS
        and all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in value)
    )


_LARGEST_SIZE = 1 << 63
_NUMPY_KINDS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
