"""One TFLite subgraph on its way into an ONNX graph: its tensors as ONNX values, and the nodes of lowering functions.

Every quantized tensor is computed as floats, and others in their own dtype. Where TFLite holds a tensor as quantized
integers, QuantizeLinear and DequantizeLinear round the floats to its codes. The alternative was ONNX's integer
operators (QLinearConv and others). They exist for a few operators only, without 4-bit weights, and round differently
from TFLite's kernels. With floats inside, each lowering is written once for all dtypes, and runtimes fuse the pairs
into integer kernels themselves.

TFLite's images are channels last, ONNX's channels first. Transposing around each convolution would be simpler, but
slow. So images stay as they are until an operator needs them channels first, and then stay channels first for as long
as the operators allow it. Few Transpose nodes are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32, INT8, INT16, INT32, UINT8, code_range
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.ir import Tensor, WeightPlace
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.tflite.options import Options

#: Permutations of images with 3, 4 and 5 axes from channels last to channels first, and back.
TO_FIRST: Mapping[int, tuple[int, ...]] = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}
TO_LAST: Mapping[int, tuple[int, ...]] = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}

_QUANTIZED = frozenset((INT8, UINT8, INT16, INT32))
_INT16_SINCE = 21
_DESCRIBED = "its graph needs constants or nodes that its sizes describe"
#: About how many bytes a node of a repeated subgraph costs, and an element of a list, with all objects made on the way.
_NODE_BYTES, _LISTED_BYTES = 1 << 14, 32
#: The longest key of a shared constant, and the most bytes that such a constant has.
_LONGEST_KEY, _SHARED_BYTES = 200, 100
_ONNX_TYPES = {np.dtype(t): ir.DataType.from_numpy(np.dtype(t)) for t in (np.float32, np.float16, np.float64)}


@dataclass(frozen=True, slots=True, eq=False)
class TensorInfo:
    """A tensor of a subgraph. `scale` and `zero_point` are given if it is quantized as a whole. `constant` is the
    model's tensor if its values are known."""

    name: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float | None
    zero_point: int
    constant: Tensor | None
    is_variable: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the file leaves any size open."""
        return any(size < 0 for size in self.signature)

    @property
    def is_quantized(self) -> bool:
        """Whether it is computed at run time and held as integers that stand for floats."""
        return self.scale is not None and self.dtype in _QUANTIZED and self.constant is None


@dataclass(frozen=True, slots=True, eq=False)
class OperatorCall:
    """An operator with the indices of its tensors, -1 for absent ones. `intermediates` are tensors whose scales an
    integer kernel uses to round intermediate results. `custom_options` are a custom operator's, in its own encoding."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Options
    intermediates: tuple[int, ...] = ()
    custom_options: bytes = b""

    def input(self, position: int) -> int:
        """The index of an input; -1 if it is absent."""
        return self.inputs[position] if position < len(self.inputs) else -1


#: Operators whose output holds only elements of their first input.
_MOVING = frozenset({"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def _reshaped_once(value: ir.Value | None, shape: ir.Value | None) -> list[ir.Value | None]:
    """The inputs of a Reshape. A Reshape before it is skipped, because only the last shape counts, unless that has
    zeros, which stand for sizes of the input."""
    node = None if value is None else value.producer()
    sizes = None if shape is None else shape.const_value
    if node is None or node.op_type != "Reshape" or sizes is None or not sizes.numpy().all():
        return [value, shape]
    return [node.inputs[0], shape]


@dataclass(slots=True)
class Held:
    """The ONNX values of a tensor, each if it exists: as TFLite has it, channels first, and its integer codes."""

    last: ir.Value | None = None
    first: ir.Value | None = None
    codes: ir.Value | None = None


@dataclass(slots=True)
class GraphBuilder:
    """Collects nodes and initializers. `places` says which initializers are the model's weights. `allowance` limits
    what is made of sizes alone. `is_repeated` marks a subgraph that was lowered before. `origins` has the nodes that
    made moved values, `copied` the names of weights that already are initializers."""

    tensors: list[TensorInfo]
    opset: int
    names: UniqueNames
    allowance: Allowance
    nodes: list[ir.Node] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    places: dict[str, WeightPlace] = field(default_factory=dict)
    outer: GraphBuilder | None = None
    shared: dict[str, ir.Value] = field(default_factory=dict)
    variables: list[ir.Value] = field(default_factory=list)
    assigned: dict[int, ir.Value] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    handles: dict[int, str] = field(default_factory=dict)
    resources: dict[str, ir.Value] = field(default_factory=dict)
    custom_domain: str = ""
    uses_custom: bool = False
    run_subgraph: Callable[[GraphBuilder, int, Sequence[ir.Value]], list[ir.Value]] = field(kw_only=True)
    is_repeated: bool = False
    origins: dict[ir.Value, ir.Node | None] = field(default_factory=dict)
    copied: set[str] = field(default_factory=set)

    def fresh(self, wanted: str) -> str:
        """A name that no value has yet."""
        return self.names.fresh(wanted)

    def emit(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        /,
        *,
        name: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node and returns its first output; `name` is the preferred name of that output."""
        return self.emit_all(operator, inputs, name=name, outputs=outputs, **attributes)[0]

    def emit_all(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        /,
        *,
        name: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Adds a node and returns its outputs."""
        if self.is_repeated:
            self.spend(_NODE_BYTES)
        made = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items() if value is not None]
        if operator == "Reshape":
            inputs = _reshaped_once(*inputs)
        node = ir.Node("", operator, inputs, made, num_outputs=outputs)
        for value in node.outputs:
            value.name = self.fresh(name or operator.lower())
        node.name = node.outputs[0].name
        self.nodes.append(node)
        return node.outputs

    def spend(self, nbytes: int) -> None:
        """Counts bytes made of sizes alone or from the same bytes again. Raises Unsupported beyond the allowance."""
        self.root.allowance.spend(nbytes, _DESCRIBED)

    def computed(self, nbytes: int, make: Callable[[], NDArray[Any]], name: str) -> ir.Value:
        """An initializer of `nbytes` bytes, which are counted before they are made."""
        self.root.allowance.rest().spend(nbytes, _DESCRIBED)
        return self.constant(make(), name=name)

    def constant(self, values: Any, dtype: Any = None, name: str = "constant") -> ir.Value:
        """A small initializer."""
        array = np.asarray(values, dtype)
        key = f"{name}_{array.dtype.name}_{'x'.join(map(str, array.shape))}_"
        key += array.tobytes().hex() if array.nbytes <= _SHARED_BYTES else "x" * _LONGEST_KEY
        known = self.root.shared.get(key) if len(key) < _LONGEST_KEY else None
        if known is not None:
            return known
        self.spend(array.nbytes)
        value = ir.Value(name=self.fresh(name), const_value=ir.tensor(array), type=ir.TensorType(_type_of(array.dtype)))
        value.shape = ir.Shape(array.shape)
        self.root.initializers[value.name or ""] = value
        if len(key) < _LONGEST_KEY:
            self.root.shared[key] = value
        return value

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A list of int64, for shapes, axes and the like."""
        return self.constant(np.asarray(values, np.int64).reshape(-1), name="ints")

    @property
    def root(self) -> GraphBuilder:
        """The builder of the whole model."""
        return self if self.outer is None else self.outer.root

    def run(self, index: int, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Lowers a subgraph in place, with these inputs; returns its outputs."""
        return self.run_subgraph(self, index, values)

    def hold(self, index: int, value: ir.Value, *, first: bool = False) -> None:
        """Sets the value of a tensor, without rounding it."""
        self.held[index] = Held(first=value) if first else Held(last=value)

    def codes(self, index: int, *, first: bool = False) -> ir.Value:
        """The codes of a quantized tensor, as TFLite has it or channels first."""
        held = self._held(index)
        if held.codes is None:
            held.codes = self.quantize(self.read(index), self.info(index), f"{self.info(index).name}_quantized")
        is_first = held.first is not None and held.last is None  # then the codes are channels first as well
        if is_first == first:
            return held.codes
        return self.emit("Transpose", [held.codes], perm=(TO_FIRST if first else TO_LAST)[len(self.info(index).shape)])

    def type_of(self, index: int) -> ir.DataType:
        """The ONNX type that a tensor's values are computed in."""
        info = self.info(index)
        return ir.DataType.FLOAT if info.is_quantized else _type_of(info.dtype)

    def info(self, index: int) -> TensorInfo:
        """What is known about a tensor. Raises Unsupported for an absent input that the operator needs."""
        if index < 0:
            raise Unsupported("an operator lacks an input that it needs")
        return self.tensors[index]

    def numbers(self, index: int) -> NDArray[Any] | None:
        """The stored values of a constant; None if they are known only at run time."""
        constant = self.info(index).constant
        if constant is None:
            return None
        self.spend(constant.nbytes)  # any number of operators may take a large constant
        return constant.numpy()

    def list_of(self, index: int) -> list[int]:
        """The integers of a constant. Raises Unsupported if they are known only at run time."""
        values = self.numbers(index)
        if values is None:
            raise Unsupported(f"an operator takes '{self.info(index).name}', which is known at run time only")
        self.spend(_LISTED_BYTES * values.size)
        return [int(value) for value in values.reshape(-1)]

    def read(self, index: int) -> ir.Value:
        """A tensor's values in TFLite's order of axes."""
        held = self._held(index)
        if held.last is None:
            if held.first is not None:
                rank = len(self.info(index).shape)
                name = f"{self.info(index).name}_channels_last"
                held.last = self.emit("Transpose", [held.first], name=name, perm=TO_LAST[rank])
            else:
                held.last = self.weight(index)
        return held.last

    def read_first(self, index: int) -> ir.Value:
        """A tensor's values, with channels first."""
        held, rank = self._held(index), len(self.info(index).shape)
        if held.first is None:
            if held.last is None and self.info(index).constant is not None:
                held.first = self.weight(index, TO_FIRST[rank])
            else:
                name = f"{self.info(index).name}_channels_first"
                held.first = self.emit("Transpose", [self.read(index)], name=name, perm=TO_FIRST[rank])
        return held.first

    def is_first(self, index: int) -> bool:
        """Whether a tensor exists only with channels first."""
        held = self._held(index)
        return held.first is not None and held.last is None

    def _held(self, index: int) -> Held:
        if index not in self.held:
            self.info(index)
            self.held[index] = Held()
        return self.held[index]

    def weight(self, index: int, permutation: tuple[int, ...] | None = None) -> ir.Value:
        """A constant with its axes permuted. It is an initializer that stands for the model's tensor, decoded if it is
        quantized. Raises Unsupported for a tensor that nothing has computed."""
        info = self.info(index)
        if info.constant is None:
            raise Unsupported(f"'{info.name}' is taken before anything computes it, or holds no numbers")
        tensor, root = info.constant, self.root
        if permutation == tuple(range(len(tensor.shape))):
            permutation = None
        key = f"weight {tensor.name} {permutation}"
        if key in root.shared:
            return root.shared[key]
        is_float = tensor.quantization is not None
        dtype = FLOAT32 if is_float else tensor.dtype
        shape = tensor.shape if permutation is None else tuple(tensor.shape[axis] for axis in permutation)
        if tensor.name in root.copied:  # a second copy, with its axes in another order
            self.spend(prod(shape) * dtype.itemsize)
        root.copied.add(tensor.name)
        name = root.fresh(tensor.name or "weight")
        place = WeightPlace(tensor, permutation)

        def compute() -> ir.Tensor[NDArray[Any]]:
            values = tensor.dequantize(np.float32) if is_float else tensor.numpy()
            return ir.Tensor(values if permutation is None else np.ascontiguousarray(values.transpose(permutation)))

        lazy = ir.LazyTensor(compute, dtype=_type_of(dtype), shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, const_value=lazy, type=ir.TensorType(_type_of(dtype)), shape=ir.Shape(shape))
        root.initializers[name] = value
        root.places[name] = place
        if info.dtype != dtype and info.dtype.kind == "f":  # float16 that DEQUANTIZE widens
            value = self.emit("Cast", [value], to=int(_type_of(info.dtype)))
        root.shared[key] = value
        return value

    def write(self, index: int, value: ir.Value, *, first: bool = False) -> None:
        """Sets the value of a tensor. It is rounded to the tensor's codes if that is quantized and not rounded yet."""
        info = self.info(index)
        held = self.held[index] = Held()
        if info.is_quantized and not self._is_rounded(value, info):
            held.codes = self.quantize(value, info, f"{info.name}_quantized")
            value = self.dequantize(held.codes, info)
        held.first, held.last = (value, None) if first else (None, value)

    def _is_rounded(self, value: ir.Value, info: TensorInfo) -> bool:
        """Whether a value holds only moved elements of a tensor with the same scale and zero point."""
        node = self._origin(value)
        if node is None or node.op_type != "DequantizeLinear" or not self._has_linear(info):
            return False
        return all(a is b for a, b in zip(node.inputs[1:], self._parameters(info), strict=False))

    def _origin(self, value: ir.Value) -> ir.Node | None:
        """The node that made a value before it was moved. It is found once for each value: chains of moves are long."""
        origins, passed = self.root.origins, []
        node = value.producer()
        while node is not None and node.op_type in _MOVING and node.inputs[0] is not None and value not in origins:
            passed.append(value)
            value = node.inputs[0]
            node = value.producer()
        found = origins.get(value, node)
        origins.update(dict.fromkeys(passed, found))
        return found

    def write_codes(self, index: int, codes: ir.Value, *, first: bool = False) -> None:
        """Sets the codes of a quantized tensor."""
        self.hold(index, self.dequantize(codes, self.info(index)), first=first)
        self.held[index].codes = codes

    def quantize(self, value: ir.Value, info: TensorInfo, name: str) -> ir.Value:
        """The codes of floats, with a tensor's scale and zero point."""
        if self._has_linear(info):
            return self.emit("QuantizeLinear", [value, *self._parameters(info)], name=name)
        rounded = self.emit("Round", [self.emit("Div", [value, self._parameters(info)[0]])])
        shifted = self.emit("Add", [rounded, self.constant(np.float32(info.zero_point), name="zero_point")])
        if info.dtype != INT32:
            ends = [self.constant(np.float32(limit), name="limit") for limit in code_range(info.dtype)]
            shifted = self.emit("Clip", [shifted, *ends])
        return self.emit("Cast", [shifted], name=name, to=int(_type_of(info.dtype)))

    def dequantize(self, codes: ir.Value, info: TensorInfo) -> ir.Value:
        """The floats of codes."""
        if self._has_linear(info):
            return self.emit("DequantizeLinear", [codes, *self._parameters(info)], name=info.name)
        numbers = self.emit("Cast", [codes], to=int(ir.DataType.FLOAT))
        if info.zero_point:
            numbers = self.emit("Sub", [numbers, self.constant(np.float32(info.zero_point), name="zero_point")])
        return self.emit("Mul", [numbers, self._parameters(info)[0]], name=info.name)

    def _has_linear(self, info: TensorInfo) -> bool:
        """Whether QuantizeLinear and DequantizeLinear take the tensor's codes. int16 came in a later operator set, and
        QuantizeLinear has no int32."""
        return info.dtype != INT32 and (info.dtype.itemsize == 1 or self.opset >= _INT16_SINCE)

    def _parameters(self, info: TensorInfo) -> tuple[ir.Value, ir.Value]:
        scale = self.constant(np.float32(info.scale), name="scale")
        return scale, self.constant(np.asarray(info.zero_point, info.dtype), name="zero_point")

    def rounded(self, value: ir.Value, index: int) -> ir.Value:
        """A value rounded to the codes of a tensor if that is quantized."""
        if index < 0 or not self.info(index).is_quantized:
            return value
        info = self.info(index)
        return self.dequantize(self.quantize(value, info, f"{info.name}_quantized"), info)

    def reduced(self, operator: str, value: ir.Value, axes: Sequence[int], *, keep: bool = True) -> ir.Value:
        """A reduction along axes. From opset 18 on, the axes are an input."""
        if self.opset >= 18 or operator == "ReduceSum":
            return self.emit(operator, [value, self.ints(axes)], keepdims=int(keep))
        return self.emit(operator, [value], axes=list(axes), keepdims=int(keep))

    def variable(self, index: int) -> ir.Value:
        """The current value of a variable. At first it is a graph input that is zero by default."""
        held = self._held(index)
        if held.last is None:
            held.last = self.root.new_variable(self.info(index))
        return held.last

    def assign(self, index: int, value: ir.Value) -> None:
        """Sets the value of a variable."""
        self.held[index] = Held(last=value)
        self.root.assigned[index] = value

    def new_variable(self, info: TensorInfo) -> ir.Value:
        """A graph input that is zero by default."""
        dtype = FLOAT32 if info.is_quantized else info.dtype
        name = self.fresh(info.name or "state")
        self.spend(prod(checked_shape(info.shape, tensor=info.name)) * dtype.itemsize)
        zeros = ir.tensor(np.zeros(info.shape, dtype))
        value = ir.Value(name=name, const_value=zeros, type=ir.TensorType(_type_of(dtype)), shape=ir.Shape(info.shape))
        self.initializers[name] = value
        self.variables.append(value)
        return value

    def inner(self) -> GraphBuilder:
        """A builder for the body of a Scan, Loop or If, which sees the values around it."""
        return GraphBuilder(
            self.tensors,
            self.opset,
            self.names,
            self.allowance,
            outer=self,
            run_subgraph=self.run_subgraph,
            is_repeated=self.is_repeated,
        )

    def argument(self, name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An input of such a body."""
        return ir.Value(name=self.fresh(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def body(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """The body made of the collected nodes."""
        return ir.Graph(inputs, outputs, nodes=self.nodes, name=self.fresh("body"), opset_imports={"": self.opset})

    def finish(self, operator: OperatorCall, value: ir.Value, *, first: bool = False) -> None:
        """Sets the operator's only result, after its fused activation."""
        code = operator.options.integer("fused_activation")
        self.write(operator.outputs[0], self.activated(value, code), first=first)

    def activated(self, value: ir.Value, code: int) -> ir.Value:
        """A value after a fused activation (schema.fbs, ActivationFunctionType)."""
        if code == 0:
            return value
        if code == 1:
            return self.emit("Relu", [value])
        if code in (2, 3):
            low, high = (-1.0, 1.0) if code == 2 else (0.0, 6.0)
            limits = [self.constant(np.float32(limit), name="limit") for limit in (low, high)]
            return self.emit("Clip", [value, *limits])
        if code == 4:
            return self.emit("Tanh", [value])
        raise Unsupported(f"fused activation {code} is not known")


def _type_of(dtype: np.dtype[Any]) -> ir.DataType:
    return _ONNX_TYPES.get(dtype) or ir.DataType.from_numpy(dtype)
