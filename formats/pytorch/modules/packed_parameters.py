"""The packed parameters of quantized modules: which tensors they hold, and what these are called in the float model.

`Linear` saves a tuple of weight and bias, embeddings a weight; modules that are pickled whole, recurrent ones and
TorchScript save script objects, of which the state is plain data (torch 2.13, aten/src/ATen/native/quantized/cpu).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nibblecast.converters.ir import Loss
from nibblecast.formats.pytorch.modules.state_dict import Leaf, StateDict
from nibblecast.formats.pytorch.pickle.limits import STEP, Limits
from nibblecast.formats.pytorch.pickle.records import StridedTensor, UnknownObject, described, is_tensor, shortened

#: What the last parts of a name become for a weight and for a bias.
_SUFFIXES = (
    ("_packed_params._packed_params", "weight", "bias"),
    ("_packed_params._packed_weight", "weight", "bias"),
    ("_packed_params", "weight", "bias"),
    ("_packed_weight_ih", "weight_ih", "bias_ih"),
    ("_packed_weight_hh", "weight_hh", "bias_hh"),
)
_CELLS = re.compile(r"(?P<module>.*?)_all_weight_values\.(?P<number>[0-9]{1,9})\.param")
_DEEPEST = 8  # tensors in packed parameters: states in states of records


def unpack_parameters(found: StateDict, limits: Limits) -> None:
    """Puts the tensors of packed parameters in their place, under the names that they have in the float model."""
    cells = _cell_counts(found)
    leaves: dict[str, Leaf] = {}
    for name, leaf in found.leaves.items():
        parts = dict(_parts(name, leaf, found, cells, limits))
        leaves.update(parts)
        if not parts:
            found.losses.append(Loss(name, "dropped", f"packed parameters of the unknown class {_class_of(leaf)}"))
    found.leaves = leaves


def _parts(
    name: str, leaf: Leaf, found: StateDict, cells: dict[str, int], limits: Limits
) -> Iterator[tuple[str, Leaf]]:
    matched = _CELLS.fullmatch(name)
    if matched and isinstance(leaf, UnknownObject):
        module = matched["module"]
        directions = _directions(module, found, cells, limits)
        yield from _cell(module, int(matched["number"]), leaf, directions, limits)
        return
    for suffix, weight, bias in _SUFFIXES:
        if name == suffix or name.endswith("." + suffix):
            prefix = name.removesuffix(suffix)
            for role, tensor in zip((weight, bias), _weight_and_bias(leaf, limits), strict=True):
                if tensor is not None:
                    yield prefix + role, tensor
            return
    if isinstance(leaf, tuple):
        yield from ((f"{name}.{number}", part) for number, part in enumerate(leaf) if part is not None)
    elif not isinstance(leaf, UnknownObject):
        yield name, leaf


def _weight_and_bias(packed: Any, limits: Limits) -> tuple[Any, Any]:
    """The two tensors of packed parameters, None for what is not there: a quantized tensor is the weight, or else the
    first one of at least two axes; the bias has one axis."""
    tensors = [packed] if is_tensor(packed) else list(_tensors(packed, limits))
    matrices = [t for t in tensors if len(t.shape) > 1]
    codes = (t for t in tensors if isinstance(t, StridedTensor) and t.quantizer is not None)
    weight: Any = next(codes, None) or next(iter(matrices), None)
    vectors = (t for t in tensors if len(t.shape) == 1 and t is not weight and _is_float(t))
    return weight, next(vectors, None)


def _is_float(tensor: Any) -> bool:
    return isinstance(tensor, StridedTensor) and tensor.dtype.name.startswith("float")


def _tensors(value: Any, limits: Limits, depth: int = 0) -> Iterator[StridedTensor]:
    limits.spend(STEP)
    if isinstance(value, StridedTensor):
        yield value
    elif isinstance(value, tuple | list) and depth < _DEEPEST:
        for part in value:
            yield from _tensors(part, limits, depth + 1)
    elif isinstance(value, UnknownObject) and depth < _DEEPEST:
        yield from _tensors(value.state, limits, depth + 1)


def _cell(module: str, number: int, leaf: UnknownObject, directions: int, limits: Limits) -> Iterator[tuple[str, Leaf]]:
    """The weights and biases of one layer and direction of a dynamically quantized LSTM or GRU: a state of its kind,
    tensors, numbers, and packed parameters for the input's and the hidden state's weights."""
    state = leaf.state
    for _ in range(_DEEPEST):  # (state, name of the class)
        if isinstance(state, tuple) and state and isinstance(state[0], tuple):
            state = state[0]
    if not isinstance(state, tuple) or len(state) < 5:
        return
    tensors = list(_tensors(state[1], limits))
    given = state[4][:_DEEPEST] if isinstance(state[4], tuple | list) else ()
    packed = [part for part in given if isinstance(part, UnknownObject)]
    suffix = f"_l{number // directions}" + ("_reverse" if number % directions else "")
    pairs = [_weight_and_bias(part, limits) for part in packed[:2]]
    if not pairs:  # statically quantized cells keep their tensors themselves: weights first, then biases
        pairs = list(zip(tensors[:2], tensors[2:4], strict=False))
    biases = tensors if len(packed) == 2 else []
    for position, (role, (weight, bias)) in enumerate(zip(("ih", "hh"), pairs, strict=False)):
        if weight is not None:
            yield f"{module}weight_{role}{suffix}", weight
        own_bias = biases[position] if position < len(biases) else bias
        if own_bias is not None:
            yield f"{module}bias_{role}{suffix}", own_bias


def _cell_counts(found: StateDict) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in found.leaves:
        matched = _CELLS.fullmatch(name)
        if matched:
            counts[matched["module"]] = counts.get(matched["module"], 0) + 1
    return counts


def _directions(module: str, found: StateDict, cells: dict[str, int], limits: Limits) -> int:
    """How many directions a recurrent module has: its attribute says so; a state dict has only the number of cells and
    the widths of what they take in, which is twice the hidden size from the second layer on where there are two."""
    settings = found.settings.get(module.rstrip("."), {})
    if "bidirectional" in settings:
        return 2 if settings["bidirectional"] else 1
    if cells[module] % 2:
        return 1
    first, second = (found.leaves.get(f"{module}_all_weight_values.{number}.param") for number in (0, 1))
    shapes = [_cell_shapes(first, limits), _cell_shapes(second, limits)]
    alike = shapes[0] is not None and shapes[0] == shapes[1]
    same = alike and shapes[0] is not None and shapes[0][0][-1] != shapes[0][1][-1]
    if alike and not same:
        found.losses.append(
            Loss(
                f"{module}weight_ih_l1",
                "reinterpreted",
                "is named as the second layer's, but may be the second direction's: the file does not say",
            )
        )
    return 2 if same else 1


def _cell_shapes(leaf: Any, limits: Limits) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of a cell's two weights."""
    parts: dict[str, Any] = dict(_cell("", 0, leaf, 1, limits)) if isinstance(leaf, UnknownObject) else {}
    pair = [parts[name].shape for name in ("weight_ih_l0", "weight_hh_l0") if name in parts]
    return (pair[0], pair[1]) if len(pair) == 2 and all(pair) else None


def _class_of(leaf: Leaf) -> str:
    if isinstance(leaf, UnknownObject):
        state = leaf.state
        named = state[-1] if isinstance(state, tuple) and state and isinstance(state[-1], str) else None
        return described(leaf.made_by) if named is None else shortened(named)
    return type(leaf).__name__
