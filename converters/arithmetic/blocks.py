"""Divides a tensor into groups of whole blocks, small enough for the processor's cache.

Every tensor is viewed as (planes, rows, columns), row-major, with blocks of `block` rows. For blocks along an axis
these are the axes before it, the axis itself, and the axes after it. One scale per plane is a block of all its rows.
The exception is one scale per row for all planes (`across`): per-axis quantization along another axis than the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE_ELEMENTS = 1 << 17  # 512 KiB of float32: inside a common second-level cache
_SHORT = 256  # NumPy is slow where its innermost loops are shorter


@dataclass(frozen=True, slots=True)
class Box:
    """Elements [start, start + planes * rows * columns) of the tensor: several whole planes, or rows of one plane.
    Their blocks are numbered from `first_block` on."""

    start: int
    planes: int
    rows: int
    columns: int
    block: int
    across: bool
    first_block: int

    @property
    def stop(self) -> int:
        """The end of the elements."""
        return self.start + self.planes * self.rows * self.columns

    @property
    def blocks(self) -> slice:
        """Which of the tensor's blocks the elements belong to."""
        return slice(self.first_block, self.first_block + self.block_count)

    @property
    def block_count(self) -> int:
        """How many blocks the elements belong to."""
        return self.rows if self.across else self.planes * -(-self.rows // self.block) * self.columns

    def to_blocks(self, elements: NDArray[Any]) -> NDArray[np.float32]:
        """The box's flat elements as blocks along axis 1: shape (k, b, q), float32. A shorter last block is padded with
        zeros, which change nothing: zero is in every range, and has a code."""
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32: infinity, refused later on
            box = elements.astype(np.float32, copy=False).reshape(self.planes, self.rows, self.columns)
        if self.across:
            if self.columns == 1:
                return box.reshape(1, self.planes, self.rows)
            return box.transpose(1, 0, 2).reshape(self.rows, -1, 1)
        missing = -self.rows % self.block
        if missing:
            box = np.pad(box, ((0, 0), (0, missing), (0, 0)))
        blocks = box.reshape(-1, self.block, self.columns)
        return side_by_side(blocks) if self.columns > 1 else blocks

    def from_blocks(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `to_blocks`, for codes: the box's elements, flat."""
        if self.across:
            if self.columns == 1:
                return blocks.reshape(-1)
            return blocks.reshape(self.rows, self.planes, self.columns).transpose(1, 0, 2).reshape(-1)
        if blocks.shape[2] != self.columns:
            blocks = blocks.reshape(self.block, -1, self.columns).transpose(1, 0, 2)
        return blocks.reshape(self.planes, -1, self.columns)[:, : self.rows].reshape(-1)


def side_by_side(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same blocks in the same order, as shape (1, b, k * q) instead of (k, b, q), if blocks are short. The
    innermost loop then runs over blocks, in the order of memory."""
    k, b, q = blocks.shape
    if k == 1 or q >= _SHORT or (q == 1 and b >= _SHORT):
        return blocks
    return np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(1, b, k * q)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive boxes that hold whole blocks together; there are several boxes only if the blocks are large."""

    boxes: tuple[Box, ...]
    start: int
    stop: int
    blocks: slice


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """A tensor as (planes, rows, columns), with its blocks."""

    planes: int
    rows: int
    columns: int
    block: int
    across: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], block_shape: tuple[int, ...]) -> BlockGrid:
        """The view of a tensor of that shape. A block is the whole tensor, or one position of one axis, or several
        positions of one axis and a single one of all others."""
        size = prod(shape)
        split = [axis for axis in range(len(shape)) if block_shape[axis] < shape[axis]]
        if not split:
            return cls(1, size, 1, size)
        whole = all(block_shape[axis] >= size for axis, size in enumerate(shape) if axis != split[0])
        if len(split) == 1 and block_shape[split[0]] == 1 and whole:
            (axis,) = split
            planes, columns = prod(shape[:axis]), prod(shape[axis + 1 :])
            if planes == 1:
                return cls(shape[axis], columns, 1, columns)
            return cls(planes, shape[axis], columns, 1, across=True)
        axis = next((axis for axis, block in enumerate(block_shape) if block > 1), len(shape) - 1)
        return cls(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]), block_shape[axis])

    def groups(self) -> Iterator[Group]:
        """The groups in the order of their elements, which is also the order of their blocks."""
        plane = self.rows * self.columns
        if self.across:
            boxes = tuple(self._planes() if plane <= _PIECE_ELEMENTS else self._rows(0, self.planes, 0, self.rows))
            yield Group(boxes, 0, self.planes * plane, slice(0, self.rows))
        elif plane <= _PIECE_ELEMENTS:
            for box in self._planes():
                yield Group((box,), box.start, box.stop, box.blocks)
        elif self.block * self.columns <= _PIECE_ELEMENTS:
            step = _PIECE_ELEMENTS // (self.block * self.columns) * self.block
            for p in range(self.planes):
                for row in range(0, self.rows, step):
                    box = self._box(p, 1, row, min(self.rows, row + step))
                    yield Group((box,), box.start, box.stop, box.blocks)
        else:
            for p in range(self.planes):
                for row in range(0, self.rows, self.block):
                    boxes = tuple(self._rows(p, p + 1, row, min(self.rows, row + self.block)))
                    yield Group(boxes, boxes[0].start, boxes[-1].stop, boxes[0].blocks)

    def _planes(self) -> Iterator[Box]:
        """All planes, several in a box."""
        step = _PIECE_ELEMENTS // (self.rows * self.columns)
        for p in range(0, self.planes, step):
            yield self._box(p, min(step, self.planes - p), 0, self.rows)

    def _rows(self, first: int, last: int, start: int, stop: int) -> Iterator[Box]:
        """Rows [start, stop) of planes [first, last), in boxes that need not hold whole blocks."""
        step = max(1, _PIECE_ELEMENTS // self.columns)
        for p in range(first, last):
            for row in range(start, stop, step):
                yield self._box(p, 1, row, min(stop, row + step))

    def _box(self, plane: int, planes: int, row: int, stop: int) -> Box:
        start = (plane * self.rows + row) * self.columns
        if self.across:
            return Box(start, planes, stop - row, self.columns, 1, across=True, first_block=row)
        first = (plane * -(-self.rows // self.block) + row // self.block) * self.columns
        # rows of a single block, or whole blocks
        block = min(self.block, stop - row)
        return Box(start, planes, stop - row, self.columns, block, across=False, first_block=first)
