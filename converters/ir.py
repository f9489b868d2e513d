"""The intermediate representation: every format is read into it and written from it.

    value = (scale * (code - zero_point) + offset) * factor     per block; a codebook first maps code -> codebook[code]

A `Model` maps names to `Tensor`s. A `Tensor` is canonical packed bytes (`converters.arithmetic.packing`), fetched only
when asked for, and possibly a `Quantization`. Parameters are tensors too: they are lazy as well, and may themselves be
quantized (a second-level scale).

Why one formula. The alternative is a class per scheme (GPTQ, AWQ, NF4, ...), with a decoder each and a conversion for
each pair. All of these schemes are cases of this formula with some parameters absent. So there is one decoder, and
each format maps only its own layout to these parameters.
Why lazy. A model may be larger than memory. Headers are enough to plan, list and refuse a conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm, prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nibblecast.converters.arithmetic import decoding
from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FLOAT_DTYPES,
    SUB_BYTE,
    UINT2,
    UINT4,
    UINT8,
    bits_of,
    dtype_name,
    is_float,
    is_integer,
)
from nibblecast.converters.arithmetic.grids import blocked as blocked
from nibblecast.converters.arithmetic.grids import grid_shape as grid_shape
from nibblecast.converters.arithmetic.grids import per_axis as per_axis
from nibblecast.converters.arithmetic.grids import per_tensor as per_tensor
from nibblecast.converters.arithmetic.grids import with_size
from nibblecast.converters.arithmetic.packing import pack, packed_size, unpack
from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError, brief, located
from nibblecast.converters.input.shapes import MOST_DIMENSIONS as MOST_DIMENSIONS
from nibblecast.converters.input.shapes import checked_shape
from nibblecast.converters.metadata import Loss as Loss
from nibblecast.converters.metadata import Metadata, Use
from nibblecast.converters.storage import Computed, Data, DataSlice, InMemory

if TYPE_CHECKING:
    import onnx_ir

_NOTHING = np.empty(0, np.uint8)
_PART_ELEMENTS = 1 << 22  # decoded at a time, so that the memory of their source is released in between
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
#: The dtypes that a library may round its computed values to.
VALUE_DTYPES = (FLOAT16, BFLOAT16)
_COMPUTE_DTYPES = (*VALUE_DTYPES, FLOAT32, FLOAT64)


@dataclass(frozen=True, slots=True, eq=False)
class GroupIndex:
    """The group of each position along `axis` (GPTQ's act-order): `index` is an integer tensor of shape (shape[axis],)
    with values below the parameters' size along that axis."""

    axis: int
    index: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Quantization:
    """The parameters that turn codes into values, one of each per block.

    `block_shape` says how many elements along each axis share a parameter: the whole shape (per tensor), 1 along one
    axis and everything along the others (per channel), (1, 32) (group-wise), etc.; `per_tensor`, `per_axis` and
    `blocked` make the usual ones. All parameters have shape `grid_shape(shape, block_shape)` and keep their stored
    dtype. `zero_point` is in units of codes, `offset` in units of values; None means absent, not zeros. `codebook` has
    shape (2 ** bits,) and needs unsigned codes. With `group_index` the grid's size along its axis is the number of
    groups, and each position of that axis finds its group by index.

    The result of each operation is rounded to `compute_dtype`: float32, or the dtype that the producing library
    computes in (MLX's bfloat16, the float64 of PyTorch's per-channel scales). `factor`, a float32, is multiplied last
    (LLM.int8()'s 1 / 127); a factor of 1 is skipped. `value_dtype`, float16 or bfloat16, is the dtype that the library
    rounds its values to once, at the end (GPTQ's float16). Values wanted as float32 skip this rounding. None: no such
    rounding.
    """

    scale: Tensor
    block_shape: tuple[int, ...]
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    codebook: Tensor | None = None
    group_index: GroupIndex | None = None
    compute_dtype: np.dtype[Any] = FLOAT32
    factor: float = 1.0
    value_dtype: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype not in _COMPUTE_DTYPES:
            names = ", ".join(dtype.name for dtype in _COMPUTE_DTYPES)
            raise CorruptFile(f"values cannot be computed in {self.compute_dtype}: {names} are possible")
        if self.value_dtype not in (None, *VALUE_DTYPES) or (self.value_dtype and self.compute_dtype in VALUE_DTYPES):
            raise CorruptFile(
                f"values computed in {self.compute_dtype} cannot be rounded to {self.value_dtype} in the end: "
                "float16 and bfloat16 are possible, for wider ones"
            )
        if not abs(self.factor) <= _LARGEST_FLOAT32:
            raise CorruptFile(f"values cannot be multiplied by {self.factor}: it must be a finite float32")

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the parameters that are present, each with the name of its role."""
        for role, tensor in (
            ("scale", self.scale),
            ("zero_point", self.zero_point),
            ("offset", self.offset),
            ("codebook", self.codebook),
            ("group_index", self.group_index.index if self.group_index else None),
        ):
            if tensor is not None:
                yield role, tensor

    def arrays(self) -> decoding.Parameters:
        """The parameters as arrays, as decoding takes them; this reads them."""

        def floats(parameter: Tensor) -> NDArray[Any]:
            is_double = self.compute_dtype == parameter.dtype == np.float64 and parameter.quantization is None
            return parameter.numpy() if is_double else parameter.dequantize(np.float32)

        zero_point = self.zero_point
        if zero_point is not None:
            is_stored = is_integer(zero_point.dtype) and zero_point.quantization is None
            zero_points = zero_point.codes() if is_stored else zero_point.dequantize(np.float32)
        return decoding.Parameters(
            self.block_shape,
            floats(self.scale),
            None if zero_point is None else zero_points,
            None if self.offset is None else floats(self.offset),
            None if self.codebook is None else self.codebook.dequantize(np.float32),
            None if self.group_index is None else (self.group_index.axis, self.group_index.index.numpy()),
            self.compute_dtype,
            self.factor,
            self.value_dtype,
        )

    def check(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raises CorruptFile unless these parameters fit a tensor of that shape and dtype."""
        if len(self.block_shape) != len(shape):
            raise CorruptFile(f"block shape {self.block_shape} must have the rank of shape {shape}")
        if not all(1 <= block < 1 << 63 for block in self.block_shape):
            shown = brief(self.block_shape)
            raise CorruptFile(f"block shape {shown}: every block must hold at least one element, and less than 2**63")
        if not (is_integer(dtype) or is_float(dtype)):
            raise CorruptFile(f"dtype {dtype} cannot hold codes: use integers or small floats")
        grid = list(grid_shape(shape, self.block_shape))
        if self.group_index is not None:
            axis, index = self.group_index.axis, self.group_index.index
            if not 0 <= axis < len(shape) or index.shape != (shape[axis],) or not is_integer(index.dtype):
                raise CorruptFile(
                    f"group index of shape {index.shape} and dtype {index.dtype} along axis {axis}: "
                    f"integers, one for each position of an axis of shape {shape}, are needed"
                )
            if len(self.scale.shape) == len(shape):
                grid[axis] = self.scale.shape[axis]
        for role, tensor in (("scale", self.scale), ("zero point", self.zero_point), ("offset", self.offset)):
            if tensor is not None and tensor.shape != tuple(grid):
                raise CorruptFile(
                    f"{role} of shape {tensor.shape} does not fit shape {shape} in blocks of {self.block_shape}: "
                    f"{tuple(grid)} is needed"
                )
        if not is_float(self.scale.dtype) and self.scale.quantization is None:
            raise CorruptFile(f"scale of dtype {self.scale.dtype}: it must be floating-point")
        if self.codebook is not None:
            entries = 1 << bits_of(dtype)
            if self.codebook.shape != (entries,) or dtype not in _CODEBOOK_INDICES:
                raise CorruptFile(
                    f"codebook of shape {self.codebook.shape} for codes of {dtype}: "
                    f"unsigned codes and shape ({entries},) are needed"
                )

    def row_step(self, axis: int, shape: tuple[int, ...]) -> int:
        """The smallest number of positions along `axis` at whose multiples a cut divides no block and no byte of a
        parameter; `axis` is the first one longer than 1."""
        if self.group_index is not None and self.group_index.axis == axis:
            return self.group_index.index.row_step
        step = 1
        for role, tensor in self.parameters():
            if role in ("scale", "zero_point", "offset") and tensor.shape[axis] > 1:
                step = lcm(step, self.block_shape[axis] * tensor.row_step)
        return step

    def rows(self, axis: int, start: int, stop: int, shape: tuple[int, ...]) -> Quantization:
        """The parameters of positions [start, stop) along `axis`, the first one longer than 1; `start` is a multiple of
        `row_step`, and so is `stop` unless it is the end."""
        if self.group_index is not None and self.group_index.axis == axis:
            index = self.group_index.index.rows(start, stop)
            block_shape = with_size(self.block_shape, axis, min(self.block_shape[axis], stop - start))
            return replace(self, block_shape=block_shape, group_index=GroupIndex(axis, index))
        block = self.block_shape[axis]
        if block >= shape[axis]:
            return replace(self, block_shape=with_size(self.block_shape, axis, stop - start))
        first, last = start // block, -(-stop // block)

        def cut(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.rows(first, last)

        scale = self.scale.rows(first, last)
        return replace(self, scale=scale, zero_point=cut(self.zero_point), offset=cut(self.offset))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named array: logical `shape`, `dtype` (NumPy's or ml_dtypes'), canonical bytes in `data`, fetched on demand.

    Without `quantization` the elements are plain values. `uses` lists the operators that consume the tensor. Some
    formats keep parameters among the tensors (TFLite's blockwise scales). For these `parameter_of` names the tensor
    that this one is a parameter of; such a tensor is not a weight. Raises CorruptFile when data, shape and parameters
    contradict each other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: Data
    quantization: Quantization | None = None
    uses: tuple[Use, ...] = ()
    parameter_of: str | None = None

    def __post_init__(self) -> None:
        checked_shape(self.shape, tensor=self.name)
        if self.data.nbytes != self.nbytes:
            raise CorruptFile(
                f"holds {self.data.nbytes} bytes, but shape {self.shape} of {self.dtype} takes {self.nbytes}",
                tensor=self.name,
            )
        if self.quantization is not None:
            with located(tensor=self.name):
                self.quantization.check(self.shape, self.dtype)

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any], quantization: Quantization | None = None) -> Tensor:
        """A tensor of an array's elements; sub-byte dtypes (one element per byte in NumPy) are packed."""
        if array.dtype in SUB_BYTE:
            data = InMemory(pack(array.view(np.uint8), bits_of(array.dtype)))
        else:
            data = InMemory.of(array)
        return cls(name, array.shape, array.dtype, data, quantization)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits of one stored element."""
        return bits_of(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical data, without the parameters."""
        return packed_size(self.size, self.bits)

    def quantized(self) -> Quantization:
        """The quantization of a quantized tensor. Raises Unsupported for one that is not."""
        if self.quantization is None:
            raise Unsupported("is not quantized", tensor=self.name)
        return self.quantization

    @property
    def granularity(self) -> str:
        """How parameters are shared: "none" (not quantized), "per-tensor", "per-axis N", "blockwise (1, 32)"."""
        if self.quantization is None:
            return "none"
        block_shape, shape = self.quantization.block_shape, self.shape
        split = [axis for axis, size in enumerate(shape) if block_shape[axis] < size]
        if self.quantization.group_index is not None:
            return f"group index along axis {self.quantization.group_index.axis}"
        if not split:
            return "per-tensor"
        if len(split) == 1 and block_shape[split[0]] == 1:
            return f"per-axis {split[0]}"
        return f"blockwise {block_shape}"

    def around(self, first: int, last: int) -> tuple[Tensor, int]:
        """The smallest part around elements [first, last) of the flattened tensor that `rows`, applied once or several
        times, can cut out, and the index of its first element."""
        if not self.shape or last <= first:
            return self, 0
        count, step = self.shape[self._row_axis], self.row_step
        row = self.size // count
        start = first // (row * step) * step
        stop = min(count, -(-last // (row * step)) * step)
        if (start, stop) == (0, count):
            return self, 0
        part = self.rows(start, stop)
        if stop - start > 1:
            return part, start * row
        inner, begin = part.around(first - start * row, last - start * row)
        return inner, start * row + begin

    def packed(self) -> NDArray[np.uint8]:
        """The canonical bytes, shape (nbytes,); do not write to them."""
        return self.data.read(0, self.nbytes)

    def codes(self) -> NDArray[Any]:
        """The stored elements in logical shape: int2 and int4 as int8, uint2, uint4 and the bit patterns of float4 as
        uint8, everything else in its own dtype; do not write to them."""
        packed = self.packed()
        flat = unpack(packed, self.dtype, self.size) if self.dtype in SUB_BYTE else packed.view(self.dtype)
        return flat.reshape(self.shape)

    def numpy(self) -> NDArray[Any]:
        """The stored elements in logical shape and in `dtype` itself; do not write to them."""
        return self.codes().view(self.dtype) if self.dtype in SUB_BYTE else self.codes()

    def dequantize(self, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """The values in logical shape, rounded to `dtype` (float32, float16 or bfloat16).

        In the dtype of the library that made the tensor they are that library's values, bit for bit. As float32 they
        are its values before it rounds them to 16 bits at the end. A tensor without quantization gives its values,
        cast. Raises Unsupported for complex values and other dtypes."""
        values = np.empty(self.size, _decodable(self, np.dtype(dtype)))
        _decode(self, values)
        return values.reshape(self.shape)

    def dequantized(self, dtype: DTypeLike = np.float32) -> Tensor:
        """The tensor with plain elements of `dtype`, computed as in `dequantize` when they are read. A tensor without
        quantization is returned unchanged."""
        if self.quantization is None:
            return self
        wanted = _decodable(self, np.dtype(dtype))
        itemsize = wanted.itemsize

        def compute_into(start: int, stop: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
            part, begin = self.around(start // itemsize, -(-stop // itemsize))
            nbytes, skipped = part.size * itemsize, start - begin * itemsize
            held = out if out.size >= nbytes else np.empty(nbytes, np.uint8)
            _decode(part, held[:nbytes].view(wanted))
            part.release()
            return held[skipped : skipped + stop - start]

        def compute(start: int, stop: int) -> NDArray[np.uint8]:
            return compute_into(start, stop, _NOTHING)

        data = Computed(self.size * itemsize, compute, tuple(self.stored()), compute_into=compute_into)
        return replace(self, dtype=wanted, data=data, quantization=None)

    @property
    def _row_axis(self) -> int:
        return next((axis for axis, size in enumerate(self.shape) if size != 1), 0)

    @property
    def row_step(self) -> int:
        """The smallest number of rows at whose multiples `rows` may cut: such a cut divides no byte and no block."""
        if not self.shape:
            return 1
        axis = self._row_axis
        row_bits = prod(self.shape[axis + 1 :]) * self.bits
        step = 8 // gcd(8, row_bits) if row_bits else 1
        return lcm(step, self.quantization.row_step(axis, self.shape)) if self.quantization else step

    def rows(self, start: int, stop: int) -> Tensor:
        """Positions [start, stop) along the first axis longer than 1, as a tensor of its own that shares the data.
        `start` is a multiple of `row_step`; so is `stop`, unless it is the end."""
        axis = self._row_axis
        row_bits = prod(self.shape[axis + 1 :]) * self.bits
        first, last = start * row_bits // 8, packed_size(stop, row_bits)
        quantization = self.quantization and self.quantization.rows(axis, start, stop, self.shape)
        shape = with_size(self.shape, axis, stop - start)
        return replace(self, shape=shape, data=DataSlice(self.data, first, last - first), quantization=quantization)

    def parts(self, nbytes: int) -> Iterator[Tensor]:
        """The pieces that `cut` gives; each is released when the next one is requested."""
        for part in self.cut(nbytes):
            yield part
            part.release()

    def cut(self, nbytes: int) -> Iterator[Tensor]:
        """The tensor in pieces of about `nbytes` canonical bytes, in order; their data joined is this tensor's data.
        A piece is whole rows of the first axis longer than 1, or of the next axis where a single row is too large."""
        count = self.shape[self._row_axis] if self.shape else 1
        if self.nbytes <= nbytes or count <= self.row_step:
            yield self
            return
        row_bytes = max(1, self.nbytes // count)
        if row_bytes > nbytes and self.row_step == 1:
            for row in range(count):
                yield from self.rows(row, row + 1).cut(nbytes)
            return
        step = max(1, nbytes // row_bytes // self.row_step) * self.row_step
        for start in range(0, count, step):
            yield self.rows(start, min(start + step, count))

    def stored(self) -> Iterator[Data]:
        """Its data and the data of all its parameters, recursively."""
        yield self.data
        for _, parameter in () if self.quantization is None else self.quantization.parameters():
            yield from parameter.stored()

    def release(self) -> None:
        """Releases the memory that reading this tensor and its parameters took, e.g. the pages of a mapped file."""
        self.data.release(0, self.nbytes)
        for _, parameter in self.quantization.parameters() if self.quantization else ():
            parameter.release()


@dataclass(frozen=True, slots=True, eq=False)
class WeightPlace:
    """An initializer of a graph that stands for a tensor of the model as it was read. The initializer holds its decoded
    values if it is quantized, with the axes in the order of `permutation` (None: unchanged)."""

    tensor: Tensor
    permutation: tuple[int, ...] | None = None


class Graph(Protocol):
    """A model's compute graph, in ONNX's operators; its initializers are the model's tensors by name."""

    def onnx_ir(self) -> onnx_ir.Model:
        """The graph with the classes of onnx_ir; payloads stay where they are."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Model(Mapping[str, Tensor]):
    """An ordered mapping of names to tensors, with metadata of the model as a whole.

    `graph` is the compute graph in ONNX if the reader builds one; its initializers are this model's tensors by name.
    `losses` are what reading and the stages so far left out or changed, including exact changes of form.
    """

    tensors: Mapping[str, Tensor]
    metadata: Metadata = field(default_factory=Metadata)
    graph: Graph | None = None
    losses: tuple[Loss, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


_CODEBOOK_INDICES = frozenset((UINT2, UINT4, UINT8))


def _decodable(tensor: Tensor, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """`dtype`, if the tensor can be decoded to it. Raises UsageError or Unsupported."""
    if dtype not in FLOAT_DTYPES.values():
        raise UsageError(f"dtype {dtype}: values come as {', '.join(FLOAT_DTYPES)}", tensor=tensor.name)
    if tensor.dtype.kind == "c" or tensor.dtype.names:
        name = dtype_name(tensor.dtype)
        raise Unsupported(f"{name} values have no float form: leave it out with --skip", tensor=tensor.name)
    return dtype


def _decode(tensor: Tensor, out: NDArray[Any]) -> None:
    """Writes the values of `tensor`, flat, to `out`."""
    start = 0
    for part in tensor.parts(_PART_ELEMENTS * tensor.bits // 8):
        values = out[start : start + part.size]
        parameters = part.quantization.arrays() if part.quantization and part.size else None
        decoding.decode(part.packed(), part.dtype, part.shape, parameters, values)
        start += part.size
