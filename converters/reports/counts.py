"""Histograms of codes and of parameters, in bounded memory: counted piece by piece, each byte read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of, is_float
from nibblecast.converters.arithmetic.packing import byte_table, unpack
from nibblecast.converters.ir import Tensor

_float_information: Callable[[np.dtype[Any]], Any] = ml_dtypes.finfo
_PIECE_BYTES = 1 << 20
BINS_PER_OCTAVE = 4
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -150, 128  # of float32


@dataclass(frozen=True, slots=True)
class CodeCounts:
    """How often each code is used: `values` are the codes of the dtype in ascending order, integers or the numbers that
    small floats are (without NaN and infinities, which are counted in `not_finite`), `counts` their counts."""

    values: tuple[float, ...]
    counts: tuple[int, ...]
    not_finite: int = 0

    @property
    def total(self) -> int:
        """The number of elements."""
        return sum(self.counts) + self.not_finite

    @property
    def unused(self) -> int:
        """The number of codes that do not occur."""
        return self.counts.count(0)

    @property
    def lowest_share(self) -> float:
        """The share of elements with the dtype's lowest code."""
        return self.counts[0] / max(1, self.total)

    @property
    def highest_share(self) -> float:
        """The share of elements with the dtype's highest code."""
        return self.counts[-1] / max(1, self.total)


@dataclass(frozen=True, slots=True)
class Spread:
    """The numbers that a parameter has. `lowest`, `highest` and `mean` are those of the finite ones (NaN where there
    are none). `bins` are pairs, ascending: i, and how many absolute values lie in [2 ** (i / 4), 2 ** ((i + 1) / 4)).
    """

    count: int
    lowest: float
    highest: float
    mean: float
    zeros: int
    negative: int
    not_finite: int
    bins: tuple[tuple[int, int], ...] = ()


def codes_of(tensor: Tensor) -> CodeCounts | None:
    """The histogram of a tensor's codes; None if they are wider than 8 bits."""
    if tensor.bits > 8:
        return None
    values, patterns = _values_and_patterns(tensor.dtype)
    counts = np.zeros(len(patterns), np.int64)
    for part in tensor.parts(_PIECE_BYTES):
        counts += _pattern_counts(part)[: len(patterns)]
    finite = np.isfinite(values)
    return CodeCounts(
        values=tuple(values[finite].tolist()),
        counts=tuple(counts[patterns][finite].tolist()),
        not_finite=int(counts[patterns][~finite].sum()),
    )


def _values_and_patterns(dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The number and the bit pattern of each code, in ascending order of the numbers."""
    if is_float(dtype):
        width = int(_float_information(dtype).bits)
        values = np.arange(1 << width, dtype=np.uint8).view(dtype).astype(np.float32)
        patterns = np.lexsort((~np.signbit(values), values))  # -0 before 0
        return values[patterns], patterns
    count = 1 << bits_of(dtype)
    lowest = -(count // 2) if np.array(-1).astype(dtype) < 0 else 0
    codes = np.arange(lowest, lowest + count)
    return codes, codes & (count - 1)


def _pattern_counts(tensor: Tensor) -> NDArray[np.int64]:
    """How often each bit pattern occurs, shape (256,)."""
    packed = tensor.packed()
    if tensor.dtype not in SUB_BYTE:
        return np.bincount(packed, minlength=256)
    table = byte_table(tensor.dtype).view(np.uint8) & ((1 << tensor.bits) - 1)
    whole = tensor.size // table.shape[1]
    counts = np.zeros(256, np.int64)
    # bytes are counted, not codes: there are fewer, and nothing has to be unpacked
    np.add.at(counts, table, np.bincount(packed[:whole], minlength=256)[:, np.newaxis])
    rest = unpack(packed[whole:], tensor.dtype, tensor.size - whole * table.shape[1]).view(np.uint8)
    return counts + np.bincount(rest & ((1 << tensor.bits) - 1), minlength=256)


@dataclass(slots=True)
class _Spreading:
    """A `Spread` that is still being counted."""

    count: int = 0
    zeros: int = 0
    negative: int = 0
    not_finite: int = 0
    lowest: float = nan
    highest: float = nan
    total: float = 0.0
    bins: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * BINS_PER_OCTAVE, np.int64)
    )

    def add(self, numbers: NDArray[np.float32]) -> None:
        """Counts more numbers, shape (n,)."""
        finite = numbers[np.isfinite(numbers)]
        self.count += numbers.size
        self.not_finite += numbers.size - finite.size
        if finite.size == 0:
            return
        lowest, highest = float(finite.min()), float(finite.max())
        self.lowest = lowest if self.lowest != self.lowest else min(self.lowest, lowest)
        self.highest = highest if self.highest != self.highest else max(self.highest, highest)
        self.total += float(finite.sum(dtype=np.float64))
        self.zeros += int((finite == 0).sum())
        self.negative += int((finite < 0).sum())
        octaves = np.log2(np.abs(finite[finite != 0]).astype(np.float64)) - _LOWEST_EXPONENT
        bins = np.floor(octaves * BINS_PER_OCTAVE).astype(np.intp)
        self.bins += np.bincount(bins, minlength=self.bins.size)

    def done(self) -> Spread:
        """All of them."""
        used = np.flatnonzero(self.bins)
        numbers = used + _LOWEST_EXPONENT * BINS_PER_OCTAVE
        finite = self.count - self.not_finite
        return Spread(
            count=self.count,
            lowest=self.lowest,
            highest=self.highest,
            mean=self.total / finite if finite else nan,
            zeros=self.zeros,
            negative=self.negative,
            not_finite=self.not_finite,
            bins=tuple(zip(numbers.tolist(), self.bins[used].tolist(), strict=True)),
        )


def spread_of(parameter: Tensor) -> Spread:
    """The numbers that a parameter has, as float32."""
    spreading = _Spreading()
    for part in parameter.parts(_PIECE_BYTES):
        spreading.add(part.dequantize(np.float32).reshape(-1))
    return spreading.done()
