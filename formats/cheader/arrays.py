"""What a tensor becomes in C: its arrays, its kind, its granularity. Known from headers; elements come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, is_integer
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.literals import notation
from nibblecast.formats.cheader.literals.notation import NOTATIONS, Notation
from nibblecast.formats.cheader.packings import DENSE, Packing, packing_for

#: What data are aligned to; for all other arrays, the worst case of a linker's layout.
ALIGNMENT = 16
#: What `tail-padding` fills arrays up to: a vector of MVE has so many bytes.
VECTOR = 16

_CHUNK_BYTES = 1 << 20
_INT32 = np.iinfo(np.int32)
_MOST_GROUPS = 1 << 16
_MOST_AXES = 255

#: `nibblecast_tensor.kind` by dtype, without the prefix NIBBLECAST_; integers have theirs by sign.
_FLOAT_KINDS: Mapping[np.dtype[Any], str] = MappingProxyType(
    {
        np.dtype(np.bool_): "BOOL",
        np.dtype(np.float64): "FLOAT64",
        np.dtype(np.float32): "FLOAT32",
        np.dtype(np.float16): "FLOAT16",
        np.dtype(ml_dtypes.bfloat16): "BFLOAT16",
        np.dtype(ml_dtypes.float8_e4m3fn): "FLOAT8_E4M3FN",
        np.dtype(ml_dtypes.float8_e4m3fnuz): "FLOAT8_E4M3FNUZ",
        np.dtype(ml_dtypes.float8_e5m2): "FLOAT8_E5M2",
        np.dtype(ml_dtypes.float8_e5m2fnuz): "FLOAT8_E5M2FNUZ",
        np.dtype(ml_dtypes.float8_e8m0fnu): "FLOAT8_E8M0FNU",
        np.dtype(ml_dtypes.float6_e2m3fn): "FLOAT6_E2M3FN",
        np.dtype(ml_dtypes.float6_e3m2fn): "FLOAT6_E3M2FN",
        np.dtype(ml_dtypes.float4_e2m1fn): "FLOAT4_E2M1FN",
    }
)


@dataclass(frozen=True, slots=True)
class Style:
    """How the elements of an array are spelled: the names of the templates of its declaration and of what comes before
    and after all arrays, whether they lie in a file of their own, and whether that takes a .c file."""

    declaration: str = "array"
    opening: str = ""
    closing: str = ""
    in_file: bool = False
    needs_source: bool = False

    def spell(self, array: Array) -> Array:
        """An array of one-byte elements, in this style."""
        return array


#: A literal for each element: what every compiler takes.
BYTES = Style()


@dataclass(frozen=True, slots=True)
class Array:
    """One C array: `role` ends its identifier, and `count` elements of `notation` come from `tensor` by `read`, which
    takes a part of it and gives elements of shape (n,) that have the notation's dtype, or bytes that make them up.
    After these come `padding` zeros. `payload` is how many bytes mean something."""

    role: str
    notation: Notation
    count: int
    tensor: Tensor
    read: Callable[[Tensor], NDArray[Any]]
    payload: int
    padding: int = 0
    terminator: int = 0
    alignment: int = ALIGNMENT
    style: Style = BYTES

    @property
    def elements(self) -> int:
        """Elements that are written, padding included."""
        return self.count + self.padding

    @property
    def length(self) -> int:
        """Elements in C, where there are no empty arrays, and where strings have a NUL."""
        return max(1, self.elements + self.terminator)

    @property
    def nbytes(self) -> int:
        """Bytes of flash that it takes."""
        return self.length * self.notation.nbytes

    @property
    def aligned_nbytes(self) -> int:
        """The same, rounded up to the alignment."""
        return -(-self.nbytes // self.alignment) * self.alignment

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The elements in order, in pieces of about a megabyte; raises Unsupported or CorruptFile for what C cannot
        hold."""
        as_read = self.style is BYTES and not self.padding
        return self._parts() if as_read else _regrouped(self._parts(), self.notation.dtype, self.elements)

    def _parts(self) -> Iterator[NDArray[Any]]:
        for part in self.tensor.parts(_CHUNK_BYTES):
            yield self.read(part)
            part.release()


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What all arrays of a model have in common: how one-byte data are spelled, how codes narrower than a byte are
    packed, what data are aligned to, the section (empty: none), whether arrays are filled up to whole vectors, and
    whether they must do without literals of 64 bits."""

    style: Style = BYTES
    packing: Packing = DENSE
    alignment: int = ALIGNMENT
    section: str = ""
    tail_padding: bool = False
    c90: bool = False

    def arrays_of(self, tensor: Tensor) -> tuple[Array, ...]:
        """The data and the parameters that there are."""
        return (self.bytes_of(tensor, "data"), *map(self.filled, _parameters(tensor)))

    def bytes_of(self, tensor: Tensor, role: str) -> Array:
        """The elements of `tensor` as they are stored, in the style of this model if it is one for them."""
        array = self.filled(_data(tensor, packing_for(tensor, self.packing)))
        if self.c90:
            array = replace(array, notation=notation.WITHOUT_LONG_LITERALS.get(array.notation.dtype, array.notation))
        array = replace(array, role=role, alignment=max(self.alignment, array.notation.nbytes))
        return self.style.spell(array) if array.notation.nbytes == 1 and array.count else array

    def filled(self, array: Array) -> Array:
        """`array`, with zeros up to a whole vector where that is wanted."""
        if not self.tail_padding:
            return array
        return replace(array, padding=-array.count % (VECTOR // array.notation.nbytes))


def check(tensor: Tensor) -> None:
    """Raises Unsupported for a dtype without notation, and for more groups or axes than `nibblecast_tensor` counts."""
    if tensor.dtype not in NOTATIONS:
        raise Unsupported(f"C has no type for {tensor.dtype}: leave it out with --skip", tensor=tensor.name)
    granularity, axis = granularity_of(tensor)
    if granularity == "GROUP_INDEX" and tensor.quantization is not None and axis is not None:
        groups = tensor.quantization.scale.shape[axis]
        if groups > _MOST_GROUPS:
            raise Unsupported(
                f"has {groups} groups, and at most {_MOST_GROUPS} go into C: leave it out with --skip",
                tensor=tensor.name,
            )
    if len(tensor.shape) > _MOST_AXES:
        raise Unsupported(
            f"has {len(tensor.shape)} axes, and at most {_MOST_AXES} go into C: leave it out with --skip",
            tensor=tensor.name,
        )


def kind_of(tensor: Tensor) -> str:
    """`nibblecast_tensor.kind`, without NIBBLECAST_."""
    if tensor.quantization is not None and tensor.quantization.codebook is not None:
        return "CODEBOOK"
    return _FLOAT_KINDS.get(tensor.dtype) or ("SIGNED" if is_signed(tensor) else "UNSIGNED")


def is_signed(tensor: Tensor) -> bool:
    """Whether the elements are two's complement integers."""
    storage = SUB_BYTE[tensor.dtype][1] if tensor.dtype in SUB_BYTE else tensor.dtype
    return storage.kind == "i"


def granularity_of(tensor: Tensor) -> tuple[str, int | None]:
    """`nibblecast_tensor.granularity`, without NIBBLECAST_, and the axis where one is meant."""
    quantization = tensor.quantization
    if quantization is None:
        return "NOT_QUANTIZED", None
    if quantization.group_index is not None:
        return "GROUP_INDEX", quantization.group_index.axis
    split = [axis for axis, size in enumerate(tensor.shape) if quantization.block_shape[axis] < size]
    if not split:
        return "PER_TENSOR", None
    if len(split) == 1 and quantization.block_shape[split[0]] == 1:
        return "PER_AXIS", split[0]
    return "BLOCKWISE", None


def _data(tensor: Tensor, packing: Packing) -> Array:
    spelling = NOTATIONS[tensor.dtype]
    if packing != DENSE:
        spelling = notation.INT8 if packing.unpacked and is_signed(tensor) else notation.UINT8
        nbytes = packing.nbytes(tensor.shape, tensor.bits)
        return Array("data", spelling, nbytes, tensor, packing.stored, nbytes)
    count = tensor.nbytes // spelling.nbytes
    return Array("data", spelling, count, tensor, partial(_stored, spelling.dtype), tensor.nbytes)


def _parameters(tensor: Tensor) -> Iterator[Array]:
    quantization = tensor.quantization
    if quantization is None:
        return
    for role, parameter in quantization.parameters():
        spelling, read = notation.FLOAT32, _float32
        if role == "zero_point" and _holds_integers(parameter):
            spelling, read = notation.INT32, partial(_int32, tensor.name)
        elif quantization.group_index is not None and role == "group_index":
            groups = quantization.scale.shape[quantization.group_index.axis]
            spelling, read = notation.UINT16, partial(_groups, tensor.name, groups)
        yield Array(role, spelling, parameter.size, parameter, read, parameter.size * spelling.nbytes)


def _regrouped(pieces: Iterator[NDArray[Any]], dtype: np.dtype[Any], count: int) -> Iterator[NDArray[Any]]:
    """The bytes of `pieces` as `count` elements of `dtype`, little-endian, with zeros after the last byte."""
    words = dtype.newbyteorder("<")
    missing = count * words.itemsize
    rest = np.empty(0, np.uint8)
    for piece in pieces:
        stored = piece.view(np.uint8)
        if rest.size:
            stored = np.concatenate([rest, stored])
        whole = stored.size // words.itemsize * words.itemsize
        yield stored[:whole].view(words)
        missing -= whole
        rest = stored[whole:].copy()
    if missing:
        last = np.zeros(missing, np.uint8)
        last[: rest.size] = rest
        yield last.view(words)


def integer_zero_point(tensor: Tensor) -> bool:
    """Whether zero points, if there are any, are integers."""
    zero_point = None if tensor.quantization is None else tensor.quantization.zero_point
    return zero_point is None or _holds_integers(zero_point)


def _holds_integers(parameter: Tensor) -> bool:
    return is_integer(parameter.dtype) and parameter.quantization is None


def _stored(dtype: np.dtype[Any], part: Tensor) -> NDArray[Any]:
    return part.packed().view(dtype)


def _float32(part: Tensor) -> NDArray[Any]:
    return part.dequantize(np.float32).reshape(-1)


def _int32(owner: str, part: Tensor) -> NDArray[Any]:
    zero_points = part.codes().reshape(-1)
    for value in (zero_points.min(), zero_points.max()) if zero_points.size else ():
        if not _INT32.min <= int(value) <= _INT32.max:
            raise Unsupported(f"zero point {value} does not fit int32_t: leave it out with --skip", tensor=owner)
    return zero_points.astype(np.int32)


def _groups(owner: str, count: int, part: Tensor) -> NDArray[Any]:
    groups = part.codes().reshape(-1)
    for value in (groups.min(), groups.max()) if groups.size else ():
        if not 0 <= int(value) < count:
            raise CorruptFile(f"its group index holds {value}, but there are {count} groups", tensor=owner)
    return groups.astype(np.uint16)
