"""Sparse tensors, expanded to dense ones as LiteRT's DENSIFY does (its sparsity_format_converter).

The stored values are the leaves of a tree whose levels are the dimensions in traversal order: a dense level gives every
node `dense_size` children, a compressed one (CSR) the children that its segments and indices list. With a block map,
the last levels are dimensions inside a block, each of which refines the original dimension that the map names.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptFile, Unsupported
from formats.tflite.schema import DimensionMetadata, SparsityParameters

#: A dense form larger than this and than `_MOST_EXPANSION` times the stored values is taken for an attack.
_HARMLESS_BYTES = 1 << 26
_MOST_EXPANSION = 1024


@dataclass(frozen=True, slots=True)
class _Level:
    """One level of the tree: `segments` and `indices` when it is compressed, `size` children of each node otherwise."""

    size: int
    segments: NDArray[Any] | None
    indices: NDArray[Any] | None


@dataclass(frozen=True, slots=True, eq=False)
class SparseLayout:
    """Where the stored values of a sparse tensor belong; `sparse_layout` makes it, checked as far as headers tell."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    block_map: tuple[int, ...]
    levels: tuple[_Level, ...]

    def expand(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The dense array of `shape` that has `stored` (1-D, in tree order) at its places and zeros elsewhere.
        Raises CorruptFile when the tree has not as many leaves as there are values, or leaves the shape."""
        coordinates: list[NDArray[np.int64]] = []
        nodes = 1
        for level in self.levels:
            if level.segments is not None and level.indices is not None:
                ends = level.segments.astype(np.int64)
                counts = ends[1:] - ends[:-1]
                if counts.size != nodes or (counts < 0).any() or counts.sum() != level.indices.size:
                    raise CorruptFile("its sparsity segments do not fit its indices: the file is damaged")
                children, coordinate = counts, level.indices.astype(np.int64)
            else:
                if nodes * level.size > prod(self.shape):
                    raise CorruptFile(f"its sparsity has more places than shape {self.shape}: the file is damaged")
                children = np.full(nodes, level.size, np.int64)
                coordinate = np.tile(np.arange(level.size), nodes)
            coordinates = [np.repeat(known, children) for known in coordinates] + [coordinate]
            nodes = coordinate.size
        if nodes != stored.size:
            raise CorruptFile(f"its sparsity places {nodes} values, but {stored.size} are stored: the file is damaged")
        dense = np.zeros(self.shape, stored.dtype)
        dense[self._positions(coordinates)] = stored
        return dense

    def _positions(self, coordinates: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], ...]:
        rank = len(self.shape)
        by_dimension = dict(zip(self.order, coordinates, strict=True))
        positions = []
        for axis, size in enumerate(self.shape):
            position = by_dimension[axis]
            if axis in self.block_map:
                inner = rank + self.block_map.index(axis)
                position = position * self.levels[self.order.index(inner)].size + by_dimension[inner]
            if position.size and not 0 <= position.min() <= position.max() < size:
                raise CorruptFile(f"its sparsity places values outside shape {self.shape}: the file is damaged")
            positions.append(position)
        return tuple(positions)


def sparse_layout(
    sparsity: SparsityParameters, shape: tuple[int, ...], stored_bytes: int, dense_bytes: int
) -> SparseLayout:
    """The layout that `sparsity` describes for a tensor of dense `shape`. Raises CorruptFile when the parameters
    contradict each other and Unsupported when the dense form is out of all proportion to the stored values."""
    order = tuple(_integers(sparsity.traversal_order))
    block_map = tuple(_integers(sparsity.block_map))
    metadata = sparsity.dim_metadata
    rank = len(shape)
    if sorted(order) != list(range(rank + len(block_map))) or len(metadata) != len(order):
        raise CorruptFile(
            f"its sparsity traverses dimensions {order} with {len(metadata)} descriptions; a permutation of the "
            f"{rank + len(block_map)} dimensions is needed"
        )
    if len(set(block_map)) != len(block_map) or any(not 0 <= axis < rank for axis in block_map):
        raise CorruptFile(f"its sparsity maps blocks to dimensions {block_map} of {rank}")
    if any(level < rank for level in order[rank:]) and block_map:
        raise CorruptFile(f"its sparsity traverses block dimensions before others: {order}")
    if dense_bytes > max(_HARMLESS_BYTES, _MOST_EXPANSION * stored_bytes):
        raise Unsupported(f"is sparse with {stored_bytes} bytes stored for {dense_bytes} dense ones: refused as a bomb")
    return SparseLayout(shape, order, block_map, tuple(_level(dimension) for dimension in metadata))


def _level(dimension: DimensionMetadata) -> _Level:
    if dimension.format == 0:
        if dimension.dense_size < 0:
            raise CorruptFile(f"its sparsity has a dimension of size {dimension.dense_size}")
        return _Level(dimension.dense_size, None, None)
    if dimension.format != 1:
        raise Unsupported(f"its sparsity has dimension format {dimension.format}: dense (0) and CSR (1) are known")
    segments = {
        1: dimension.segments_int32,
        2: dimension.segments_uint16,
        3: dimension.segments_uint8,
    }.get(dimension.segments_type)
    indices = {
        1: dimension.indices_int32,
        2: dimension.indices_uint16,
        3: dimension.indices_uint8,
    }.get(dimension.indices_type)
    if segments is None or indices is None or segments.values is None:
        raise CorruptFile("its sparsity has a compressed dimension without segments or indices")
    return _Level(0, segments.values, np.zeros(0, np.int32) if indices.values is None else indices.values)


def _integers(values: NDArray[Any] | None) -> list[int]:
    return [] if values is None else values.tolist()
