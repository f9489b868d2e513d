"""C -> Model: reads back what the writer made, also when somebody has reformatted it. No compiler is needed.

The table of tensors says what there is; the arrays that it names hold the elements, which are looked at only when they
are asked for; the macros must say the same as the table. What C does not keep (a float16 scale, say, becomes float)
comes back as it is in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.errors import CorruptFile, Error, MissingFile, Unsupported
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.containment import refuse_outside
from nibblecast.converters.input.shapes import MOST_DIMENSIONS, checked_shape
from nibblecast.converters.ir import GroupIndex, Model, Quantization, Tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.converters.names import UniqueNames
from nibblecast.converters.storage import Data, InMemory, MappedFile
from nibblecast.formats.cheader.arrays import granularity_of, is_signed, kind_of
from nibblecast.formats.cheader.packings import DENSE, PACKING_NAMES, PACKINGS, Packing
from nibblecast.formats.cheader.reading.data import CachedArrays, ElementData, PackedData
from nibblecast.formats.cheader.reading.elements import all_elements, lines_of
from nibblecast.formats.cheader.reading.payload import PayloadFiles, StoredData
from nibblecast.formats.cheader.reading.source import (
    ELEMENT_TYPES,
    GRANULARITY_NAMES,
    KIND_NAMES,
    ArrayText,
    Declarations,
)
from nibblecast.formats.cheader.reading.table import Row, rows_of
from nibblecast.formats.cheader.reading.tokens import corrupt
from nibblecast.formats.cheader.render import INTERFACE

#: The dtype of each kind and number of bits.
_DTYPES: Mapping[tuple[str, int], np.dtype[Any]] = MappingProxyType(
    {
        ("UNSIGNED", 2): np.dtype(ml_dtypes.uint2),
        ("UNSIGNED", 4): np.dtype(ml_dtypes.uint4),
        ("SIGNED", 2): np.dtype(ml_dtypes.int2),
        ("SIGNED", 4): np.dtype(ml_dtypes.int4),
        **{("UNSIGNED", bits): np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
        **{("SIGNED", bits): np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
        ("CODEBOOK", 2): np.dtype(ml_dtypes.uint2),
        ("CODEBOOK", 4): np.dtype(ml_dtypes.uint4),
        ("CODEBOOK", 8): np.dtype(np.uint8),
        ("BOOL", 8): np.dtype(np.bool_),
        ("FLOAT64", 64): np.dtype(np.float64),
        ("FLOAT32", 32): np.dtype(np.float32),
        ("FLOAT16", 16): np.dtype(np.float16),
        ("BFLOAT16", 16): np.dtype(ml_dtypes.bfloat16),
        ("FLOAT8_E4M3FN", 8): np.dtype(ml_dtypes.float8_e4m3fn),
        ("FLOAT8_E4M3FNUZ", 8): np.dtype(ml_dtypes.float8_e4m3fnuz),
        ("FLOAT8_E5M2", 8): np.dtype(ml_dtypes.float8_e5m2),
        ("FLOAT8_E5M2FNUZ", 8): np.dtype(ml_dtypes.float8_e5m2fnuz),
        ("FLOAT8_E8M0FNU", 8): np.dtype(ml_dtypes.float8_e8m0fnu),
        ("FLOAT6_E2M3FN", 8): np.dtype(ml_dtypes.float6_e2m3fn),
        ("FLOAT6_E3M2FN", 8): np.dtype(ml_dtypes.float6_e3m2fn),
        ("FLOAT4_E2M1FN", 4): np.dtype(ml_dtypes.float4_e2m1fn),
    }
)
#: The dtypes whose elements C has a type for that can hold nothing else; those of the others are bits in integers.
_NATIVE_FLOATS = frozenset((np.dtype(np.float32), np.dtype(np.float64)))


class CHeaderReader:
    """Reads a .h file, with the .c file beside it where that holds the arrays."""

    def read(self, path: Path) -> Model:
        """The tensors in the table's order; arrays are only located. Raises CorruptFile for text that the writer did
        not make or that contradicts itself, Unsupported for another interface or arrays that are not in the text."""
        declarations = _declarations(path)
        table = _table(path, declarations)
        builder = _ModelBuilder(declarations, table, PayloadFiles(declarations, Allowance(declarations.nbytes)))
        tensors: dict[str, Tensor] = {}
        names = UniqueNames(separator=":")  # C had to cut names that are too long for it
        for row in builder.rows():
            name = names.fresh(row.text("name"))
            tensors[name] = builder.tensor(name, row)
        return Model(tensors, Metadata("cheader", "nibblecast", path))


def _declarations(path: Path) -> Declarations:
    declarations = Declarations()
    header = MappedFile.open(path)
    declarations.add(header)
    if declarations.tables or not any(name.endswith("_tensors") for name in declarations.declared):
        return declarations
    source = path.with_suffix(".c")
    refuse_outside(source, path.parent)
    if not source.exists():
        message = f"its arrays are in {source.name}, which is not beside it: copy both files"
        raise MissingFile(message, file=source, path=path)
    declarations.add(MappedFile.open(source))
    return declarations


def _table(path: Path, declarations: Declarations) -> ArrayText:
    if not declarations.tables:
        raise CorruptFile(
            "was not written by nibblecast, or not whole: it has no table of tensors, which is needed to read it back",
            path=path,
        )
    if len(declarations.tables) > 1:
        raise CorruptFile(f"holds the tables {', '.join(declarations.tables)}; one is needed", path=path)
    if declarations.interface != INTERFACE:
        raise Unsupported(
            f"is for NIBBLECAST_INTERFACE {declarations.interface}; {INTERFACE} is what can be read here: "
            "write it anew, or read it with the version of nibblecast that wrote it",
            path=path,
        )
    for declared in declarations.declared.values():
        defined = declarations.arrays.get(declared.name) or declarations.tables.get(declared.name)
        if defined is not None and not declarations.same(declared, defined):
            raise corrupt(
                declared.file,
                declared.start,
                f"{declared.name} is declared otherwise than in {defined.file.path.name}: "
                "the two files are not of one run",
            )
    return next(iter(declarations.tables.values()))


@dataclass(frozen=True, slots=True, eq=False)
class _ModelBuilder:
    """Makes tensors of the table's rows."""

    declarations: Declarations
    table: ArrayText
    payloads: PayloadFiles
    kept: CachedArrays = field(default_factory=CachedArrays)

    def rows(self) -> Iterable[Row]:
        """The rows that are tensors: all, save the one that stands in the table of a model without any. Raises
        CorruptFile when they are not as many as the macro says."""
        rows = list(rows_of(self.table))
        length = self.declarations.length_of(self.table)
        if length is not None and length != len(rows):
            raise corrupt(self.table.file, self.table.start, f"{self.table.name}[{length}] has {len(rows)} entries")
        if len(rows) == 1 and rows[0].array("data") is None and not rows[0].number("count", self.declarations):
            rows = []
        prefix = self.table.name.removesuffix("_tensors")
        if not rows and f"{prefix}_MODEL_BYTES".encode() in self.declarations.macros:
            raise Unsupported(
                f"holds a model file as the array {prefix}_model, and no tensors: read that file instead, "
                "which the comment on top names",
                path=self.table.file.path,
            )
        self._agrees(f"{prefix}_TENSOR_COUNT", len(rows), self.table.start)
        return rows

    def tensor(self, name: str, row: Row) -> Tensor:
        """The tensor of a row. Raises CorruptFile when its parts do not fit each other."""
        try:
            tensor = self._tensor(name, row)
            self._cross_check(tensor, row)
        except Error as error:
            error.tensor = name
            error.path = error.path or self.table.file.path
            raise
        return tensor

    def _tensor(self, name: str, row: Row) -> Tensor:
        kind, bits = row.number("kind", self.declarations), row.number("bits", self.declarations)
        dtype = _DTYPES.get((KIND_NAMES.get(kind, ""), bits))
        if dtype is None:
            raise Unsupported(f"is of kind {kind} with {bits} bits, which is unknown to this version of nibblecast")
        rank = row.number("rank", self.declarations)
        shape = checked_shape(self._sizes(row, "shape", rank))
        packing = self._packing(row, bits)
        nbytes = packed_size(prod(shape), bits) if packing == DENSE else packing.nbytes(shape, bits)
        data = self._data(name, row, "data", nbytes, dtype)
        if data is None:
            raise CorruptFile("has no data")
        if packing != DENSE and isinstance(data, ElementData | StoredData):
            data = PackedData(data, packing, shape, dtype)
        return Tensor(name, shape, dtype, data, self._quantization(name, row, shape, bits))

    def _packing(self, row: Row, bits: int) -> Packing:
        number = row.number("packing", self.declarations)
        packing = PACKINGS.get(number)
        if packing is None:
            raise Unsupported(f"is of packing {number}, which is unknown to this version of nibblecast")
        if packing != DENSE and bits >= 8:
            raise CorruptFile(f"is of packing {packing.macro}, but has elements of {bits} bits")
        return packing

    def _quantization(self, name: str, row: Row, shape: tuple[int, ...], bits: int) -> Quantization | None:
        if row.array("scale") is None:
            return None
        block_shape, sizes = (self._sizes(row, member, len(shape)) for member in ("block_shape", "grid"))
        grid = checked_shape(sizes)
        integers, reals = (self._parameter(name, row, member, grid) for member in ("zero_point", "zero_point_real"))
        if integers is not None and reals is not None:
            raise CorruptFile("has both zero_point and zero_point_real")
        scale = self._parameter(name, row, "scale", grid)
        if scale is None:
            raise CorruptFile("has no scale")
        return Quantization(
            scale,
            block_shape,
            integers or reals,
            self._parameter(name, row, "offset", grid),
            self._parameter(name, row, "codebook", (1 << bits,)),
            self._group_index(name, row, shape, grid),
        )

    def _group_index(self, name: str, row: Row, shape: tuple[int, ...], grid: tuple[int, ...]) -> GroupIndex | None:
        if row.array("group_index") is None:
            return None
        axis = row.number("axis", self.declarations)
        if axis >= len(shape):
            raise CorruptFile(f"has a group index along axis {axis} of {len(shape)}")
        index = self._parameter(name, row, "group_index", (shape[axis],), limit=grid[axis])
        return None if index is None else GroupIndex(axis, index)

    def _parameter(
        self, name: str, row: Row, member: str, shape: tuple[int, ...], limit: int | None = None
    ) -> Tensor | None:
        dtype = _PARAMETER_DTYPES[member]
        data = self._data(name, row, member, prod(shape) * dtype.itemsize, dtype, limit)
        return None if data is None else Tensor(f"{name}.{member}", shape, dtype, data)

    def _data(
        self, name: str, row: Row, member: str, nbytes: int, dtype: np.dtype[Any], limit: int | None = None
    ) -> Data | None:
        """The bytes of the array that a member points to; None for NULL."""
        array_name = row.array(member)
        if array_name is None:
            return None
        array = self._array(array_name)
        element = np.dtype(ELEMENT_TYPES[array.element_type])
        limit = 2 if dtype.kind == "b" else limit
        is_divided = limit is not None and element.itemsize < dtype.itemsize
        if ((element.kind == "f" or dtype in _NATIVE_FLOATS) and element != dtype) or is_divided:
            raise CorruptFile(f"{array_name} is of {array.element_type.decode()}, but {dtype} are needed")
        if nbytes == 0:
            return InMemory(np.zeros(0, np.uint8))
        if array.placement is not None:
            if element.itemsize != 1:
                raise CorruptFile(f"{array_name} is of {array.element_type.decode()}, but its bytes lie in a file")
            return self.payloads.data(array, array.placement, nbytes, name, limit)
        length = self.declarations.length_of(array)
        needed, possible = -(-nbytes // element.itemsize), _most_elements(array)
        if (length is not None and length < needed) or max(needed, length or 0) > possible:
            raise corrupt(
                array.file,
                array.start,
                f"{array_name} has {possible if length is None else length} elements in {array.stop - array.start} "
                f"characters, but {needed} are needed: it is truncated or damaged",
            )
        # the text, as a damaged table may have any number of tensors read all of it for an element each
        self.payloads.allowance.hold(max(nbytes, array.stop - array.start))
        return ElementData(array, nbytes, length, name, dtype, limit, lines_of(array), self.kept)

    def _array(self, name: str) -> ArrayText:
        array = self.declarations.array(name)
        if array is not None:
            return array
        where = self.table.file.path.name
        if name in self.declarations.declared:
            raise Unsupported(
                f"the elements of {name} are not in {where}: only arrays that are written out, or are bytes of one "
                "file, can be read back: write it anew"
            )
        raise CorruptFile(f"the table names the array {name}, which is not there: the file is truncated or damaged")

    def _sizes(self, row: Row, member: str, rank: int) -> tuple[int, ...]:
        name = row.array(member)
        if rank > MOST_DIMENSIONS or (name is None and rank):
            raise CorruptFile(f"has rank {rank}, but its {member} is {name}")
        if name is None or not rank:
            return ()
        array = self._array(name)
        if array.placement is not None or _most_elements(array) > 1 << 16 or array.element_type != b"size_t":
            raise CorruptFile(f"its {member} {name} is not a list of {rank} sizes")
        sizes = all_elements(array)
        if sizes.size != rank or self.declarations.length_of(array) not in (None, rank):
            raise CorruptFile(f"has rank {rank}, but its {member} {name} has {sizes.size} elements")
        return tuple(int(size) for size in sizes)

    def _cross_check(self, tensor: Tensor, row: Row) -> None:
        """Raises CorruptFile when the table or the macros contradict what the arrays are."""
        count = row.number("count", self.declarations)
        if count != tensor.size:
            raise CorruptFile(f"has shape {tensor.shape}, but its count is {count}")
        granularity, axis = granularity_of(tensor)
        given = GRANULARITY_NAMES.get(row.number("granularity", self.declarations))
        if given != granularity:
            raise CorruptFile(f"has granularity {given}, but its blocks are {granularity}")
        if axis is not None and row.number("axis", self.declarations) != axis:
            raise CorruptFile(f"has axis {row.number('axis', self.declarations)}, but its blocks are along {axis}")
        base = (row.array("data") or "").removesuffix("_data")
        for suffix, value in _macros(tensor, self._packing(row, tensor.bits), granularity, axis):
            self._agrees(f"{base}_{suffix}", value, row.offset)

    def _agrees(self, macro: str, value: int, offset: int) -> None:
        """Raises CorruptFile when there is such a macro, and it is another number."""
        if macro.encode() in self.declarations.macros:
            defined = self.declarations.integer(macro.encode(), self.table.file, offset)
            if defined != value:
                raise CorruptFile(
                    f"{macro} is {defined}, but the table says {value}: the files are damaged or not of one run",
                    path=self.table.file.path,
                )


_PARAMETER_DTYPES: Mapping[str, np.dtype[Any]] = {
    **dict.fromkeys(("scale", "zero_point_real", "offset", "codebook"), np.dtype(np.float32)),
    "zero_point": np.dtype(np.int32),
    "group_index": np.dtype(np.uint16),
}


def _most_elements(array: ArrayText) -> int:
    """How many elements the text has room for."""
    characters = array.stop - array.start
    return characters if array.is_string else characters // 2 + 1


def _macros(tensor: Tensor, packing: Packing, granularity: str, axis: int | None) -> Iterator[tuple[str, int]]:
    """What the macros of a tensor must be, by the ends of their names."""
    yield from (
        ("KIND", _KIND_NUMBERS[kind_of(tensor)]),
        ("BITS", tensor.bits),
        ("SIGNED", int(is_signed(tensor))),
        ("RANK", len(tensor.shape)),
        ("COUNT", tensor.size),
        ("BYTES", tensor.nbytes if packing == DENSE else packing.nbytes(tensor.shape, tensor.bits)),
        ("PACKING", _PACKING_NUMBERS[packing.macro]),
        ("GRANULARITY", _GRANULARITY_NUMBERS[granularity]),
    )
    yield from ((f"DIM{i}", size) for i, size in enumerate(tensor.shape))
    if axis is not None:
        yield "AXIS", axis
    parameters = {}
    if tensor.quantization is not None:
        yield from ((f"BLOCK{i}", size) for i, size in enumerate(tensor.quantization.block_shape))
        parameters = dict(tensor.quantization.parameters())
    for role in ("scale", "zero_point", "offset", "codebook"):
        yield f"{role.upper()}_COUNT", parameters[role].size if role in parameters else 0


_KIND_NUMBERS = {name: number for number, name in KIND_NAMES.items()}
_PACKING_NUMBERS = {name: number for number, name in PACKING_NAMES.items()}
_GRANULARITY_NUMBERS = {name: number for number, name in GRANULARITY_NAMES.items()}
