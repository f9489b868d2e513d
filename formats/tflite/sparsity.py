"""Expands sparse tensors as LiteRT's DENSIFY does (tflite/kernels/internal/utils/sparsity_format_converter).

The stored values are the leaves of a tree whose levels are the dimensions in traversal order. In a dense level, every
node has a child for each position of its dimension. In a compressed level (CSR), segments and indices list the
children. With a block map, the last levels are dimensions inside a block. Each of these refines the original dimension
that the map names.

They are expanded because the IR has dense tensors only. A sparse IR would concern every stage and every writer, for a
single format that has such weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile, Unsupported, located
from nibblecast.converters.storage import Data
from nibblecast.formats.tflite.schema import (
    DimensionMetadata,
    Int32Vector,
    SparsityParameters,
    Uint8Vector,
    Uint16Vector,
)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """One level of the tree, for a dimension of `size` positions that are `stride` elements apart in the dense form.
    A compressed level has `segments` and `indices`."""

    size: int
    stride: int
    segments: NDArray[Any] | None
    indices: NDArray[Any] | None

    def children(self, nodes: int) -> int:
        """The number of nodes in the next level if this level has `nodes`."""
        if self.segments is None or self.indices is None:
            return nodes * self.size
        if self.segments.size != nodes + 1:
            raise CorruptFile(f"its sparsity has {self.segments.size} segments for {nodes} nodes: the file is damaged")
        return self.indices.size

    def places(self, parents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the children of nodes at `parents` begin, in elements of the dense form."""
        if self.segments is None or self.indices is None:
            steps = np.arange(self.size, dtype=np.int64) * self.stride
            return (parents[:, None] + steps).reshape(-1)
        segments, indices = self.segments.astype(np.int64), self.indices.astype(np.int64)
        counts = np.diff(segments)
        if segments[0] != 0 or (counts < 0).any() or segments[-1] != indices.size:
            raise CorruptFile("its sparsity segments do not fit its indices: the file is damaged")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.size:
            raise CorruptFile(
                f"its sparsity has indices {indices.min()} to {indices.max()} in a dimension of {self.size}: "
                "the file is damaged"
            )
        return np.repeat(parents, counts) + indices * self.stride


@dataclass(frozen=True, slots=True, eq=False)
class SparseLayout:
    """The places of a sparse tensor's stored values. `sparse_layout` makes it and checks it as far as headers allow."""

    shape: tuple[int, ...]
    levels: tuple[_Level, ...]

    def expand(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The dense array of `shape` that has `stored` (1-D, in tree order) at its places and zeros elsewhere. Raises
        CorruptFile if the number of leaves differs from that of the values, or if a leaf is outside the shape."""
        leaves = 1
        for level in self.levels:
            leaves = level.children(leaves)
        if leaves != stored.size:
            raise CorruptFile(f"its sparsity places {leaves} values, but {stored.size} are stored: the file is damaged")
        dense = np.zeros(prod(self.shape), stored.dtype)
        if leaves:
            places = np.zeros(1, np.int64)
            for level in self.levels:
                places = level.places(places)
            dense[places] = stored
        return dense.reshape(self.shape)


@dataclass(slots=True, eq=False)
class SparseData(Data):
    """The dense bytes of a sparse tensor, expanded when they are read. The expansion is kept from the first to the last
    part, because each part needs the whole."""

    path: Path
    name: str
    layout: SparseLayout
    dtype: np.dtype[Any]
    stored: Data
    _expanded: NDArray[np.uint8] | None = field(default=None, init=False)

    @property
    def nbytes(self) -> int:
        return prod(self.layout.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        expanded = self._expanded
        if expanded is None:
            with located(path=self.path, tensor=self.name):
                dense = self.layout.expand(self.stored.read(0, self.stored.nbytes).view(self.dtype))
            expanded = dense.reshape(-1).view(np.uint8)
        self._expanded = expanded if stop < self.nbytes else None
        return expanded[start:stop]


def sparse_layout(sparsity: SparsityParameters, shape: tuple[int, ...]) -> SparseLayout:
    """The layout that `sparsity` describes for a tensor of dense `shape`. Raises CorruptFile if the parameters
    contradict each other, Unsupported for features that LiteRT does not have."""
    order = tuple(_integers(sparsity.traversal_order))
    block_map = tuple(_integers(sparsity.block_map))
    metadata = sparsity.dim_metadata
    rank = len(shape)
    if sorted(order) != list(range(rank + len(block_map))) or len(metadata) != len(order):
        raise CorruptFile(
            f"its sparsity traverses {len(order)} dimensions with {len(metadata)} descriptions; a permutation of the "
            f"{rank + len(block_map)} dimensions is needed"
        )
    if len(set(block_map)) != len(block_map) or any(not 0 <= axis < rank for axis in block_map):
        raise CorruptFile(f"its sparsity maps blocks to dimensions {block_map} of {rank}")
    if any(dimension < rank for dimension in order[rank:]):
        raise CorruptFile(f"its sparsity traverses block dimensions before others: {order}")
    by_dimension = dict(zip(order, metadata, strict=True))
    blocks = {axis: _block_size(by_dimension[rank + i], shape[axis]) for i, axis in enumerate(block_map)}
    levels = []
    for dimension, description in zip(order, metadata, strict=True):
        axis = dimension if dimension < rank else block_map[dimension - rank]
        block, stride = blocks.get(axis, 1), prod(shape[axis + 1 :])
        if dimension < rank:
            levels.append(_level(description, shape[axis] // block, stride * block))
        else:
            levels.append(_level(description, block, stride))
    return SparseLayout(shape, tuple(levels))


def _block_size(description: DimensionMetadata, size: int) -> int:
    if description.format != 0:
        raise Unsupported("its sparsity compresses the inside of blocks: only dense blocks are known")
    if description.dense_size < 1 or size % description.dense_size:
        raise CorruptFile(f"its sparsity has blocks of {description.dense_size} along {size}; a divisor is needed")
    return description.dense_size


def _level(description: DimensionMetadata, size: int, stride: int) -> _Level:
    if description.format == 0:
        if description.dense_size != size:
            raise CorruptFile(f"its sparsity gives a dimension size {description.dense_size}; {size} is needed")
        return _Level(size, stride, None, None)
    if description.format != 1:
        raise Unsupported(f"its sparsity has dimension format {description.format}: dense (0) and CSR (1) are known")
    segments = _values(
        description.segments_type,
        (description.segments_int32, description.segments_uint16, description.segments_uint8),
    )
    indices = _values(
        description.indices_type,
        (description.indices_int32, description.indices_uint16, description.indices_uint8),
    )
    return _Level(size, stride, segments, indices)


def _values(kind: int, vectors: tuple[Int32Vector | None, Uint16Vector | None, Uint8Vector | None]) -> NDArray[Any]:
    """The numbers of a union of index vectors. An empty one may omit its vector."""
    vector = vectors[kind - 1] if 1 <= kind <= len(vectors) else None
    if vector is None:
        raise CorruptFile("its sparsity has a compressed dimension without segments or indices")
    values = vector.values
    return np.zeros(0, np.int32) if values is None else values


def _integers(values: NDArray[Any] | None) -> list[int]:
    return [] if values is None else values.tolist()
