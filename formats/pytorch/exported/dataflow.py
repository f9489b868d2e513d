"""From a program and its stored tensors to weights: which tensors are codes, what decodes them, and what uses them.

Values are followed from stored tensors through operators that only pass on, reorder or reshape elements; a weight is
what a dequantizing operator makes of such a value, in the shape that it has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from nibblecast.converters.arithmetic.dtypes import in_range, is_float, is_integer
from nibblecast.converters.errors import located
from nibblecast.converters.ir import Tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.formats.encodings.bytes.widths import dtype_for
from nibblecast.formats.pytorch.exported.operators import PARAMETER_NAMES, input_of
from nibblecast.formats.pytorch.exported.program import Program, ProgramNode, Ref
from nibblecast.formats.pytorch.exported.quantize_operators import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    QUANTIZE,
    Call,
    NotStored,
    codes_of,
    decoded,
    rounded,
)
from nibblecast.formats.pytorch.modules.tensors import is_row_major, tensor_of
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import StridedTensor, SubclassTensor, TorchDtype, shortened

_PASSING = frozenset(
    {"aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.detach_", "aten.lift_fresh_copy"}
)
_CASTING = frozenset(
    {
        *("aten.to", "aten._to_copy", "aten.type_as", "prims.convert_element_type"),
        "quantized_decomposed.convert_element_type",
    }
)
_REORDERING = frozenset({"aten.permute", "aten.t", "aten.transpose"})
_RESHAPING = frozenset(
    {"aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unsqueeze", "aten.squeeze"}
)
_INNER = "export.access_subclass_inner_tensor"


@dataclass(slots=True, eq=False)
class ProgramWeight:
    """A stored tensor, `stored` its name there, or what a program decodes it to. `users` are the names that it has in
    the modules that use it: `head.0.weight`."""

    stored: str
    tensor: Tensor
    uses: list[Use] = field(default_factory=list)
    users: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What was found: the decoded weights, and the values of the program that they are; stored tensors that are used as
    they are; those that are decoded, or are parameters of weights; those that are decoded in a way that is not
    followed, with the reason."""

    weights: tuple[ProgramWeight, ...]
    decoded: Mapping[str, ProgramWeight]
    plain: Mapping[str, ProgramWeight]
    consumed: frozenset[str]
    unresolved: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """A value of the graph: a view of a stored tensor, codes computed of one (`codes`), or a decoded weight. `axes` are
    the axes of the weight in the order in which the value has them, None after reshaping; `parts` are the names of all
    that codes are computed of."""

    stored: str
    key: tuple[Any, ...]
    axes: tuple[int, ...] | None
    view: StridedTensor | None = None
    codes: Tensor | None = None
    weight: ProgramWeight | None = None
    parts: frozenset[str] = frozenset()


def flow_of(program: Program, tensors: Mapping[str, StridedTensor | SubclassTensor], limits: Limits) -> Flow:
    """Follows the stored tensors through the program. Raises CorruptFile and Unsupported, with the tensor's name, for
    parameters that do not fit, and Unsupported where one tensor is decoded to so many that they pass the limits."""
    return _Follower(program, tensors, limits).flow()


class _Follower:
    def __init__(self, program: Program, tensors: Mapping[str, StridedTensor | SubclassTensor], limits: Limits) -> None:
        self.program = program
        self.limits = limits
        self.keys: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.values: dict[str, _Value] = {}
        self.views: dict[str, StridedTensor] = {}
        self.wrapping: dict[str, tuple[str, SubclassTensor]] = {}
        self.weights: dict[tuple[Any, ...], ProgramWeight] = {}
        self.decoded: dict[str, ProgramWeight] = {}
        self.plain: dict[str, ProgramWeight] = {}
        self.consumed: set[str] = set()
        self.unresolved: dict[str, str] = {}
        self.activations, self.results = _activations(program)
        self.whole = {name: value for name, value in tensors.items() if isinstance(value, StridedTensor)}
        for value, name in program.stored.items():
            stored = tensors.get(name)
            if isinstance(stored, StridedTensor):
                self._set(value, _viewed(name, stored, tuple(range(len(stored.shape)))))
            elif stored is not None:
                self.wrapping[value] = (name, stored)

    def flow(self) -> Flow:
        """Goes through all nodes, in their order."""
        for node in self.program.nodes:
            if node.operator == _INNER:
                self._unwrap(node)
            elif not self._pass(node) and not self._compute(node):
                self._use(node)
        for name in self.program.results:  # what is returned as it is stored, is used as well
            value = self.values.get(name)
            if value is not None:
                self._user(value)
        return Flow(tuple(self.weights.values()), self.decoded, self.plain, frozenset(self.consumed), self.unresolved)

    def _set(self, name: str, value: _Value) -> None:
        self.values[name] = value
        if value.view is not None:
            self.views[name] = value.view

    def _unwrap(self, node: ProgramNode) -> None:
        source = node.argument("src_subclass_tensor")
        name, tensor = self.wrapping.get(source.name if isinstance(source, Ref) else "", ("", None))
        inner = None if tensor is None else tensor.attributes.get(node.argument("attr"))
        if isinstance(inner, StridedTensor) and node.outputs:
            self._set(node.outputs[0], _viewed(name, inner, tuple(range(len(inner.shape)))))
        elif isinstance(inner, SubclassTensor) and node.outputs:
            self.wrapping[node.outputs[0]] = (name, inner)

    def _source(self, node: ProgramNode) -> _Value | None:
        first = node.inputs[0][1] if node.inputs else None
        return self.values.get(first.name) if isinstance(first, Ref) and node.outputs else None

    def _pass(self, node: ProgramNode) -> bool:
        """Whether the node only passes a value on."""
        source = self._source(node)
        if source is None:
            return False
        followed: _Value | None = None
        if node.operator in _PASSING or (node.operator in _CASTING and _keeps(node, source)):
            followed = source
        elif node.operator in _REORDERING:
            followed = _reordered(node, source)
        elif node.operator in _RESHAPING and (node.overload != "dtype"):
            followed = self._reshaped(node, source)
        if followed is not None:
            self._set(node.outputs[0], followed)
        return followed is not None

    def _reshaped(self, node: ProgramNode, source: _Value) -> _Value | None:
        found = self.program.types.get(node.outputs[0])
        shape = tuple(size for size in found.shape if isinstance(size, int)) if found is not None else ()
        if found is None or len(shape) != len(found.shape):
            return None
        if source.weight is not None:
            return replace(source, axes=None)
        view = source.view
        if view is None or prod(shape) != prod(view.shape) or not is_row_major(view.shape, view.strides):
            return None
        return _viewed(source.stored, replace(view, shape=shape, strides=_row_major_strides(shape)), None)

    def _compute(self, node: ProgramNode) -> bool:
        """Whether the node quantizes or dequantizes what is stored."""
        source = self._source(node)
        if source is None or source.weight is not None:
            return False
        try:
            with located(tensor=source.stored):
                made = self._made(node, source)
        except NotStored:
            if node.operator in DEQUANTIZE and source.view is not None and is_integer(source.view.dtype.numpy):
                self.unresolved[source.stored] = f"{shortened(node.operator)} gets its scale when the program runs"
            return False
        if made is None:
            return False
        self._set(node.outputs[0], made)
        return True

    def _made(self, node: ProgramNode, source: _Value) -> _Value | None:
        call = Call(node, self.views, self.limits)
        inputs = (self._identity(value) for _, value in node.inputs[1:])
        # numbered: a key made of the keys before it would be twice as long with each node that takes two of them
        key = self.keys.setdefault((node.operator, node.overload, source.key, *inputs), ("", len(self.keys)))
        parts = source.parts | {self.values[name].stored for _, _, name in node.references() if name in self.views}
        stored = None if source.view is None else tensor_of(source.stored, source.view)
        given = source.codes if stored is None else stored
        if given is None:
            return None
        if is_float(given.dtype) and node.operator in QUANTIZE:
            codes = codes_of(call, QUANTIZE[node.operator], given)
            return _Value(source.stored, key, None, codes=codes, parts=parts)
        weight = self.weights.get(key)
        if weight is None:
            made = self._decoded(call, given)
            if made is None:
                return None
            self.limits.take(sum(data.nbytes for data in made.stored()), source.stored)
            weight = ProgramWeight(source.stored, made)
        self.weights[key] = self.decoded[node.outputs[0]] = weight
        self.consumed |= parts
        return _Value(source.stored, key, tuple(range(len(weight.tensor.shape))), weight=weight)

    def _decoded(self, call: Call, given: Tensor) -> Tensor | None:
        """The weight that a node makes of codes or floats; None where it makes none."""
        operator = call.node.operator
        if is_float(given.dtype) and operator in FAKE_QUANTIZE:
            return rounded(call, FAKE_QUANTIZE[operator], given)
        if is_integer(given.dtype) and operator in DEQUANTIZE:
            return decoded(call, DEQUANTIZE[operator], given)
        return None

    def _identity(self, value: Any) -> Any:
        found = self.values.get(value.name) if isinstance(value, Ref) else None
        return found.key if found is not None else value

    def _use(self, node: ProgramNode) -> None:
        for position, name, reference in node.references():
            value = self.values.get(reference)
            weight = None if value is None else self._user(value)
            if value is None or weight is None:
                continue
            if node.operator in _CASTING and value.view is not None and _looks_like_codes(value.view):
                self.unresolved[value.stored] = "the program decodes it by its own arithmetic (run_decompositions)"
            activation = result = None
            if position > 0 and node.outputs:
                first = node.inputs[0][1]
                activation = self.activations.get(first.name) if isinstance(first, Ref) else None
                result = self.results.get(node.outputs[0])
            use = input_of(node, name).use(node.operator, position, value.axes)
            weight.uses.append(replace(use, activation=activation, result=result))
            parameter = PARAMETER_NAMES.get((node.operator, name), name)
            if parameter in ("weight", "bias"):
                weight.users.append(f"{node.module}.{parameter}" if node.module else parameter)

    def _user(self, value: _Value) -> ProgramWeight | None:
        """The weight that a value is, or else the stored tensor that it is a view of; None where that wraps others."""
        if value.weight is not None:
            return value.weight
        whole = self.whole.get(value.stored)
        if whole is not None and value.stored not in self.plain:
            self.plain[value.stored] = ProgramWeight(value.stored, tensor_of(value.stored, whole))
        return self.plain.get(value.stored)


def _viewed(name: str, view: StridedTensor, axes: tuple[int, ...] | None) -> _Value:
    return _Value(name, (name, id(view.storage), view.offset, view.shape, view.strides), axes, view)


def _keeps(node: ProgramNode, source: _Value) -> bool:
    """Whether a cast changes nothing that matters here: elements of a stored tensor, that is."""
    if source.view is None:
        return source.weight is not None
    dtype = node.argument("dtype")
    return node.operator != "aten.type_as" and (dtype is None or dtype == source.view.dtype)


def _looks_like_codes(view: StridedTensor) -> bool:
    return view.dtype.numpy.itemsize == 1 and is_integer(view.dtype.numpy) and len(view.shape) > 1


def _reordered(node: ProgramNode, source: _Value) -> _Value | None:
    if source.codes is not None:
        return None
    rank = len(source.weight.tensor.shape if source.weight is not None else source.view.shape if source.view else ())
    order = list(range(rank))
    if node.operator == "aten.permute":
        given = node.argument("dims")
        axes = [axis % rank for axis in given if type(axis) is int] if isinstance(given, tuple) and rank else []
        if sorted(axes) != order:
            return None
        order = axes
    else:
        a, b = (0, -1) if node.operator == "aten.t" else (node.argument("dim0"), node.argument("dim1"))
        if type(a) is not int or type(b) is not int or not (-rank <= a < rank and -rank <= b < rank):
            return None
        order[a], order[b] = order[b], order[a]
    axes_left = None if source.axes is None else tuple(source.axes[axis] for axis in order)
    if source.view is None:
        return replace(source, axes=axes_left)
    shape, strides = (tuple(values[axis] for axis in order) for values in (source.view.shape, source.view.strides))
    return _viewed(source.stored, replace(source.view, shape=shape, strides=strides), axes_left)


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _activation(program: Program, node: ProgramNode) -> Activation | None:
    """The quantized tensor that a quantize_per_tensor node gives, where its parameters and its shape are known."""
    scale, zero_point, *limits = (node.argument(name) for name in ("scale", "zero_point", "quant_min", "quant_max"))
    found = program.types.get(node.outputs[0]) if node.outputs else None
    shape = tuple(size for size in found.shape if isinstance(size, int)) if found is not None else ()
    if found is None or len(shape) != len(found.shape) or not isinstance(node.argument("dtype"), TorchDtype):
        return None
    if type(scale) is not float or any(type(v) is not int for v in (zero_point, *limits)) or limits[0] > limits[1]:
        return None
    held = node.argument("dtype").numpy
    if held.kind not in "iu" or not all(in_range(limit, held) for limit in limits):
        return None
    return Activation(dtype_for(*limits), shape, scale, zero_point)


def _activations(program: Program) -> tuple[dict[str, Activation], dict[str, Activation]]:
    """Activations by the values that they are dequantized to, and by those that they are quantized from."""
    given: dict[str, Activation] = {}
    taken: dict[str, Activation] = {}
    codes: dict[str, Activation] = {}
    for node in program.nodes:
        first = node.inputs[0][1] if node.inputs else None
        if not isinstance(first, Ref) or not node.outputs:
            continue
        if node.operator == "quantized_decomposed.quantize_per_tensor":
            found = _activation(program, node)
            if found is not None:
                codes[node.outputs[0]] = taken[first.name] = found
        elif node.operator == "quantized_decomposed.dequantize_per_tensor" and first.name in codes:
            given[node.outputs[0]] = codes[first.name]
    return given, taken
