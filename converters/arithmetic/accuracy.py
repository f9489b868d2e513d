"""The error of quantization: how far decoded values are from the floats that they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp, inf, log10

import numpy as np
from numpy.typing import NDArray

_LARGEST_EXPONENT = 126


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The error of a tensor's codes: the largest absolute error and the mean squared error, in the values' unit, and
    the signal-to-noise ratio, 10 * log10(sum of values ** 2 / sum of errors ** 2), in decibels (infinite if all values
    are exact)."""

    tensor: str
    kind: str
    elements: int
    max_error: float
    squared_error: float
    squared_values: float

    @property
    def mean_square_error(self) -> float:
        """The sum of squared errors over the number of elements."""
        return self.squared_error / max(1, self.elements)

    @property
    def signal_to_noise(self) -> float:
        """In decibels."""
        if self.squared_error == 0:
            return inf
        ratio = self.squared_values / self.squared_error
        return 10 * log10(ratio) if ratio else -inf

    @classmethod
    def total(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """The accuracy of all parts together."""
        return cls(
            tensor="",
            kind="",
            elements=sum(part.elements for part in parts),
            max_error=max((part.max_error for part in parts), default=0.0),
            squared_error=sum(part.squared_error for part in parts),
            squared_values=sum(part.squared_values for part in parts),
        )


def errors(values: NDArray[np.float32], decoded: NDArray[np.float32]) -> tuple[float, float, float]:
    """The largest error, the sum of squared errors and the sum of squared values, for two arrays of one shape with at
    least one element. `decoded` is overwritten."""
    largest, squared_error = _largest_and_sum_of_squares(np.subtract(decoded, values, out=decoded))
    return largest, squared_error, _largest_and_sum_of_squares(values)[1]


def _largest_and_sum_of_squares(numbers: NDArray[np.float32]) -> tuple[float, float]:
    """The largest absolute value and the sum of squares. Numbers are squared in units of a power of two near the
    largest, so that float32 does not overflow. NumPy sums pairwise, and unlike a dot product starts no threads."""
    largest = max(float(numbers.max()), -float(numbers.min()))
    unit = 2.0 ** max(frexp(largest)[1], -_LARGEST_EXPONENT)
    scaled = np.multiply(numbers, np.float32(1 / unit))
    return largest, float(np.square(scaled, out=scaled).sum()) * unit**2
