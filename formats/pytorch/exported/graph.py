"""The graph of an exported program as ONNX, by PyTorch's own exporter (torch.onnx.export, torch 2.13): nothing of
PyTorch is imported until a writer asks for it.

The exporter sees the program with its weights, decoded, as inputs; afterwards these become initializers, which are the
model's tensors. So no weight is read, and none is folded into another.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from nibblecast.converters.errors import Error, MissingDependency, Unsupported, UsageError, brief
from nibblecast.converters.ir import Tensor, WeightPlace
from nibblecast.formats.pytorch.exported.program import Program
from nibblecast.formats.pytorch.exported.to_fx import Rebuilt, rebuilt

if TYPE_CHECKING:
    import onnx_ir as ir

_FIRST_OPSET = 18
#: The limits of ONNX's integer types, by their numbers.
_ONNX_INTEGERS = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767)}
_HINT = "its graph needs PyTorch: pip install 'nibblecast[torch]'"


@dataclass(frozen=True, slots=True, eq=False)
class ExportedGraph:
    """A program; `weights` are its values that are tensors of the model, and `others` those that are stored without
    being among these."""

    program: Program
    weights: Mapping[str, Tensor]
    others: Mapping[str, Tensor]

    @property
    def preferred_opset(self) -> int:
        """The operator set that it is made in unless the weights or the user want another: what PyTorch's exporter
        writes without a version converter."""
        return _FIRST_OPSET

    def onnx_ir(self) -> ir.Model:
        """The graph in ONNX's operators, its weights decoded to floats when they are read."""
        return self.lowered(opset=self.preferred_opset)[0]

    def lowered(
        self,
        *,
        opset: int,
        signature: str = "",
        channels_first: bool = False,
        custom_domain: str = "",
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[ir.Model, Mapping[str, WeightPlace]]:
        """The graph in an operator set of ONNX, and which of its initializers are the model's weights; activations that
        the program quantizes are floats if `weights`, which is what the stages make of the model's, were all
        dequantized. Raises UsageError for options that are for other formats, and for operator sets below 18;
        Unsupported for what the exporter cannot express."""
        if signature or custom_domain:
            raise UsageError("an exported program has neither signatures nor operators that could be in another domain")
        if opset < _FIRST_OPSET:
            raise UsageError(f"opset {opset} cannot be had of PyTorch's exporter: {_FIRST_OPSET} is the first")
        del channels_first  # PyTorch's images are so
        only_floats = weights is not None and self._dequantized(weights)
        with _quiet(), _refusals():
            found = rebuilt(self.program, {**self.others, **self.weights}, without_quantized_activations=only_floats)
            made = _exported(found, opset)
            return _finished(made, found, self.program, frozenset(id(t) for t in self.weights.values()))

    def _dequantized(self, weights: Mapping[str, Tensor]) -> bool:
        read_quantized = {tensor.name for tensor in self.weights.values() if tensor.quantization is not None}
        return any(name in read_quantized for name in weights) and not any(
            tensor.quantization is not None for tensor in weights.values()
        )


@dataclass(frozen=True, slots=True)
class MissingGraph:
    """In the place of a graph that cannot be had: `missing` says what to do."""

    missing: str = _HINT

    def onnx_ir(self) -> ir.Model:
        """Raises MissingDependency."""
        raise MissingDependency(self.missing)


def is_torch_installed() -> bool:
    """Whether there is all that a graph needs; nothing of it is imported."""
    return find_spec("torch") is not None and find_spec("onnxscript") is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch and onnxscript warn of what is no concern of a user's: torchvision that is not there, deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What PyTorch raises is one line, whatever it is: an operator without a translation, a shape that does not fit."""
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise Unsupported(
            f"cannot be exported to ONNX by PyTorch ({type(error).__name__}: {_last_line(error)}): "
            "take the weights alone with --opt graph=false"
        ) from None


def _exported(found: Rebuilt, opset: int) -> ir.Model:
    torch: Any = import_module("torch")
    program = torch.export.export(found.module, found.examples, dynamic_shapes=found.shapes)
    made: ir.Model = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=opset,
        custom_translation_table=_translations(torch),
    ).model
    import_module("onnxscript.optimizer").optimize(made)
    return made


def _last_line(error: Exception) -> str:
    """The innermost cause in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split())[:200]


def _translations(torch: Any) -> dict[Any, Any]:
    """quantize_per_tensor, which the exporter translates without its limits (onnxscript 0.7.2)."""
    ops: Any = import_module("onnxscript.function_libs.torch_lib.ops.quantized_decomposed")
    common: Any = import_module("onnxscript.function_libs.torch_lib.ops.common")
    onnx: Any = import_module("onnxscript.onnx_opset").opset18

    def quantize_per_tensor(
        input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
    ) -> Any:
        codes = ops.quantized_decomposed_quantize_per_tensor(input, scale, zero_point, quant_min, quant_max, dtype)
        if (quant_min, quant_max) == _ONNX_INTEGERS.get(dtype):
            return codes
        return onnx.Clip(codes, common.constant(quant_min, dtype=dtype), common.constant(quant_max, dtype=dtype))

    return {torch.ops.quantized_decomposed.quantize_per_tensor.default: quantize_per_tensor}


def _finished(
    made: ir.Model, found: Rebuilt, program: Program, of_model: frozenset[int]
) -> tuple[ir.Model, Mapping[str, WeightPlace]]:
    """The graph with the names and the weights of the program."""
    graph = made.graph
    count = len(program.inputs)
    if len(graph.inputs) != count + len(found.weights) or len(graph.outputs) != len(program.outputs):
        raise Unsupported("has inputs or outputs that PyTorch's exporter leaves out: take the weights alone")
    _forget_origins(made)
    values = {value.name: value for node in graph.all_nodes() for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    for value, name in (
        *zip(graph.inputs, [*(p.name for p in program.inputs), *(t.name for t in found.weights)], strict=True),
        *((v, p.name) for v, p in zip(graph.outputs, program.outputs, strict=True) if not v.is_graph_input()),
    ):
        _rename(values, value, name)
    _rename_sizes(made, program)
    places: dict[str, WeightPlace] = {}
    stored = list(graph.inputs)[count:]
    del graph.inputs[count:]
    for value, tensor in zip(stored, found.weights, strict=True):
        if not value.uses() and not value.is_graph_output():
            continue
        value.const_value = _lazy(value, tensor)
        graph.register_initializer(value)
        if id(tensor) in of_model:
            places[value.name or ""] = WeightPlace(tensor)
    return made, places


def _lazy(value: ir.Value, tensor: Tensor) -> ir.LazyTensor:
    import onnx_ir as ir

    def compute() -> ir.Tensor[Any]:
        return ir.Tensor(tensor.dequantize(np.float32) if tensor.quantization is not None else tensor.numpy())

    dtype = ir.DataType.FLOAT if tensor.quantization is not None else ir.DataType.from_numpy(tensor.dtype)
    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(tensor.shape), name=value.name)


def _rename(values: dict[str | None, ir.Value], value: ir.Value, name: str) -> None:
    """Gives a value a name; whatever else had it gets another."""
    other = values.pop(name, None)
    values.pop(value.name, None)
    value.name = name
    values[name] = value
    if other is not None and other is not value:
        number = 1
        while f"{name}_{number}" in values:
            number += 1
        other.name = f"{name}_{number}"
        values[other.name] = other


def _rename_sizes(made: ir.Model, program: Program) -> None:
    """PyTorch has named open sizes anew: they get the names that the file has for them."""
    import onnx_ir as ir

    graph = made.graph
    names: dict[str, str] = {}
    for value, port in zip(graph.inputs, program.inputs, strict=False):
        for now, before in zip(value.shape or (), port.shape or (), strict=False):
            if isinstance(now, ir.SymbolicDim) and isinstance(now.value, str) and isinstance(before, str) and before:
                names[now.value] = before
            elif isinstance(before, str) and not isinstance(now, ir.SymbolicDim):
                raise Unsupported(
                    f"the size {brief(before)} of its input {brief(port.name)} is fixed by PyTorch's exporter"
                )
    for value in [*graph.inputs, *graph.outputs, *(v for node in graph.all_nodes() for v in node.outputs)]:
        if value.shape is not None:
            sizes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
            value.shape = ir.Shape([names.get(size, size) if isinstance(size, str) else size for size in sizes])


def _forget_origins(made: ir.Model) -> None:
    """Takes out what the exporter notes about every node: the stack of calls that traced it, for one."""
    for node in made.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*made.graph.inputs, *made.graph.outputs):
        value.metadata_props.clear()
    made.graph.metadata_props.clear()
    made.metadata_props.clear()
