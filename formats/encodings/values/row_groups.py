"""Linear layers' weights in groups along their rows, with a scale and a zero point for each: what GPTQ and AWQ hold.

Their configurations have one group size for a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from sys import maxsize

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Loss, Quantization, Tensor
from nibblecast.formats.encodings.values.offsets import offsets_as_zero_points
from nibblecast.formats.encodings.values.refit import (
    constant,
    elementwise,
    extent,
    in_row_groups,
    integer_quantization,
    rounded_with_scales,
    unsigned,
    without_factor,
)

#: What configurations say for whole rows.
WHOLE_ROWS = -1


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """A weight of shape (O, I) with unsigned codes and, of their dtype, a zero point for each group; `zeros` are the
    smallest and the largest one. `losses` are those of values that libraries compute otherwise."""

    weight: Tensor
    quantization: Quantization
    zero_point: Tensor
    zeros: tuple[int, int]
    losses: tuple[Loss, ...]


def row_groups(weight: Tensor) -> RowGroups:
    """A matrix of integer codes as such, with the same values. Raises Unsupported for what cannot be."""
    weight, of_offset = offsets_as_zero_points(weight)
    source = integer_quantization(weight)
    folded, of_factor = without_factor(weight)
    grouped, _ = in_row_groups(folded)
    scaled, of_scales = rounded_with_scales(grouped, widened=False)
    lowered = unsigned(scaled)
    quantization = integer_quantization(lowered)
    wide = quantization.zero_point or constant("zero_point", 0, quantization.scale.shape, lowered.dtype)
    added = 1 << weight.bits - 1 if lowered.dtype != weight.dtype else 0
    zeros = (added, added) if source.zero_point is None else extent(wide)
    if zeros[0] < 0 or zeros[1] >= 1 << lowered.bits:
        message = f"has zero points from {zeros[0]} to {zeros[1]}, outside its codes of {lowered.bits} bits"
        raise Unsupported(message, tensor=weight.name)
    zero_point = elementwise(replace(wide, name="zero_point"), lowered.dtype, lambda stored: stored)
    scale = Tensor("scale", wide.shape, quantization.scale.dtype, quantization.scale.data)
    quantization = replace(quantization, scale=scale, zero_point=zero_point)
    kept = Tensor(weight.name, lowered.shape, lowered.dtype, lowered.data, quantization)
    return RowGroups(kept, quantization, zero_point, zeros, of_offset + of_factor + of_scales)


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """The sizes that mean the groups of one weight, from `smallest` to `largest`; with `is_row` whole rows do, too."""

    smallest: int
    largest: int
    is_row: bool = False

    def __str__(self) -> str:
        if self.largest == maxsize:
            return f"{self.smallest} or more"
        return f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"


def sizes_for(inputs: int, groups: int) -> GroupSizes | None:
    """The sizes that divide so many inputs into so many groups, of which the last may be shorter; None: none does."""
    if groups == 1:
        return GroupSizes(inputs, maxsize, is_row=True)
    smallest, largest = -(-inputs // groups), (inputs - 1) // (groups - 1)
    return GroupSizes(smallest, largest) if smallest <= largest else None


def common_size(sizes: Mapping[str, GroupSizes]) -> int:
    """The size for all weights: -1 where each has one group for a row. Raises Unsupported where there is no weight, or
    no such size, with the names of two weights that contradict each other."""
    if not sizes:
        raise Unsupported("has no quantized weight that can be encoded so: --quantize makes some")
    if all(size.is_row for size in sizes.values()):
        return WHOLE_ROWS
    large = max(sizes, key=lambda name: sizes[name].smallest)
    small = min(sizes, key=lambda name: sizes[name].largest)
    if sizes[large].smallest > sizes[small].largest:
        raise Unsupported(
            f"has groups of {sizes[large]}, but '{small}' of {sizes[small]}: there is one group size for a model; "
            "--quantize makes them alike",
            tensor=large,
        )
    return sizes[large].smallest


def notes_on(weights: Mapping[str, Quantization], size: int, kernel_sizes: frozenset[int]) -> list[str]:
    """What users should know of scales and group sizes that libraries treat otherwise than files do."""
    notes = []
    dtypes = sorted({str(quantization.scale.dtype) for quantization in weights.values()} - {"float16"})
    if dtypes:
        notes.append(
            f"scales are stored in {' and '.join(dtypes)}; gptqmodel, and transformers with it, convert them to the "
            "dtype in which the model is loaded"
        )
    if size not in kernel_sizes:
        known = ", ".join(map(str, sorted(kernel_sizes - {WHOLE_ROWS})))
        notes.append(f"groups are of {size} inputs; gptqmodel's kernels take groups of {known} and whole rows only")
    return notes
