"""A program as a graph of PyTorch again, for PyTorch's own exporter to ONNX.

torch.export.load unpickles sample inputs, evaluates the expressions of open sizes as Python, and looks operators up by
any dotted name. None of that is done here: the graph is rebuilt of what `formats.pytorch.exported.program` has read, of
operators in a few known namespaces, and its weights become inputs, so that PyTorch gets none of their bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from nibblecast.converters.arithmetic.dtypes import FLOAT32
from nibblecast.converters.errors import CorruptFile, MissingDependency, Unsupported, brief
from nibblecast.converters.ir import Tensor
from nibblecast.converters.metadata import Port
from nibblecast.formats.pytorch.exported.program import Opaque, Program, ProgramNode, Ref
from nibblecast.formats.pytorch.exported.quantize_operators import DEQUANTIZE, QUANTIZE
from nibblecast.formats.pytorch.pickle.records import TorchDtype, shortened

_NAMESPACES = frozenset({"aten", "prims", "quantized_decomposed", "torchao"})
#: Operators that reach beyond their inputs.
_REFUSED = frozenset({"aten.from_file", "aten._print"})
_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
)
_SMALLEST_OPEN_SIZE = 3  # PyTorch takes 0 and 1 for fixed


@dataclass(frozen=True, slots=True, eq=False)
class Rebuilt:
    """A module of torch.fx, what it is exported with, and the tensors that its inputs after the program's own are."""

    module: Any
    examples: tuple[Any, ...]
    shapes: tuple[Any, ...]
    weights: Sequence[Tensor]


def rebuilt(program: Program, weights: Mapping[str, Tensor], *, without_quantized_activations: bool) -> Rebuilt:
    """The graph of a program; `weights` are the values of it that are tensors of the model, decoded if these are
    quantized. Raises Unsupported for what the exporter cannot be given: operators of other namespaces, graphs below
    operators, state that changes; CorruptFile where values are taken that nothing computes."""
    changed = program.results - {port.name for port in program.outputs} - {""}
    if changed:
        raise Unsupported(f"changes state as it runs ({brief(min(changed))}), which an ONNX graph cannot: {_ALONE}")
    return _FxBuilder(program, weights, _skipped(program) if without_quantized_activations else {}).build()


_ALONE = "take the weights alone with --opt graph=false"


def _skipped(program: Program) -> dict[str, str]:
    """What activations are before they are quantized, by the values that they are dequantized to."""
    floats: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for node in program.nodes:
        first = node.inputs[0][1] if node.inputs else None
        if not isinstance(first, Ref) or not node.outputs:
            continue
        if node.operator in QUANTIZE:
            floats[node.outputs[0]] = first.name
        elif node.operator in DEQUANTIZE and first.name in floats:
            skipped[node.outputs[0]] = floats[first.name]
    return skipped


@dataclass(slots=True)
class _FxBuilder:
    program: Program
    tensors: Mapping[str, Tensor]
    skipped: Mapping[str, str]
    torch: Any = field(default_factory=lambda: import_module("torch"))
    graph: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    dims: dict[str, Any] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)

    def build(self) -> Rebuilt:
        torch = self.torch
        import_module("torch.ao.quantization.fx._decomposed")  # makes its operators known
        self.graph = torch.fx.Graph()
        examples: list[Any] = []
        shapes: list[Any] = []
        for port in self.program.inputs:
            self.values[port.name] = self.graph.placeholder(_identifier(port.name, len(examples)))
            examples.append(self._example(port))
            shapes.append(self._open_axes(port))
        nodes, needed = self._live()
        weights: dict[int, tuple[Tensor, Any]] = {}
        for name, tensor in self.tensors.items():
            if name in needed:
                if id(tensor) not in weights:
                    weights[id(tensor)] = (tensor, self.graph.placeholder(f"weight_{len(weights)}"))
                    examples.append(self._weight(tensor))
                    shapes.append(None)
                self.values[name] = weights[id(tensor)][1]
        self.state = {name: tensor.name for name, tensor in self.tensors.items()}
        for name in needed & self.tensors.keys():
            self._round(name)
        for node in nodes:
            self._call(node)
        self.graph.output(tuple(self._value(port.name) for port in self.program.outputs))
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph).eval()
        return Rebuilt(module, tuple(examples), tuple(shapes), [tensor for tensor, _ in weights.values()])

    def _resolved(self, name: str) -> str:
        for _ in range(len(self.skipped) + 1):
            if name in self.tensors or name not in self.skipped:
                break
            name = self.skipped[name]
        return name

    def _live(self) -> tuple[list[ProgramNode], set[str]]:
        """The nodes that something comes of, and the values that are taken."""
        needed = {self._resolved(port.name) for port in self.program.outputs}
        live = []
        for node in reversed(self.program.nodes):
            in_place = node.operator.endswith("_") and not node.operator.endswith("__")
            if self.tensors.keys() & set(node.outputs) or not (in_place or needed & set(node.outputs)):
                continue
            live.append(node)
            needed.update(self._resolved(name) for _, _, name in node.references())
        return live[::-1], needed

    def _type(self, port: Port) -> tuple[Any, tuple[int | str, ...]]:
        if port.shape is None or not port.dtype:
            raise Unsupported(f"its input {brief(port.name)} is not a tensor of a known dtype: {_ALONE}")
        return getattr(self.torch, port.dtype), port.shape

    def _example(self, port: Port) -> Any:
        dtype, shape = self._type(port)
        return self.torch.zeros((), dtype=dtype).expand(tuple(self._size(size) for size in shape))

    def _size(self, size: int | str) -> int:
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            low, high = self.program.ranges.get(size, (0, None))
            wanted = max(low, _SMALLEST_OPEN_SIZE + 2 * len(self.sizes))
            self.sizes[size] = wanted if high is None else min(wanted, high)
        return self.sizes[size]

    def _open_axes(self, port: Port) -> dict[int, Any] | None:
        _, shape = self._type(port)
        return {axis: self._dim(size) for axis, size in enumerate(shape) if isinstance(size, str)} or None

    def _dim(self, name: str) -> Any:
        dim = self.torch.export.Dim
        if not name.isidentifier():
            return dim.AUTO
        if name not in self.dims:
            low, high = self.program.ranges.get(name, (0, None))
            self.dims[name] = dim(name, min=max(low, 0), max=high)
        return self.dims[name]

    def _weight(self, tensor: Tensor) -> Any:
        """A stand-in for a tensor: of its shape, and of no size in memory."""
        name = "float32" if tensor.quantization is not None else tensor.dtype.name
        dtype = getattr(self.torch, name, None)
        if dtype is None:
            raise Unsupported(f"is of {tensor.dtype}, which PyTorch has not", tensor=tensor.name)
        return self.torch.zeros((), dtype=dtype).expand(tensor.shape)

    def _round(self, name: str) -> None:
        """Decoded weights are float32; the program may have them in another dtype."""
        found = self.program.types.get(name)
        if self.tensors[name].quantization is None or found is None or found.dtype is None:
            return
        if found.dtype.numpy != FLOAT32:
            dtype = getattr(self.torch, found.dtype.name)
            self.values[name] = self.graph.call_function(self.torch.ops.aten.to.dtype, (self.values[name], dtype))

    def _call(self, node: ProgramNode) -> None:
        if node.operator in _ARITHMETIC:
            function = getattr(operator, node.operator.partition(".")[2])
            self.values[_first(node)] = self.graph.call_function(function, tuple(self._positional(node)))
            return
        overload = self._overload(node)
        self._refuse_changes(node, overload)
        arguments, keywords = self._arguments(node, overload)
        made = self.graph.call_function(overload, tuple(arguments), keywords)
        returns = overload._schema.returns  # noqa: SLF001
        if len(returns) == 1 and returns[0].type.kind() != "ListType":
            self.values[_first(node)] = made
            return
        for position, name in enumerate(node.outputs):
            if name:
                self.values[name] = self.graph.call_function(operator.getitem, (made, position))

    def _refuse_changes(self, node: ProgramNode, overload: Any) -> None:
        """Raises Unsupported where the node writes to a stored tensor, or to a view of one."""
        schema = overload._schema  # noqa: SLF001
        for argument in schema.arguments:
            value = node.argument(argument.name)
            name = self.state.get(value.name) if isinstance(value, Ref) else None
            if name is None or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                raise Unsupported(f"is changed as the program runs, which an ONNX graph cannot: {_ALONE}", tensor=name)
            self.state |= dict.fromkeys(node.outputs, name)

    def _overload(self, node: ProgramNode) -> Any:
        namespace, _, name = node.operator.partition(".")
        if namespace == "torchao":
            try:
                import_module("torchao")
            except ImportError:
                named = shortened(node.operator)
                raise MissingDependency(
                    f"computes with {named}, an operator of torchao: pip install torchao, or {_ALONE}"
                ) from None
        if namespace not in _NAMESPACES or node.operator in _REFUSED or not name.isidentifier() or name[:2] == "__":
            raise Unsupported(f"computes with {shortened(node.operator)}, which is not converted to ONNX: {_ALONE}")
        packet = getattr(getattr(self.torch.ops, namespace), name, None)
        overload = node.overload or "default"
        found = getattr(packet, overload, None) if overload.isidentifier() and overload[:2] != "__" else None
        if not isinstance(found, type(self.torch.ops.aten.relu.default)):
            named = shortened(f"{node.operator}.{overload}")
            raise Unsupported(f"computes with {named}, which PyTorch does not know: {_ALONE}")
        return found

    def _arguments(self, node: ProgramNode, overload: Any) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments, up to the last that is given, and those that only have names."""
        given = {name: self._argument(value) for name, value in node.inputs}
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        count = 0
        for argument in overload._schema.arguments:  # noqa: SLF001
            if argument.kwarg_only:
                if argument.name in given:
                    keywords[argument.name] = given[argument.name]
                continue
            if argument.name in given:
                count = len(arguments) + 1
            elif not argument.has_default_value():
                raise CorruptFile(f"calls {shortened(node.operator)} without its {argument.name}: it is damaged")
            arguments.append(given.get(argument.name, argument.default_value))
        return arguments[:count], keywords

    def _positional(self, node: ProgramNode) -> Iterator[Any]:
        for _, value in node.inputs:
            yield self._argument(value)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._value(value.name)
        if isinstance(value, tuple):
            return [self._argument(v) for v in value]
        if isinstance(value, TorchDtype):
            return getattr(self.torch, value.name)
        if isinstance(value, Opaque):
            raise Unsupported(f"has an argument {brief(value.kind)}, which is not converted to ONNX: {_ALONE}")
        return value

    def _value(self, name: str) -> Any:
        resolved = self._resolved(name)
        if resolved not in self.values:
            raise CorruptFile(f"takes the value {brief(name)}, which nothing computes: it is damaged")
        return self.values[resolved]


def _first(node: ProgramNode) -> str:
    if not node.outputs:
        raise CorruptFile(f"calls {shortened(node.operator)} for nothing: it is damaged")
    return node.outputs[0]


def _identifier(name: str, position: int) -> str:
    return name if name.isidentifier() else f"input_{position}"
