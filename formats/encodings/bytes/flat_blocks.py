"""Blocks that run through the flattened tensor, whatever its rows, as the IR's blocks, which are boxes.

Where no box has the size of a block, blocks are cut into the largest boxes that divide them, and each of these has the
parameters of its block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, grid_shape, per_tensor
from nibblecast.converters.storage import Computed, Data


@dataclass(frozen=True, slots=True)
class FlatBlocks:
    """Blocks of `size` elements of a flattened tensor of `shape`: boxes of `block_shape`, `repeats` to a block."""

    shape: tuple[int, ...]
    size: int
    block_shape: tuple[int, ...]
    repeats: int

    @property
    def index(self) -> GroupIndex | None:
        """None: the blocks need none."""
        return None

    @property
    def is_expanded(self) -> bool:
        """Whether parameters are held several times."""
        return self.repeats > 1

    @property
    def count(self) -> int:
        """How many blocks there are; the last one may be short."""
        return -(-prod(self.shape) // self.size)

    def spread(self, parameter: Tensor) -> Tensor:
        """A parameter of one element for each block, shape (count,), in the grid's shape. One that is quantized itself
        is so in blocks of its flattened elements. Raises CorruptFile where there are not as many as blocks."""
        if parameter.size != self.count:
            raise CorruptFile(f"has {parameter.size} of {parameter.name} for {self.count} blocks of {self.size}")
        grid = grid_shape(self.shape, self.block_shape)
        quantization = parameter.quantization and self._nested(parameter.quantization, grid)
        data = parameter.data if self.repeats == 1 else repeated(parameter, prod(grid), self.repeats)
        return replace(parameter, shape=grid, data=data, quantization=quantization)

    def _nested(self, quantization: Quantization, grid: tuple[int, ...]) -> Quantization:
        inner = self.nested(quantization.block_shape[0])
        zero_point, offset = (part and inner.spread(part) for part in (quantization.zero_point, quantization.offset))
        return replace(
            quantization,
            scale=inner.spread(quantization.scale),
            block_shape=inner.block_shape,
            zero_point=zero_point,
            offset=offset,
        )

    def nested(self, size: int) -> FlatBlocks:
        """The blocks of `size` parameters that are quantized together, in the grid of all parameters."""
        return flat_blocks(grid_shape(self.shape, self.block_shape), size * self.repeats)


def flat_blocks(shape: tuple[int, ...], size: int) -> FlatBlocks:
    """Blocks of `size` elements of the flattened tensor, which is at least 1."""
    if size >= prod(shape):
        return FlatBlocks(shape, size, per_tensor(shape), 1)
    best, largest = (1,) * len(shape), 1
    inner = 1  # elements of the axes after this one
    for axis in reversed(range(len(shape))):
        if size % inner:
            break
        positions = gcd(size // inner, shape[axis])
        if prod(shape[:axis]) == 1:  # nothing before this axis: its last block may be short
            positions = size // inner
        if positions * inner > largest:
            best, largest = (*(1,) * axis, positions, *shape[axis + 1 :]), positions * inner
        inner *= shape[axis]
    return FlatBlocks(shape, size, best, size // largest)


def repeated(parameter: Tensor, count: int, times: int) -> Data:
    """The first `count` elements of all of a parameter's, each so many times in a row; made when they are read."""
    itemsize = parameter.dtype.itemsize

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        begin, end = start // itemsize, -(-stop // itemsize)
        first, last = begin // times, -(-end // times)
        elements = parameter.data.read(first * itemsize, last * itemsize).reshape(-1, itemsize)
        wanted = elements[np.arange(begin, end) // times - first].reshape(-1)
        return wanted[start - begin * itemsize : stop - begin * itemsize]

    return Computed(count * itemsize, compute, (parameter.data,))


@dataclass(frozen=True, slots=True, eq=False)
class Cycle:
    """Parameters of which the flattened tensor of `shape` takes one after the other, again and again: they differ along
    the last axes and, up to `index`, along one axis before. Where no axis goes evenly (`is_expanded`), each element has
    its own."""

    shape: tuple[int, ...]
    period: int
    block_shape: tuple[int, ...]
    index: GroupIndex | None
    grid: tuple[int, ...]
    is_expanded: bool

    def spread(self, parameter: Tensor) -> Tensor:
        """A parameter of shape (period,), in the grid's shape. Raises CorruptFile for another number of them."""
        if parameter.size != self.period:
            raise CorruptFile(f"has {parameter.size} of {parameter.name}: {self.period} are needed")
        itemsize = parameter.dtype.itemsize

        def compute(start: int, stop: int) -> NDArray[np.uint8]:
            begin, end = start // itemsize, -(-stop // itemsize)
            elements = parameter.data.read(0, parameter.nbytes).reshape(-1, itemsize)
            wanted = elements[np.arange(begin, end) % self.period].reshape(-1)
            return wanted[start - begin * itemsize : stop - begin * itemsize]

        data = parameter.data
        if self.is_expanded:
            data = Computed(prod(self.shape) * itemsize, compute, (parameter.data,), in_order=False)
        return replace(parameter, shape=self.grid, data=data)


def cycle(shape: tuple[int, ...], period: int) -> Cycle:
    """The parameters of a flattened tensor of `shape` that come again after `period` elements."""
    inner = 1  # elements of the axes after this one
    for axis in reversed(range(len(shape))):
        groups, rest = divmod(period, inner)
        if rest:
            break
        if shape[axis] % groups == 0 and groups:
            block_shape = (*per_tensor(shape[:axis]), shape[axis] // groups, *(1 for _ in shape[axis + 1 :]))
            grid = (*(1 for _ in shape[:axis]), groups, *shape[axis + 1 :])
            if groups == 1 or groups == shape[axis]:
                return Cycle(shape, period, block_shape, None, grid, is_expanded=False)
            positions = np.arange(shape[axis], dtype=np.int32) % np.int32(groups)
            index = GroupIndex(axis, Tensor.from_array("group_index", positions))
            return Cycle(shape, period, block_shape, index, grid, is_expanded=False)
        inner *= shape[axis]
    return Cycle(shape, period, (1,) * len(shape), None, shape, is_expanded=True)
