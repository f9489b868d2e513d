"""The arithmetic of quantization: scales and zero points of blocks of floats, and their nearest codes.

    code = clip(round(value / scale) + zero_point, lowest, highest)          ties to the even code, one float32 division
    value = scale * (code - zero_point)                                      as `dequantize` computes it

Blocks come as float32 arrays of shape (k, b, q): b elements of k * q blocks, along axis 1. Their parameters are float32
arrays of shape (k, 1, q) while computing, and of shape (k * q,) elsewhere; scales have been rounded to the dtype that
they will be stored in before any code is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import Unsupported

Floats = NDArray[np.float32]

#: Each call gives the elements of some blocks anew, in pieces: the positions of the piece's blocks, and all or a part
#: of their elements. A function, not a list, so that several passes need no memory for all floats.
Pieces = Callable[[], Iterable[tuple[slice, Floats]]]

#: Factors of the min-max range that are tried for the least mean square error: above 1 for values near both ends, far
#: below 1 for long rows with outliers.
_RATIOS = (0.14, 0.2, 0.3, 0.4, *np.linspace(0.5, 1.15, 16).tolist())
_REFINEMENTS = 2


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes that floats become, and how their scales are chosen. Codes are `lowest` to `highest`; in symmetric
    schemes `middle` is the code of zero. `narrow` schemes have as many codes on either side of it, so that no scale is
    negative. `least_error`: scales minimise the squared error, instead of covering the smallest and largest value."""

    lowest: int
    middle: int
    highest: int
    symmetric: bool
    narrow: bool
    least_error: bool
    scale_dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True, eq=False)
class BlockParameters:
    """The scales of blocks, and their zero points (in symmetric schemes a single one, broadcast)."""

    scale: Floats
    zero_point: Floats

    def of(self, where: slice, blocks: Floats) -> BlockParameters:
        """The parameters of the blocks at `where`, in a shape that broadcasts to `blocks`."""
        shape = (blocks.shape[0], 1, blocks.shape[2])
        return BlockParameters(self.scale[where].reshape(shape), self.zero_point[where].reshape(shape))


def fit(to: Codes, pieces: Pieces, count: int) -> BlockParameters:
    """The parameters of `count` blocks. Raises Unsupported if values are not finite, or scales exceed their
    dtype's range."""
    low, high = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for where, blocks in pieces():  # zero is always within the range, so that it is always a code
        np.minimum(low[where], blocks.min(axis=1).reshape(-1), out=low[where])
        np.maximum(high[where], blocks.max(axis=1).reshape(-1), out=high[where])
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise Unsupported(
            "holds NaN or infinity as float32, which codes cannot represent: leave the tensor out with --skip"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        found = _of_range(to, low, high)
        if not np.isfinite(found.scale).all():
            what = f"needs a scale that {to.scale_dtype} cannot hold"
            raise Unsupported(f"{what}: choose another with scale=, or leave the tensor out with --skip")
        if to.least_error:
            found = _least_error(to, pieces, found, low, high)
    return found


def codes(to: Codes, blocks: Floats, parameters: BlockParameters) -> Floats:
    """The codes nearest to the elements of `blocks`, as whole float32 numbers; `parameters` broadcast to them."""
    nearest = np.divide(blocks, parameters.scale)
    np.rint(nearest, out=nearest)
    if to.middle or not to.symmetric:
        np.add(nearest, parameters.zero_point, out=nearest)
    return np.clip(nearest, np.float32(to.lowest), np.float32(to.highest), out=nearest)


def values(to: Codes, nearest: Floats, parameters: BlockParameters) -> Floats:
    """The values that codes decode to; they overwrite `nearest`."""
    if to.middle or not to.symmetric:
        np.subtract(nearest, parameters.zero_point, out=nearest)
    return np.multiply(nearest, parameters.scale, out=nearest)


def _of_range(to: Codes, low: Floats, high: Floats) -> BlockParameters:
    """The parameters for values from `low` (zero or less) to `high` (zero or more)."""
    scale: NDArray[Any]
    if to.symmetric and to.narrow:
        scale = np.maximum(-low, high) / np.float32(to.highest - to.middle)
    elif to.symmetric:  # a negative scale, if need be, lets the end farther from zero get the lowest code exactly
        scale = np.where(-low >= high, low, high) / np.float32(to.lowest - to.middle)
    else:
        scale = (high - low) / np.float32(to.highest - to.lowest)
    scale = _stored(to, scale)
    if to.symmetric:
        return BlockParameters(scale, np.broadcast_to(np.float32(to.middle), scale.shape))
    zero_point = np.rint(np.float32(to.lowest) - low / scale)
    return BlockParameters(scale, np.clip(zero_point, np.float32(to.lowest), np.float32(to.highest)))


def _stored(to: Codes, scale: NDArray[Any]) -> Floats:
    """Scales rounded to their dtype; 1 instead of 0, so that a block of zeros needs no division by zero."""
    rounded: Floats = scale.astype(to.scale_dtype).astype(np.float32)
    rounded[rounded == 0] = 1
    return rounded


def _least_error(to: Codes, pieces: Pieces, minmax: BlockParameters, low: Floats, high: Floats) -> BlockParameters:
    """The parameters of the least squared error among many ranges, then refined: for fixed codes, least squares gives
    the best scale. Never worse than `minmax`."""
    candidates = [minmax, *(_of_range(to, low * np.float32(r), high * np.float32(r)) for r in _RATIOS)]
    best, least = _choice(candidates, _squared_errors(to, pieces, candidates))
    for _ in range(_REFINEMENTS):
        refined = _least_squares(to, pieces, best)
        (error,) = _squared_errors(to, pieces, [refined])
        best, least = _choice([best, refined], np.stack([least, error]))
    return best


def _choice(
    candidates: Sequence[BlockParameters], errors: NDArray[np.float64]
) -> tuple[BlockParameters, NDArray[np.float64]]:
    """For each block the candidate of the least error (the first of equal ones), and that error."""
    errors = np.where(np.isnan(errors), np.inf, errors)
    best = errors.argmin(axis=0)
    scale = np.choose(best, [candidate.scale for candidate in candidates])
    zero_point = candidates[0].zero_point
    if zero_point.strides != (0,):  # asymmetric
        zero_point = np.choose(best, [candidate.zero_point for candidate in candidates])
    return BlockParameters(scale, zero_point), errors.min(axis=0)


def _squared_errors(to: Codes, pieces: Pieces, candidates: Sequence[BlockParameters]) -> NDArray[np.float64]:
    """The sum of squared errors of each block with each of the candidates, shape (candidates, blocks)."""
    errors = np.zeros((len(candidates), candidates[0].scale.size))
    for where, blocks in pieces():
        for error, candidate in zip(errors, candidates, strict=True):
            parameters = candidate.of(where, blocks)
            difference = values(to, codes(to, blocks, parameters), parameters)
            np.subtract(difference, blocks, out=difference)
            np.square(difference, out=difference)
            error[where] += difference.sum(axis=1).reshape(-1)
    return errors


def _least_squares(to: Codes, pieces: Pieces, parameters: BlockParameters) -> BlockParameters:
    """The same zero points, with the scales of least squared error for the codes that `parameters` give."""
    products, squares = np.zeros(parameters.scale.size), np.zeros(parameters.scale.size)
    for where, blocks in pieces():
        of_piece = parameters.of(where, blocks)
        steps = codes(to, blocks, of_piece) - of_piece.zero_point
        products[where] += (steps * blocks).sum(axis=1).reshape(-1)
        squares[where] += np.square(steps, out=steps).sum(axis=1).reshape(-1)
    scale = np.divide(products, squares, out=parameters.scale.astype(np.float64), where=squares > 0)
    return BlockParameters(_stored(to, scale), parameters.zero_point)
