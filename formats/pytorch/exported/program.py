"""The graph of an exported program, as its JSON has it: which values are stored tensors, and what is done with them.

torch 2.13, torch/_export/serde/schema.py (ExportedProgram, 8.20), and the same file of torch 2.1 for signatures that
are dictionaries. Everything that is read here is checked for its type; graphs below operators (of torch.cond, say) are
counted and not followed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.metadata import Port
from nibblecast.formats.pytorch.pickle.dtypes import DTYPES
from nibblecast.formats.pytorch.pickle.records import TorchDtype, shortened

#: schema.ScalarType
_SCALAR_TYPES: Mapping[int, str] = {
    **dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32"), 1)),
    **dict(enumerate(("complex64", "complex128", "bool", "bfloat16"), 10)),
    **dict(enumerate(("uint16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 28)),
    **dict(enumerate(("float8_e8m0fnu", "uint32", "uint64"), 33)),
}
_SYMBOL = re.compile(r"(?:Symbol\('(\w+)'[^()]*\))|(\w+)")
_LARGEST_SIZE = 1 << 62
_DEEPEST = 16  # arguments of operators in arguments, graphs in graphs


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the graph, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """An input of a kind that means nothing here."""

    kind: str


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a tensor without its elements; sizes that are open are names, or empty."""

    dtype: TorchDtype | None
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ProgramNode:
    """One call of an operator: "aten.conv2d", "input" for its overload. Inputs are named as in its schema: numbers,
    texts, dtypes, tuples of these, None (devices and memory layouts too), `Ref`s, or `Opaque`. Outputs that nothing is
    called are empty. `module` is the path of the module that called it."""

    operator: str
    overload: str
    inputs: tuple[tuple[str, Any], ...]
    outputs: tuple[str, ...]
    module: str
    inner: tuple[str, ...] = ()

    def argument(self, name: str, default: Any = None) -> Any:
        """The input of that name."""
        return next((value for key, value in self.inputs if key == name), default)

    def references(self) -> Iterator[tuple[int, str, str]]:
        """Position, name and value of each input that is a value of the graph, or has some."""
        for position, (name, value) in enumerate(self.inputs):
            for reference in value if isinstance(value, tuple) else (value,):
                if isinstance(reference, Ref):
                    yield position, name, reference.name


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A graph: `stored` gives the stored tensor's name for each value that is one, `results` are the values that come
    out, state that is changed included, `ranges` the least and the largest value of the names in shapes."""

    nodes: tuple[ProgramNode, ...]
    stored: Mapping[str, str]
    types: Mapping[str, TensorType]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    results: frozenset[str]
    producer: str
    opsets: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    def operators(self) -> Mapping[str, int]:
        """How often each operator is called, in graphs below operators too."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            for operator in (node.operator, *node.inner):
                counts[operator] = counts.get(operator, 0) + 1
        return counts


def program_of(text: bytes) -> Program:
    """The program of a JSON document. Raises CorruptFile where it is damaged."""
    document = json_object(text, "its program")
    module = entries(document.get("graph_module"), "graph_module")
    graph = entries(module.get("graph"), "graph")
    types = {name: _type(value) for name, value in entries(graph.get("tensor_values"), "tensor_values").items()}
    stored, inputs, outputs, results = _signature(entries(module.get("signature"), "signature"))
    nodes = tuple(_node(value) for value in items(graph.get("nodes"), "nodes"))
    opsets = {
        name: count(value, "opset") for name, value in entries(document.get("opset_version", {}), "opsets").items()
    }
    version = document.get("torch_version", "")
    return Program(
        nodes,
        stored,
        types,
        tuple(_port(name, types) for name in inputs),
        tuple(_port(name, types) for name in outputs),
        results,
        f"torch {shortened(text_of(version, 'torch_version'))}".strip(),
        opsets,
        _ranges(document.get("range_constraints", {})),
    )


def entries(value: Any, what: str) -> dict[str, Any]:
    """`value`, which must be an object of JSON."""
    if not isinstance(value, dict):
        raise CorruptFile(f"has no object for {shortened(what)}, but {brief(value)}: it is damaged")
    return value


def items(value: Any, what: str) -> list[Any]:
    """`value`, which must be an array of JSON."""
    if not isinstance(value, list):
        raise CorruptFile(f"has no array for {shortened(what)}, but {brief(value)}: it is damaged")
    return value


def text_of(value: Any, what: str) -> str:
    """`value`, which must be a string."""
    if not isinstance(value, str):
        raise CorruptFile(f"has no text for {shortened(what)}, but {brief(value)}: it is damaged")
    return value


def count(value: Any, what: str) -> int:
    """`value`, which must be an integer that is not negative."""
    if not _is_size(value) or value < 0:
        raise CorruptFile(f"has no count for {shortened(what)}, but {brief(value)}: it is damaged")
    return value


def dtype_of(value: Any) -> TorchDtype:
    """What a number of schema.ScalarType stands for. Raises Unsupported where it is not known here."""
    name = _SCALAR_TYPES.get(value, "") if type(value) is int else ""
    if name not in DTYPES:
        raise Unsupported(f"has a tensor of ScalarType {brief(value)} {name}, which is not supported")
    return DTYPES[name]


def fixed_sizes(value: Any, what: str) -> tuple[int, ...]:
    """Sizes or strides of a stored tensor, none of which may be open."""
    return tuple(fixed_size(size, what) for size in items(value, what))


def fixed_size(value: Any, what: str) -> int:
    """A number that is no expression."""
    return count(entries(value, what).get("as_int"), what)


def _type(value: Any) -> TensorType:
    meta = entries(value, "tensor_values")
    meta = entries(meta.get("meta", meta), "tensor_values")  # torch 2.1 wraps it once more
    kind = meta.get("dtype")
    name = _SCALAR_TYPES.get(kind, "") if type(kind) is int else ""
    return TensorType(DTYPES.get(name), tuple(_size(size) for size in items(meta.get("sizes"), "sizes")))


def _size(value: Any) -> int | str:
    size = entries(value, "sizes")
    if "as_int" in size:
        return count(size["as_int"], "sizes")
    found = _SYMBOL.fullmatch(text_of(entries(size.get("as_expr"), "sizes").get("expr_str"), "sizes"))
    return (found[1] or found[2]) if found else ""


def _port(name: str, types: Mapping[str, TensorType]) -> Port:
    found = types.get(name)
    return Port(name, "", None) if found is None else Port(name, found.dtype.name if found.dtype else "", found.shape)


def _node(value: Any, depth: int = 0) -> ProgramNode:
    node = entries(value, "nodes")
    target = text_of(node.get("target"), "target").removeprefix("torch.ops.")
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    inner: list[str] = []
    inputs = []
    for given in items(node.get("inputs"), "inputs"):
        argument = entries(given, "inputs")
        inputs.append((text_of(argument.get("name", ""), "name"), _argument(argument.get("arg"), inner, depth)))
    outputs: list[str] = []
    for output in items(node.get("outputs"), "outputs"):
        found = _argument(output, inner, depth)
        outputs += [v.name if isinstance(v, Ref) else "" for v in (found if isinstance(found, tuple) else (found,))]
    stack = text_of(entries(node.get("metadata", {}), "metadata").get("nn_module_stack", ""), "nn_module_stack")
    # each module is key, path, type
    path = [*stack.rpartition(";")[2].split(","), "", ""][1]
    return ProgramNode(
        f"{namespace}.{name}" if name else namespace, overload, tuple(inputs), tuple(outputs), path, tuple(inner)
    )


def _argument(value: Any, inner: list[str], depth: int = 0) -> Any:
    """The value of schema.Argument, a union of one key; operators of graphs in it are added to `inner`."""
    if depth > _DEEPEST:
        raise CorruptFile(f"nests its arguments more than {_DEEPEST} deep: it may be an attack")
    union = entries(value, "arg")
    if len(union) != 1:
        raise CorruptFile(f"has an argument of {len(union)} kinds: it is damaged")
    ((kind, content),) = union.items()
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
        return _reference(content, inner, depth)
    if kind in ("as_int", "as_bool", "as_string"):
        return content if isinstance(content, int | str) else Opaque(kind)
    if kind == "as_float":
        return _float(content)
    if kind in ("as_ints", "as_bools", "as_strings"):
        return tuple(v if isinstance(v, int | str) else Opaque(kind) for v in items(content, kind))
    if kind == "as_floats":
        return tuple(_float(v) for v in items(content, kind))
    if kind in ("as_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
        return tuple(_reference(v, inner, depth) for v in items(content, kind))
    if kind == "as_scalar_type":
        name = _SCALAR_TYPES.get(content, "") if type(content) is int else ""
        return DTYPES.get(name, Opaque(kind))
    if kind in ("as_none", "as_device", "as_layout", "as_memory_format"):
        return None
    return (*_inner_references(kind, content, inner, depth), Opaque(kind))


def _inner_references(kind: str, content: Any, inner: list[str], depth: int) -> list[Ref]:
    """The values in an argument whose structure is of no use here."""
    if kind == "as_nested_tensors":
        found = [_reference(v, inner, depth) for row in items(content, kind) for v in items(row, kind)]
        return [v for v in found if isinstance(v, Ref)]
    if kind == "as_string_to_argument":
        return [Ref(name) for v in entries(content, kind).values() for name in _names(_argument(v, inner, depth + 1))]
    if kind == "as_graph":
        graph = entries(entries(content, kind).get("graph"), kind)
        for node in (_node(value, depth + 1) for value in items(graph.get("nodes"), "nodes")):
            inner += [node.operator, *node.inner]
    return []


def _float(value: Any) -> Any:
    """A number; JSON's texts for those that it has not."""
    if isinstance(value, str):
        return {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}.get(value, Opaque("as_float"))
    return value if isinstance(value, int | float) else Opaque("as_float")


def _ranges(value: Any) -> dict[str, tuple[int, int | None]]:
    ranges: dict[str, tuple[int, int | None]] = {}
    for name, found in entries(value, "range_constraints").items():
        limits = found if isinstance(found, dict) else {}
        low, high = limits.get("min_val"), limits.get("max_val")
        ranges[name] = (low if _is_size(low) else 0, high if _is_size(high) else None)
    return ranges


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) < _LARGEST_SIZE


def _reference(value: Any, inner: list[str], depth: int = 0) -> Any:
    """A name, or one of the two unions that are a name or a value: {"as_tensor": …} and {"as_name": …}."""
    content = entries(value, "argument")
    if "name" in content:
        return Ref(text_of(content["name"], "name"))
    if "as_name" in content:
        return Ref(text_of(content["as_name"], "as_name"))
    if "as_tensor" in content:
        return Ref(text_of(entries(content["as_tensor"], "as_tensor").get("name"), "name"))
    return _argument(content, inner, depth + 1)


def _names(value: Any) -> list[str]:
    return [v.name for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Ref)]


def _signature(signature: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str], frozenset[str]]:
    """Stored tensors by value; the user's inputs and outputs; all results."""
    stored: dict[str, str] = {}
    if "inputs_to_parameters" in signature:  # torch 2.1
        for key in ("inputs_to_parameters", "inputs_to_buffers"):
            stored |= {k: text_of(v, key) for k, v in entries(signature.get(key), key).items()}
        inputs, outputs = (
            [text_of(v, key) for v in items(signature.get(key), key)] for key in ("user_inputs", "user_outputs")
        )
        changed = entries(signature.get("buffers_to_mutate", {}), "buffers_to_mutate")
        return stored, inputs, outputs, frozenset((*outputs, *changed))
    inputs = []
    for value in items(signature.get("input_specs"), "input_specs"):
        for kind, spec in entries(value, "input_specs").items():
            content = entries(spec, kind)
            names = _spec_names(content)
            if kind in ("parameter", "buffer", "tensor_constant"):
                stored |= dict.fromkeys(names, text_of(content.get(f"{kind}_name"), kind))
            elif kind == "user_input":
                inputs += names
    outputs, results = [], []
    for value in items(signature.get("output_specs"), "output_specs"):
        for kind, spec in entries(value, "output_specs").items():
            names = _spec_names(entries(spec, kind))
            results += names
            if kind in ("user_output", "loss_output"):
                outputs += names
    return stored, inputs, outputs, frozenset(results)


def _spec_names(spec: dict[str, Any]) -> list[str]:
    argument = entries(spec.get("arg", {}), "arg")
    return _names(_reference(argument, [])) if argument and "as_graph" not in argument else []
