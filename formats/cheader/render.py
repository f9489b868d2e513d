"""The text around the arrays, filled into the templates: comments, macros, declarations, the table of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import Template

import numpy as np

from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.arrays import (
    ALIGNMENT,
    Arrangement,
    Array,
    granularity_of,
    integer_zero_point,
    is_signed,
    kind_of,
)
from nibblecast.formats.cheader.device.flash import FlashReport, TensorFlash, tensor_flash
from nibblecast.formats.cheader.device.kernels import advice
from nibblecast.formats.cheader.identifiers import MAX_STRING, MAX_STRING_C90, Identifiers, comment, string_literal
from nibblecast.formats.cheader.packings import DENSE, Packing, packing_for
from nibblecast.formats.cheader.provenance import Provenance

#: What `NIBBLECAST_INTERFACE` in templates/nibblecast.h must be for the text that this module makes.
INTERFACE = 3

_TEMPLATES = Path(__file__).parent / "templates"
_ROLES = ("data", "scale", "zero_point", "offset", "codebook", "group_index")
_ALIGNED = ("data", "model")
_TABLES = ("shape", "block_shape", "grid")
_MACROS = ("KIND", "BITS", "SIGNED", "RANK", "COUNT", "BYTES", "GRANULARITY", "AXIS", "PACKING")
_COUNTED = ("scale", "zero_point", "offset", "codebook")
_FIXED_POINT = ("multiplier", "shift", "MULTIPLIER_COUNT", "INPUT_OFFSET", "OUTPUT_OFFSET")


_LONGEST_AVR = (1 << 15) - 1
_AVR_POINTERS_REACH = 1 << 16

#: C knows no empty arrays: the one element of an array that would be empty, and the one row of such a table.
PLACEHOLDER = "    0\n"
_NO_TENSOR = f'    {{"", NULL, 0, {", ".join(["NULL"] * 9)}, {", ".join(["0"] * 6)}}},\n'


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that is written, the base of its identifiers, its arrays, where its data lie in the .bin file, how they
    are packed, and whether multipliers and shifts are wanted."""

    tensor: Tensor
    base: str
    arrays: Sequence[Array]
    offset: int = 0
    packing: Packing = DENSE
    fixed_point: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of flash that its arrays hold."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def is_in_file(self) -> bool:
        """Whether its data are in the .bin file."""
        return self.arrays[0].style.in_file

    @property
    def end(self) -> int:
        """Where its data end in the .bin file; 0 where they are not in it."""
        return self.offset + self.arrays[0].nbytes if self.is_in_file else 0

    @property
    def aligned_nbytes(self) -> int:
        """Bytes of flash that its arrays take at most."""
        return sum(array.aligned_nbytes for array in self.arrays)

    @property
    def cost(self) -> TensorFlash:
        """What it costs on a device."""
        parameters = sum(array.nbytes for array in self.arrays[1:])
        return tensor_flash(self.tensor, self.nbytes, self.aligned_nbytes, parameters, self.packing)


@dataclass(frozen=True, slots=True)
class Document:
    """A model in C: `file` is the name of the header, `static` says whether it is all that there is. `model` is the
    whole source file, where that is wanted too; it comes after the tensors' arrays."""

    file: str
    prefix: str
    entries: Sequence[Entry]
    static: bool
    arrangement: Arrangement
    model: Entry | None = None

    @property
    def everything(self) -> Sequence[Entry]:
        """The tensors, and the source file if it is there."""
        return self.entries if self.model is None else (*self.entries, self.model)

    @property
    def flash(self) -> FlashReport:
        """What the arrays cost on a device."""
        return FlashReport(tuple(entry.cost for entry in self.everything))

    def header(self, provenance: Provenance) -> str:
        """The header without the arrays and the table, which follow in a single header."""
        guard = f"NIBBLECAST_{self.prefix}_H"
        declarations = "".join(_tensor_text(entry, self.static, self._placed) for entry in self.entries)
        if self.model is not None:
            declarations += _model_text(self.prefix, self.model, self.static, self._placed)
        return _fill(
            "single.h" if self.static else "split.h",
            about=self._about(provenance),
            guard=guard,
            runtime=runtime_header() if self.static else "",
            check=self._check(),
            prefix=self.prefix,
            declarations=declarations,
            table_length=str(self._table_length),
            opening=self._opening(),
        )

    def source_opening(self, file: str, provenance: Provenance) -> str:
        """What comes before the arrays in the .c file of this name."""
        return _fill(
            "split.c",
            file=comment(file),
            header=self.file,
            provenance=provenance.lines(),
            opening=self._opening(),
        )

    def array_text(self, entry: Entry, array: Array) -> tuple[str, str]:
        """What comes before and after the elements of one of the entry's arrays."""
        name = f"{entry.base}_{array.role}"
        before, after = _split(array.style.declaration)
        values = {
            "name": name,
            "prefix": self.prefix,
            "placed": self._placed,
            "type": array.notation.c_type,
            "length": str(array.length),
            "offset": str(entry.offset),
            "static": "static " if self.static else "",
            "aligned": f"NIBBLECAST_ALIGNED({self.prefix}_ALIGN) " if self._is_aligned(array) else "",
        }
        return before.substitute(values), after.substitute(values)

    @property
    def longest_string(self) -> int:
        """Characters of the longest string that every compiler takes."""
        return MAX_STRING_C90 if self.arrangement.c90 else MAX_STRING

    def table(self) -> str:
        """The shapes and the table of tensors, and the end of a single header."""
        static = "static " if self.static else ""
        shapes = "".join(_shape_tables(entry) for entry in self.entries)
        rows = "".join(_table_row(entry, self.longest_string) for entry in self.entries) or _NO_TENSOR
        table = f"{static}const nibblecast_tensor {self.prefix}_tensors[{self._table_length}] = {{\n{rows}}};\n"
        style = self.arrangement.style
        closing = _fill(style.closing) if style.closing else ""
        return f"{shapes}\n{table}{closing}" + ("\n#endif\n" if self.static else "")

    @property
    def payload_file(self) -> str:
        """The name of the file of data that the compiler reads, where there is one."""
        return f"{self.file.rpartition('.')[0] or self.file}.bin"

    @property
    def payload_nbytes(self) -> int:
        """The size of that file."""
        return max((entry.end for entry in self.everything), default=0)

    @property
    def _placed(self) -> str:
        """What the macros around arrays begin with."""
        return self.prefix if self.arrangement.section else "NIBBLECAST"

    def _is_aligned(self, array: Array) -> bool:
        """Whether its alignment must be said: wider elements have a wider one."""
        return array.role in _ALIGNED and array.notation.nbytes <= self.arrangement.alignment

    @property
    def _table_length(self) -> int:
        return max(1, len(self.entries))

    def _opening(self) -> str:
        style = self.arrangement.style
        if not style.opening:
            return ""
        longest = max((array.length for entry in self.everything for array in entry.arrays[:1]), default=0)
        values = {
            "prefix": self.prefix,
            "bin": comment(self.payload_file),
            "longest": str(longest),
            "section": self.arrangement.section or '.rodata." name "',
        }
        return _fill(style.opening, **values)

    def _about(self, provenance: Provenance) -> str:
        return _fill(
            "about",
            file=comment(self.file),
            provenance=provenance.lines(),
            prefix=self.prefix,
            alignment=str(self.arrangement.alignment),
            others=str(ALIGNMENT),
            packing=_packing_text(self.arrangement.packing),
            fixed_point=_read("about_fixed_point.template") if any(e.fixed_point for e in self.entries) else "",
            sizes=self.flash.comment([_label(entry) for entry in self.everything]),
        )

    def _check(self) -> str:
        section = self.arrangement.section
        flash = sum(entry.nbytes for entry in self.everything)
        too_far = {"prefix": self.prefix, "nbytes": str(flash), "reach": str(_AVR_POINTERS_REACH)}
        return _fill(
            "check",
            interface=str(INTERFACE),
            prefix=self.prefix,
            alignment=str(self.arrangement.alignment),
            packing=_fill("check.packing") if any(entry.packing != DENSE for entry in self.entries) else "",
            section=_fill("check.section", prefix=self.prefix, section=section) if section else "",
            double=_fill("check.double") if any(entry.tensor.dtype == np.float64 for entry in self.entries) else "",
            far=_fill("check.avr", **too_far) if flash > _AVR_POINTERS_REACH else "",
            count=f"{len(self.entries)}u",
            flash=f"{flash}u",
            aligned_flash=f"{sum(entry.aligned_nbytes for entry in self.everything)}u",
        )


def entries_of(
    prefix: str, tensors: Iterable[Tensor], arrangement: Arrangement, *, fixed_point: bool = False
) -> tuple[Entry, ...]:
    """The tensors with their identifiers: at most 63 characters, all different, the same for the same names."""
    file_level = ("tensors", "TENSOR_COUNT", "FLASH_BYTES", "FLASH_BYTES_ALIGNED", "MODEL_BYTES", "model")
    identifiers = Identifiers(prefix, (f"{prefix}_{name}" for name in file_level))
    entries, end = [], 0
    for tensor in tensors:
        base = identifiers.claim(tensor.name, _suffixes(len(tensor.shape)))
        arrays = arrays_with(tensor, arrangement, fixed_point=fixed_point)
        packing = packing_for(tensor, arrangement.packing)
        entry = placed(Entry(tensor, base, arrays, packing=packing, fixed_point=fixed_point), end)
        entries.append(entry)
        end = max(end, entry.end)
    return tuple(entries)


def arrays_with(tensor: Tensor, arrangement: Arrangement, *, fixed_point: bool) -> tuple[Array, ...]:
    """The arrays of a tensor in the order in which they are written, multipliers and shifts last."""
    arrays = arrangement.arrays_of(tensor)
    if not fixed_point:
        return arrays
    from nibblecast.formats.cheader.device.fixed_point import fixed_point_arrays

    return (*arrays, *map(arrangement.filled, fixed_point_arrays(tensor)))


def placed(entry: Entry, end: int) -> Entry:
    """`entry` with its data behind byte `end` of the file of data that the compiler reads, if they lie there."""
    data = entry.arrays[0]
    return replace(entry, offset=-(-end // data.alignment) * data.alignment) if data.style.in_file else entry


def runtime_header() -> str:
    """nibblecast.h."""
    return _read("nibblecast.h")


def _suffixes(rank: int) -> tuple[str, ...]:
    names = [*_ROLES, *_TABLES, *_MACROS, *_FIXED_POINT, *(f"{role.upper()}_COUNT" for role in _COUNTED)]
    names += [f"{name}{axis}" for name in ("DIM", "BLOCK") for axis in range(rank)]
    return tuple(f"_{name}" for name in names)


def _tensor_text(entry: Entry, static: bool, placed: str) -> str:
    """The comment, the macros and, unless arrays are static, the declarations of one tensor."""
    tensor, base = entry.tensor, entry.base
    granularity, axis = granularity_of(tensor)
    counts = dict.fromkeys(_COUNTED, 0) | {array.role: array.count for array in entry.arrays}
    blocks = () if tensor.quantization is None else tensor.quantization.block_shape
    fits = advice(tensor, entry.packing)
    return _fill(
        "tensor",
        original=comment(tensor.name),
        fits="" if fits is None else f"/* {fits.line()} */\n",
        fixed_point=_fixed_point_macros(entry),
        dtype=str(tensor.dtype),
        shape=", ".join(map(str, tensor.shape)),
        granularity=tensor.granularity if tensor.quantization else "not quantized",
        base=base,
        kind=kind_of(tensor),
        bits=f"{tensor.bits}u",
        signed=str(int(is_signed(tensor))),
        rank=f"{len(tensor.shape)}u",
        dimensions=_numbered(f"{base}_DIM", tensor.shape),
        count=f"{tensor.size}u",
        nbytes=f"{entry.arrays[0].payload}u",
        packing=entry.packing.macro,
        too_long="".join(_too_long(base, array) for array in entry.arrays),
        granularity_macro=granularity,
        axis="" if axis is None else f"#define {base}_AXIS {axis}u\n",
        blocks=_numbered(f"{base}_BLOCK", blocks),
        externs="" if static else "".join(_extern(base, array, placed) for array in entry.arrays),
        **{f"{role}_count": f"{counts[role]}u" for role in _COUNTED},
    )


def _fixed_point_macros(entry: Entry) -> str:
    if not entry.fixed_point:
        return ""
    from nibblecast.formats.cheader.device.fixed_point import fixed_point

    found = fixed_point(entry.tensor)
    if found is None:
        return f"#define {entry.base}_MULTIPLIER_COUNT 0u\n"
    return _fill(
        "tensor_fixed_point",
        base=entry.base,
        count=f"{found.count}u",
        input_offset=str(found.input_offset),
        output_offset=str(found.output_offset),
    )


def _model_text(prefix: str, model: Entry, static: bool, placed: str) -> str:
    """The comment, the macro and, unless arrays are static, the declaration of the whole source file."""
    array = model.arrays[0]
    extern = _too_long(prefix, array) + ("" if static else _extern(prefix, array, placed))
    values = {"source": comment(model.tensor.name), "name": f"{prefix}_{array.role}", "prefix": prefix}
    return _fill("model", nbytes=f"{array.payload}u", extern=extern, **values)


def _numbered(name: str, values: Iterable[int]) -> str:
    return "".join(f"#define {name}{axis} {value}u\n" for axis, value in enumerate(values))


def _too_long(base: str, array: Array) -> str:
    """What stops avr-gcc, whose own message names no array."""
    if array.nbytes <= _LONGEST_AVR:
        return ""
    name = f"{base}_{array.role}"
    return _fill("avr", name=name, nbytes=str(array.nbytes), longest=str(_LONGEST_AVR))


def _extern(base: str, array: Array, placed: str) -> str:
    declarator = f"{base}_{array.role}[{array.length}]"
    return f"extern const NIBBLECAST_FAR {array.notation.c_type} {declarator} {placed}_AFTER;\n"


def _tables(tensor: Tensor) -> dict[str, tuple[int, ...]]:
    """The arrays of sizes that a table entry refers to; none for rank 0."""
    if not tensor.shape:
        return {}
    if tensor.quantization is None:
        return {"shape": tensor.shape}
    quantization = tensor.quantization
    return {"shape": tensor.shape, "block_shape": quantization.block_shape, "grid": quantization.scale.shape}


def _shape_tables(entry: Entry) -> str:
    return "".join(
        f"static const size_t {entry.base}_{name}[{len(sizes)}] = {{{', '.join(f'{size}u' for size in sizes)}}};\n"
        for name, sizes in _tables(entry.tensor).items()
    )


def _table_row(entry: Entry, longest_string: int) -> str:
    tensor, base = entry.tensor, entry.base
    members = dict.fromkeys((*_ROLES, *_TABLES, "zero_point_real"), "NULL")
    members |= {name: f"{base}_{name}" for name in _tables(tensor)}
    members |= {array.role: f"{base}_{array.role}" for array in entry.arrays}
    if not integer_zero_point(tensor):
        members["zero_point_real"], members["zero_point"] = members["zero_point"], "NULL"
    axis = "0" if granularity_of(tensor)[1] is None else f"{base}_AXIS"
    return _fill("entry", base=base, name=string_literal(tensor.name, longest_string), axis=axis, **members)


def _packing_text(packing: Packing) -> str:
    """How codes of 2 and 4 bits lie in bytes, as the end of a sentence."""
    if packing.unpacked:
        return "one to a byte"
    order = "highest" if packing.high_first else "lowest"
    rows = "each row of the last axis from a new byte on" if packing.rows_padded else "no padding between rows"
    return f"packed, the first in the {order} bits, {rows}"


def _label(entry: Entry) -> str:
    role = entry.arrays[0].role
    return entry.base if role == "data" else f"{entry.base}_{role}"


def _fill(template: str, **values: str) -> str:
    return _template(template).substitute(values)


@cache
def _template(name: str) -> Template:
    return Template(_read(f"{name}.template"))


@cache
def _split(template: str) -> tuple[Template, Template]:
    """What comes before and after the elements in the template of an array."""
    before, _, after = _read(f"{template}.template").partition("$elements")
    return Template(before), Template(after)


@cache
def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("ascii")
