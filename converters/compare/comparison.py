"""Two models, code for code and value for value.

Where both tensors are quantized, their codes must be equal and their parameters, and so their values. Codes of
different dtypes (e.g. offset binary and two's complement) are compared after subtracting their zero points. Where only
one is quantized, values are compared in the other one's dtype; plain tensors are compared as they are. Quantizations of
another arithmetic are compared by their float32 values. NaN equals NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import FLOAT32, FLOAT_DTYPES, is_float, is_integer
from nibblecast.converters.interfaces import Progress
from nibblecast.converters.ir import Model, Quantization, Tensor
from nibblecast.converters.sizes import weights_of

_PIECE_ELEMENTS = 1 << 20
_SHOWN = 3

#: A view of a tensor for comparing: an array of its shape.
View = Callable[[Tensor], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs in one tensor: `kind` is "missing", "shape", "codes", "values" or a parameter's role; `count` is the
    number of places, `detail` shows the first ones."""

    tensor: str
    kind: str
    count: int
    detail: str

    def __str__(self) -> str:
        places = f" in {self.count} places" if self.count > 1 else ""
        return (
            f"{self.tensor}: {self.kind} differ{places}: {self.detail}"
            if self.count
            else f"{self.tensor}: {self.detail}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome: how much was compared, how many tensors code for code, and every difference."""

    tensors: int
    quantized: int
    elements: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


@np.errstate(all="ignore")  # numbers out of files may be anything
def compare(a: Model, b: Model, progress: Progress | None = None) -> Comparison:
    """Compares all tensors of two models by name; tensors that are only parameters of others count with their owners.
    `progress` is called with the first model's bytes."""
    weights_a, weights_b = weights_of(a), weights_of(b)
    differences: list[Difference] = []
    common = [name for name in weights_a if name in weights_b]
    for which, names, others in (("second", weights_a, weights_b), ("first", weights_b, weights_a)):
        differences += [Difference(n, "missing", 0, f"missing in the {which}") for n in names if n not in others]
    total, done = sum(weights_a[name].nbytes for name in common), 0
    for name in common:
        differences += compare_tensors(weights_a[name], weights_b[name])
        done += weights_a[name].nbytes
        if progress is not None:
            progress(done, total)
        weights_a[name].release()
        weights_b[name].release()
    return Comparison(
        tensors=len(common),
        quantized=sum(weights_a[n].quantization is not None and weights_b[n].quantization is not None for n in common),
        elements=sum(weights_a[name].size for name in common),
        differences=tuple(differences),
    )


def compare_tensors(a: Tensor, b: Tensor) -> list[Difference]:
    """What differs between two tensors of one name."""
    if a.shape != b.shape:
        return [Difference(a.name, "shape", 0, f"shape {a.shape} against {b.shape}")]
    if a.quantization is None or b.quantization is None:
        return _differences(a, b, "values", _plain_view(a, b))
    differences = _differences(a, b, "codes", _codes_view(a, b))
    same_blocks = a.quantization.block_shape == b.quantization.block_shape
    arithmetic = [(q.compute_dtype, q.factor, q.value_dtype) for q in (a.quantization, b.quantization)]
    if (
        a.dtype == b.dtype
        and same_blocks
        and arithmetic[0] == arithmetic[1]
        and _same_roles(a.quantization, b.quantization)
    ):
        # codes and parameters determine the values, and also show differences that values hide, e.g. a block of zeros
        return differences + _parameter_differences(a.name, a.quantization, b.quantization)
    return differences + _differences(a, b, "values", _values)


def _values(tensor: Tensor) -> NDArray[Any]:
    return tensor.dequantize(np.float32)


def _plain_view(a: Tensor, b: Tensor) -> View:
    """The view for comparing two tensors of which at most one is quantized."""
    if a.quantization is None and b.quantization is None:
        if a.dtype == b.dtype or (is_integer(a.dtype) and is_integer(b.dtype)):
            return Tensor.codes
        return _values
    plain = a if a.quantization is None else b
    dtype = plain.dtype if plain.dtype in FLOAT_DTYPES.values() else FLOAT32
    return lambda tensor: tensor.dequantize(dtype)


def _codes_view(a: Tensor, b: Tensor) -> View:
    if a.dtype == b.dtype or is_float(a.dtype) or is_float(b.dtype):
        return Tensor.codes
    return _codes_from_zero


def _codes_from_zero(tensor: Tensor) -> NDArray[Any]:
    """code - zero_point, as float64 (exact): the value in units of the scale."""
    quantization = tensor.quantization
    if quantization is None or quantization.zero_point is None:
        return tensor.codes().astype(np.float64)
    ones = Tensor.from_array("one", np.ones(quantization.zero_point.shape, np.float32))
    unscaled = Quantization(
        ones, quantization.block_shape, quantization.zero_point, None, None, quantization.group_index
    )
    return Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.data, unscaled).dequantize(np.float32)


def _differences(a: Tensor, b: Tensor, kind: str, view: View) -> list[Difference]:
    """One Difference that counts the places where the views differ and shows the first ones; none when they agree."""
    count = 0
    shown: list[str] = []
    for start, x_part, y_part in common_rows(a, b):
        if a.dtype == b.dtype and view is Tensor.codes and np.array_equal(x_part.packed(), y_part.packed()):
            continue
        x, y = view(x_part).reshape(-1), view(y_part).reshape(-1)
        places = np.flatnonzero(_unequal(x, y))
        count += places.size
        for place in places[: _SHOWN - len(shown)]:
            index = tuple(int(i) for i in np.unravel_index(start + int(place), a.shape)) if a.shape else ()
            shown.append(f"{index} {x[place]} against {y[place]}")
    return [Difference(a.name, kind, count, ", ".join(shown))] if count else []


def common_rows(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The same rows of two tensors of one shape, piece by piece, with the position of each piece's first element."""
    rows = next((size for size in a.shape if size != 1), 1)
    if a.size <= _PIECE_ELEMENTS or not a.shape:
        yield 0, a, b
        return
    row = a.size // rows
    step = lcm(a.row_step, b.row_step)
    step *= max(1, _PIECE_ELEMENTS // row // step)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        x, y = a.rows(start, stop), b.rows(start, stop)
        yield start * row, x, y
        x.release()
        y.release()


def _unequal(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
    if is_float(x.dtype) and is_float(y.dtype) and x.dtype.itemsize < 4:
        x, y = x.astype(np.float32), y.astype(np.float32)  # ml_dtypes has no fast comparison
    unequal = np.asarray(x != y)
    if x.dtype.kind in "fc" and unequal.any():
        unequal &= ~((x != x) & (y != y))
    return unequal


def _same_roles(a: Quantization, b: Quantization) -> bool:
    """Whether both have the same blocks and kinds of parameters. Zero points are ignored: absent ones are zeros."""
    roles = [{role for role, _ in quantization.parameters()} - {"zero_point"} for quantization in (a, b)]
    return roles[0] == roles[1] and a.block_shape == b.block_shape and a.scale.shape == b.scale.shape


def _parameter_differences(name: str, a: Quantization, b: Quantization) -> list[Difference]:
    differences = []
    zeros = Tensor.from_array("zeros", np.zeros(a.scale.shape, np.int8))
    of_a, of_b = dict(a.parameters()), dict(b.parameters())
    for role in dict.fromkeys((*of_a, *of_b)):
        x, y = of_a.get(role, zeros), of_b.get(role, zeros)
        differences += [replace(found, tensor=name) for found in _differences(x, y, role, _parameter_view(x, y))]
    return differences


def _parameter_view(a: Tensor, b: Tensor) -> View:
    """Integers are compared as such, whatever their width; all other tensors by their values."""
    return Tensor.codes if is_integer(a.dtype) and is_integer(b.dtype) and a.quantization is None else _values
