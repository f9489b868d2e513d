"""From what was saved to a flat state dict: names and their tensors, whatever they were wrapped in.

State dicts, training checkpoints around them, lists and single tensors, whole pickled modules and TorchScript modules
all come out as what `state_dict()` of the model would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from converters.errors import CorruptFile
from converters.ir import MOST_DIMENSIONS, Loss
from formats.pytorch.values import Global, Record, StridedTensor, SubclassTensor, is_tensor

#: Under which keys checkpoints keep the model, the most specific first.
_MODEL_KEYS = ("state_dict", "model_state_dict", "module", "model", "net", "generator", "params", "weights")
#: Prefixes that wrappers put before all names: DataParallel and DistributedDataParallel, torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_MOST_DEPTH = 256
_MOST_VISITED = 2_000_000

Leaf = StridedTensor | SubclassTensor | Record | np.ndarray | tuple[Any, ...]


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


def state_dict_of(saved: Any) -> StateDict:
    """The tensors in what was saved. Raises CorruptFile where it nests without end."""
    found = as_saved(saved)
    strip_wrappers(found)
    return found


def as_saved(saved: Any) -> StateDict:
    """Likewise, under the names that they were saved by, those of wrappers included."""
    found = StateDict()
    model = _unwrapped(saved, found)
    walk = _Walk(found)
    if is_tensor(model) or isinstance(model, np.ndarray):
        found.leaves["tensor"] = model
    else:
        walk.visit(model, "", 0)
    return found


def strip_wrappers(found: StateDict) -> None:
    """Takes the prefixes off the names that wrappers of a model put before all of them."""
    for prefix in _WRAPPER_PREFIXES:
        _strip(found, prefix)


def _unwrapped(saved: Any, found: StateDict) -> Any:
    """The part of a checkpoint that is the model; what else holds tensors is a Loss."""
    for _ in range(_MOST_DEPTH):
        if not isinstance(saved, dict) or any(is_tensor(value) for value in saved.values()):
            return saved
        keys = [key for key in _MODEL_KEYS if _may_be_model(saved.get(key))]
        if not keys:
            return saved
        for key, value in saved.items():
            if key != keys[0] and (count := _count_tensors(value)):
                found.losses.append(
                    Loss("", "dropped", f"'{key}' of the checkpoint, with {count} tensors, is no weights")
                )
        saved = saved[keys[0]]
    raise CorruptFile(f"nests its state dict more than {_MOST_DEPTH} deep")


def _may_be_model(value: Any) -> bool:
    return (isinstance(value, dict) and len(value) > 0) or (isinstance(value, Record) and bool(_module_parts(value)))


def _count_tensors(value: Any) -> int:
    """How many tensors there are in nested containers, each container counted once."""
    count, seen, waiting = 0, set(), [value]
    while waiting:
        value = waiting.pop()
        if is_tensor(value):
            count += 1
        elif isinstance(value, dict | list | tuple | Record) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(_children(value))
    return count


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, Record):
        yield from (value.arguments, value.state, value.items, value.entries)
    else:
        yield from value.values() if isinstance(value, dict) else value


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
    visited: int = 0

    def visit(self, value: Any, name: str, depth: int) -> None:
        """Adds the tensors in `value`, which is called `name`."""
        self.visited += 1
        if depth > _MOST_DEPTH or self.visited > _MOST_VISITED:
            raise CorruptFile("nests its values without end: it may be an attack, or holds itself")
        if is_tensor(value) or isinstance(value, np.ndarray) or _is_packed(value):
            self.found.leaves[name] = value
        elif isinstance(value, dict):
            self.found.values |= {
                f"{name}.{key}" if name else key: _plain(each)
                for key, each in value.items()
                if isinstance(key, str) and _is_plain(each)
            }
            self._visit_all(value, name, depth)
        elif isinstance(value, list | tuple):
            self._visit_all(dict(enumerate(value)), name, depth)
        elif isinstance(value, Record):
            self._visit_record(value, name, depth)

    def _visit_all(self, values: Mapping[Any, Any], name: str, depth: int) -> None:
        for key, value in values.items():
            if isinstance(key, str | int):
                self.visit(value, f"{name}.{key}" if name else str(key), depth + 1)

    def _visit_record(self, record: Record, name: str, depth: int) -> None:
        array = _numpy_array(record)
        if array is not None:
            self.found.leaves[name] = array
            return
        parts = _module_parts(record)
        if parts is None:
            self._visit_all({**record.attributes(), **record.entries}, name, depth)
            return
        self.found.settings[name] = record.attributes()
        self.found.classes[name] = str(record.made_by)
        self._visit_all(parts, name, depth)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) <= MOST_DIMENSIONS and all(type(size) is int for size in value)
    return isinstance(value, str | int | float) or (isinstance(value, Global) and value.module == "torch")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Global) else value


def _is_packed(value: Any) -> bool:
    """Whether it is a weight packed for a quantized operator: a script object, or the tuple of a weight and a bias."""
    if isinstance(value, tuple):
        return len(value) == 2 and is_tensor(value[0]) and (value[1] is None or is_tensor(value[1]))
    return isinstance(value, Record) and (
        str(value.made_by) == "torch.ScriptObject" or value.module.startswith("__torch__.torch.classes")
    )


def _module_parts(record: Record) -> dict[str, Any] | None:
    """What the state dict of a module has of it and of the modules in it: parameters, persistent buffers, what
    quantized modules add. None where the record is no module."""
    attributes = record.attributes()
    if record.class_name.startswith("reduce_") and record.arguments and isinstance(record.arguments[0], dict):
        attributes = record.arguments[0]  # torch.fx.GraphModule
    if isinstance(record.state, tuple) and len(record.state) == len(_CONVOLUTION) and "quantized" in record.module:
        return {name: _number(name, part) for name, part in zip(_CONVOLUTION, record.state, strict=True) if name}
    if record.module.startswith("__torch__"):
        members = attributes
    elif isinstance(attributes.get("_modules"), dict):
        members = _members(attributes)
    else:
        return None
    quantized = {}
    if ".quantized" in record.module:
        quantized = {name: _number(name, attributes[name]) for name in _NUMBERS if name in attributes}
    return {name: value for name, value in members.items() if not isinstance(value, list)} | quantized


def _members(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Parameters, persistent buffers, script objects and modules of an nn.Module."""
    groups = [attributes.get(group) for group in ("_parameters", "_buffers", "_modules")]
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
        name: value for name, value in attributes.items() if isinstance(value, Record) and _is_packed(value)
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
        except (OverflowError, ValueError) as error:
            raise CorruptFile(f"has the {name.replace('_', ' ')} {value!r:.40}: {error}") from None
    return value


def _numpy_array(record: Record) -> np.ndarray | None:
    """A pickled NumPy array of numbers (numpy 1 and 2, `_reconstruct` and the state that follows)."""
    if record.class_name != "_reconstruct" or not record.module.startswith(("numpy.core", "numpy._core")):
        return None
    state = record.state
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, is_fortran, data = state
    kind = dtype.arguments[0] if isinstance(dtype, Record) and dtype.arguments else ""
    order = dtype.state[1] if isinstance(dtype, Record) and isinstance(dtype.state, tuple) and dtype.state[1:] else "|"
    if (
        not isinstance(kind, str)
        or kind not in _NUMPY_KINDS
        or order not in ("<", "|", "=")
        or not isinstance(data, bytes)
    ):
        return None
    try:
        array = np.frombuffer(data, np.dtype(kind))
        return array.reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, TypeError) as error:
        raise CorruptFile(f"has a NumPy array of shape {shape!r:.80} that does not fit its data ({error})") from None


_NUMPY_KINDS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
