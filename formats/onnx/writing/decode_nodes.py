"""A quantized tensor -> initializers and ONNX nodes that decode it.

DequantizeLinear decodes a quantization that fits its types and its three granularities (one scale, one per position of
an axis, one per block of an axis). Other quantizations are decoded by Cast, Gather, Sub, Mul and Add. Both compute in
float32 and in the order of the IR's own decoder, so that a runtime gives the same bits as the IR.

Custom operators would be shorter, but only one runtime would have them. Standard nodes run everywhere, and runtimes and
quantization tools recognize DequantizeLinear, so it is preferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT4,
    FLOAT32,
    INT2,
    INT4,
    INT32,
    INT64,
    SUB_BYTE,
    UINT2,
    UINT4,
    bits_of,
    code_range,
    is_float,
    is_integer,
)
from nibblecast.converters.arithmetic.packing import packed_size, unpack
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.ir import Quantization, Tensor, blocked, per_axis, per_tensor
from nibblecast.converters.names import UniqueNames
from nibblecast.converters.storage import Computed
from nibblecast.formats.onnx.file.graph import Node
from nibblecast.formats.onnx.file.schema import (
    BLOCKS_SINCE,
    DEQUANTIZE_LINEAR_SINCE,
    ELEMENT_TYPES,
    GROUP_SIZE,
    TABLE_DTYPE,
)

Role = Literal["codes", "scale", "zero_point", "offset", "codebook", "group_index"]

_PIECE_BYTES = 1 << 20
_LARGEST_ELEMENT = 8
#: Codes whose differences float16 and bfloat16 hold exactly. DequantizeLinear may compute in these dtypes for them.
_EXACT_CODES = frozenset((INT2, UINT2, INT4, UINT4))


@dataclass(frozen=True, slots=True)
class Initializer:
    """An initializer that will hold the canonical bytes of a tensor, or of one of its parameters (`role`)."""

    name: str
    role: Role
    dtype: np.dtype[Any]
    dims: tuple[int, ...]
    nbytes: int
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Constant:
    """An initializer with few values, known while planning. Tensors that need the same values share it."""

    name: str
    values: NDArray[Any]
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class DecodeNodes:
    """Collects nodes and constants of one graph. `shared` has, by identity, the initializer names of parameters that
    are themselves tensors of the model. `allowance` limits the memory of the constants."""

    opset: int
    names: UniqueNames
    shared: dict[int, str]
    allowance: Allowance
    nodes: list[Node] = field(default_factory=list)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    constants: dict[tuple[Any, ...], Constant] = field(default_factory=dict)

    def lower(
        self, tensor: Tensor, quantization: Quantization, output: str, result: np.dtype[Any] = FLOAT32
    ) -> list[Initializer]:
        """Adds nodes that decode a quantized tensor to `output`, in float32 and then rounded to `result`. Returns the
        initializers that they take, without those that are tensors of the model themselves."""
        one = _TensorLowering(self, tensor, quantization, output, result)
        granularity = self._granularity(tensor, quantization)
        if granularity is None:
            one.as_arithmetic()
        else:
            one.as_dequantize_linear(*granularity)
        return one.initializers

    def constant(
        self,
        key: tuple[Any, ...],
        wanted: str,
        count: int,
        make: Callable[[], NDArray[Any]],
        *properties: tuple[str, str],
    ) -> str:
        """The name of a shared initializer with the `count` values of `make`; `key` identifies it. Raises Unsupported
        beyond the allowance, because a tensor without elements can have sizes of any magnitude."""
        if key not in self.constants:
            self.allowance.spend(count * _LARGEST_ELEMENT, "needs an index of the groups along an axis")
            self.constants[key] = Constant(self.names.fresh(wanted), make(), properties)
        return self.constants[key].name

    def _granularity(self, tensor: Tensor, q: Quantization) -> tuple[tuple[int, ...], dict[str, int]] | None:
        """The scale's dims and the attributes with which DequantizeLinear decodes the tensor; None if it cannot."""
        zero_point = q.zero_point
        if q.offset is not None or q.codebook is not None or q.group_index is not None:
            return None
        dtype = carrier(tensor.dtype, self.opset) if is_integer(tensor.dtype) else tensor.dtype
        if DEQUANTIZE_LINEAR_SINCE.get(dtype, self.opset + 1) > self.opset:
            return None
        if zero_point is not None and not fits(zero_point, dtype):
            return None
        found = _dequantize_linear_form(tensor.shape, q)
        if found is None:
            return None
        dims, attributes = found
        # onnxruntime 1.32 fails on blocks of float8
        if "block_size" in attributes and (self.opset < BLOCKS_SINCE or is_float(tensor.dtype)):
            return None
        for parameter in (q.scale, zero_point):
            if parameter is not None and id(parameter) in self.shared and parameter.shape != dims:
                return None
        return found


def _dequantize_linear_form(shape: tuple[int, ...], q: Quantization) -> tuple[tuple[int, ...], dict[str, int]] | None:
    block_shape, grid = q.block_shape, q.scale.shape
    if all(block >= size for block, size in zip(block_shape, shape, strict=True)):
        whole = per_tensor(shape)
        single = [axis for axis, block in enumerate(block_shape) if block > whole[axis]]
        # onnxruntime 1.32 takes no block_size with a scale of dims (1,)
        if len(shape) < 2 or not single or block_shape != blocked(shape, single[0], block_shape[single[0]]):
            return (), {}
    if 0 in shape:  # without elements, runtimes disagree on the scale's dims
        return None
    for axis in range(len(shape)):
        if block_shape == per_axis(shape, axis):
            return (grid[axis],), {"axis": axis}
    for axis, block in enumerate(block_shape):
        if block_shape == blocked(shape, axis, block):
            return grid, {"axis": axis, "block_size": block}
    return None


def fits(zero_point: Tensor, dtype: np.dtype[Any]) -> bool:
    """Whether DequantizeLinear can take these zero points with codes of `dtype`. They must be integers in its range.
    With int32 codes all must be 0, and float8 codes cannot have any. Reads them if their own dtype leaves this open."""
    if is_float(dtype) or not is_integer(zero_point.dtype):
        return False
    if zero_point.dtype == dtype != INT32:
        return True
    lowest, highest = (0, 0) if dtype == INT32 else code_range(dtype)
    for part in zero_point.parts(_PIECE_BYTES):
        codes = part.codes()
        if codes.size and (codes.min() < lowest or codes.max() > highest):
            return False
    return True


def carrier(dtype: np.dtype[Any], opset: int) -> np.dtype[Any]:
    """The dtype of the initializer that holds codes or parameters of `dtype`, mostly `dtype` itself. It is uint4 for
    float4's bit patterns, because onnxruntime 1.32 has neither Cast nor DequantizeLinear for float4. It is int8 or
    uint8 for integers of 2 and 4 bits in an operator set without these."""
    held = UINT4 if dtype == FLOAT4 else dtype
    is_known = held not in SUB_BYTE or dtype == FLOAT4 or ELEMENT_TYPES[held].opset <= opset
    return held if is_known else SUB_BYTE[held][1]


def widened(tensor: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """`tensor` with one element in each byte, if `dtype` is int8 or uint8 and the elements have fewer bits."""
    if dtype.itemsize * 8 == tensor.bits or tensor.bits >= 8 or dtype in SUB_BYTE:
        return tensor
    per_byte = 8 // tensor.bits

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first = start // per_byte
        packed = tensor.data.read(first, -(-stop // per_byte))
        return unpack(packed, tensor.dtype, packed.size * per_byte)[start - first * per_byte :][: stop - start].view(
            np.uint8
        )

    return Tensor(tensor.name, tensor.shape, dtype, Computed(tensor.size, compute, (tensor.data,)))


def is_wide(*dtypes: np.dtype[Any]) -> bool:
    """Whether float32 does not hold the difference of these integers, so that integers must be subtracted."""
    return all(is_integer(dtype) for dtype in dtypes) and any(dtype.itemsize >= 4 for dtype in dtypes)


def _float4_values() -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.arange(16, dtype=np.uint8).view(FLOAT4).astype(np.float32)
    return values


@dataclass(slots=True)
class _TensorLowering:
    """One tensor on its way into the graph."""

    lowering: DecodeNodes
    tensor: Tensor
    quantization: Quantization
    output: str
    result: np.dtype[Any]
    initializers: list[Initializer] = field(default_factory=list)

    def as_dequantize_linear(self, dims: tuple[int, ...], attributes: dict[str, int]) -> None:
        q = self.quantization
        # the scale may have the result's dtype: its product with a small integer is rounded once either way
        is_direct = q.scale.dtype == self.result and self.tensor.dtype in _EXACT_CODES
        inputs = [self._initializer("codes", self.tensor)]
        inputs.append(self._initializer("scale", q.scale, dims) if is_direct else self._float32("scale", q.scale, dims))
        if q.zero_point is not None:
            inputs.append(self._cast(self._initializer("zero_point", q.zero_point, dims), self._codes_dtype))
        if is_direct or self.result == FLOAT32:
            self._node("DequantizeLinear", inputs, self.output, **attributes)
        else:
            values = self._node("DequantizeLinear", inputs, self._value("values"), **attributes)
            self._round(values)

    @property
    def _codes_dtype(self) -> np.dtype[Any]:
        return carrier(self.tensor.dtype, self.lowering.opset)

    def as_arithmetic(self) -> None:
        q, dtype = self.quantization, self.tensor.dtype
        zero_point = q.zero_point
        steps: list[tuple[str, str]] = []
        if zero_point is not None and q.codebook is None and is_wide(dtype, zero_point.dtype):
            codes = self._cast(self._initializer("codes", self.tensor), INT64)
            spread = self._spread(self._cast(self._initializer("zero_point", zero_point), INT64), "zero_point")
            values = self._cast(self._node("Sub", [codes, spread], self._value("difference")), FLOAT32)
        else:
            values = self._values(q.codebook)
            if zero_point is not None:
                steps.append(("Sub", self._spread(self._float32("zero_point", zero_point), "zero_point")))
        steps.append(("Mul", self._spread(self._float32("scale", q.scale), "scale")))
        if q.offset is not None:
            steps.append(("Add", self._spread(self._float32("offset", q.offset), "offset")))
        for position, (operator, parameter) in enumerate(steps):
            last = position == len(steps) - 1 and self.result == FLOAT32
            values = self._node(operator, [values, parameter], self.output if last else self._value(operator.lower()))
        if self.result != FLOAT32:
            self._round(values)

    def _round(self, values: str) -> None:
        self._node("Cast", [values], self.output, to=ELEMENT_TYPES[self.result].number)

    def _values(self, codebook: Tensor | None) -> str:
        """The name of the codes as float32, either cast or looked up in the codebook."""
        if codebook is None:
            return self._float32("codes", self.tensor)
        table = self._float32("codebook", codebook)
        return self._look_up(table, self._initializer("codes", self.tensor), "looked_up")

    def _float32(self, role: Role, tensor: Tensor, dims: tuple[int, ...] | None = None) -> str:
        """The name of a tensor's stored elements as float32."""
        if tensor.dtype != FLOAT4:
            return self._cast(self._initializer(role, tensor, dims), FLOAT32)
        properties = (TABLE_DTYPE, FLOAT4.name)
        table = self.lowering.constant((FLOAT4,), f"{FLOAT4.name}_values", 16, _float4_values, properties)
        return self._look_up(table, self._initializer(role, tensor, dims), f"{role}_values")

    def _look_up(self, table: str, indices: str, suffix: str) -> str:
        return self._node("Gather", [table, self._cast(indices, INT32)], self._value(suffix), axis=0)

    def _spread(self, parameter: str, role: Role) -> str:
        """The name of a parameter's values in a shape that broadcasts against the tensor's."""
        for axis, (size, block) in enumerate(zip(self.tensor.shape, self.quantization.block_shape, strict=True)):
            index = self._index(axis, size, block)
            if index:
                parameter = self._node("Gather", [parameter, index], self._value(f"{role}_on_axis_{axis}"), axis=axis)
        return parameter

    def _index(self, axis: int, size: int, block: int) -> str:
        """The name of the index from positions along `axis` to groups; empty if broadcasting is enough."""
        group = self.quantization.group_index
        if group is not None and group.axis == axis:
            name = self._initializer("group_index", group.index, properties=((GROUP_SIZE, str(block)),))
            return name if group.index.dtype in (INT32, INT64) else self._cast(name, INT64)
        if block == 1 or block >= size:
            return ""
        make = lambda: (np.arange(size, dtype=np.int64) // block).astype(np.int32)  # noqa: E731
        return self.lowering.constant((size, block), f"blocks_of_{block}_in_{size}", size, make)

    def _initializer(
        self,
        role: Role,
        tensor: Tensor,
        dims: tuple[int, ...] | None = None,
        properties: tuple[tuple[str, str], ...] = (),
    ) -> str:
        """The name of the initializer for a tensor: its own if it is a tensor of the model, else a new name."""
        for known in self.initializers:
            if known.role == role:
                return known.name
        dtype = carrier(tensor.dtype, self.lowering.opset)
        shared = self.lowering.shared.get(id(tensor)) if dtype == tensor.dtype else None
        name = shared or self._value("quantized" if role == "codes" else role)
        if shared is None:
            dims = tensor.shape if dims is None else dims
            nbytes = packed_size(tensor.size, bits_of(dtype))
            self.initializers.append(Initializer(name, role, dtype, dims, nbytes, properties))
        self.lowering.dtypes[name] = dtype
        return name

    def _cast(self, name: str, dtype: np.dtype[Any]) -> str:
        """The name of the elements of an initializer or a difference, cast to `dtype`."""
        if self.lowering.dtypes.get(name) == dtype:
            return name
        return self._node("Cast", [name], self._value_of(name, dtype), to=ELEMENT_TYPES[dtype].number)

    def _value(self, suffix: str) -> str:
        return self.lowering.names.fresh(f"{self.output}_{suffix}")

    def _value_of(self, name: str, dtype: np.dtype[Any]) -> str:
        return self.lowering.names.fresh(f"{name}_{dtype.name}")

    def _node(self, operator: str, inputs: list[str], output: str, **integers: int) -> str:
        self.lowering.nodes.append(Node(operator, tuple(inputs), (output,), integers))
        return output
