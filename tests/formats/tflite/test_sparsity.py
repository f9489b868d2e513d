"""Sparse tensors: an encoder of its own here, against the expansion there; and descriptions that cannot be right."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import nibblecast
from nibblecast import Tensor
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.ir import Loss
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.sparsity import sparse_layout
from tests.formats.tflite.models import FIXTURES, Fields, Load, affine, constant, ints, model, serialize, table

VECTORS: dict[type, tuple[int, str, Any]] = {
    np.int32: (1, "int32", schema.Int32Vector),
    np.uint16: (2, "uint16", schema.Uint16Vector),
    np.uint8: (3, "uint8", schema.Uint8Vector),
}


@dataclass
class Encoded:
    """A sparse tensor as a file has it; `levels` are a dense size or a pair of segments and indices."""

    order: list[int]
    block_map: list[int]
    levels: list[int | tuple[list[int], list[int]]]
    values: list[int]


def encode(dense: NDArray[Any], order: Sequence[int], compressed: Sequence[bool], blocks: dict[int, int]) -> Encoded:
    """Walks the tree of `order` (original dimensions, then those inside blocks): a compressed level leaves out children
    below which there is nothing. `blocks` gives the size of a block along some dimensions, in the order of the map."""
    block_map = list(blocks)
    rank = dense.ndim
    split = [size // blocks.get(axis, 1) for axis, size in enumerate(dense.shape)]
    inner = [blocks[axis] for axis in block_map]
    # one axis for each dimension that is traversed, blocks last
    view = dense.reshape([part for axis, size in enumerate(split) for part in (size, blocks.get(axis, 1))])
    axes = [2 * dimension if dimension < rank else 2 * block_map[dimension - rank] + 1 for dimension in order]
    rest = [axis for axis in range(2 * rank) if axis not in axes]
    tree = view.transpose(axes + rest).reshape([(split + inner)[dimension] for dimension in order])
    nodes = [tree]
    levels: list[int | tuple[list[int], list[int]]] = []
    for size, sparse in zip(tree.shape, compressed, strict=True):
        if not sparse:
            levels.append(size)
            nodes = [child for node in nodes for child in node]
            continue
        segments, indices, children = [0], [], []
        for node in nodes:
            kept = [i for i in range(size) if np.any(node[i])]
            indices += kept
            segments.append(len(indices))
            children += [node[i] for i in kept]
        levels.append((segments, indices))
        nodes = children
    return Encoded(list(order), block_map, levels, [int(node) for node in nodes])


def description(level: int | tuple[list[int], list[int]], dtype: type = np.int32) -> Fields:
    if isinstance(level, int):
        return table(schema.DimensionMetadata, format=np.int8(0), dense_size=np.int32(level))
    kind, suffix, vector = VECTORS[dtype]
    segments, indices = (table(vector, values=np.array(each, dtype)) for each in level)
    return table(
        schema.DimensionMetadata,
        format=np.int8(1),
        segments_type=np.uint8(kind),
        indices_type=np.uint8(kind),
        **{f"segments_{suffix}": segments, f"indices_{suffix}": indices},
    )


def parameters(encoded: Encoded, dtype: type = np.int32) -> Fields:
    return table(
        schema.SparsityParameters,
        traversal_order=ints(*encoded.order),
        block_map=ints(*encoded.block_map),
        dim_metadata=[description(level, dtype) for level in encoded.levels],
    )


def expanded(encoded: Encoded, shape: tuple[int, ...], dtype: type = np.int32) -> NDArray[Any]:
    content = np.frombuffer(serialize(parameters(encoded, dtype)), np.uint8)
    values = np.array(encoded.values, np.int32)
    layout = sparse_layout(schema.SparsityParameters.root(content), shape)
    return layout.expand(values)


# ---- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("sparse_float32", (40, 32), np.float32),
        ("sparse_block", (40, 32), np.float32),
        ("sparse_float16", (40, 32), np.float16),
        ("sparse_int8", (40, 32), np.int8),
        ("sparse_index_types", (40, 32), np.float32),
    ],
)
def test_a_sparse_fixture_is_what_densify_makes_of_it(name: str, shape: tuple[int, ...], dtype: type) -> None:
    loaded = nibblecast.load(FIXTURES / f"{name}.tflite")
    weight = next(each for each in loaded.values() if each.shape == shape)
    truth = np.load(FIXTURES / f"{name}.npz")
    values = weight.dequantize()
    assert (weight.dtype, weight.nbytes) == (dtype, prod(shape) * np.dtype(dtype).itemsize)
    assert values.tobytes() == truth[f"values/{weight.name}"].tobytes()
    assert 0.8 < np.mean(values == 0) < 0.9
    assert loaded.losses == (
        Loss(weight.name, "expanded", "its sparse values are written out with the zeros between them"),
    )


def test_the_csr_example_of_the_schema() -> None:
    """Rows dense, columns compressed."""
    dense = np.array([[1, 0, 0, 2], [0, 0, 0, 0], [0, 3, 0, 0]])
    encoded = encode(dense, [0, 1], [False, True], {})
    assert encoded.levels == [3, ([0, 2, 2, 3], [0, 3, 1])]
    assert encoded.values == [1, 2, 3]
    assert np.array_equal(expanded(encoded, (3, 4)), dense)


def test_columns_may_come_before_rows() -> None:
    dense = np.array([[1, 0, 2], [0, 0, 3]])
    encoded = encode(dense, [1, 0], [False, True], {})
    assert encoded.values == [1, 2, 3]
    assert encoded.levels == [3, ([0, 1, 1, 3], [0, 0, 1])]
    assert np.array_equal(expanded(encoded, (2, 3)), dense)


def test_blocks_are_the_last_levels() -> None:
    dense = np.zeros((4, 6), int)
    dense[2:4, 3:6] = [[1, 2, 3], [4, 5, 6]]
    encoded = encode(dense, [0, 1, 2, 3], [False, True, False, False], {0: 2, 1: 3})
    assert encoded.levels == [2, ([0, 0, 1], [1]), 2, 3]
    assert encoded.values == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(expanded(encoded, (4, 6)), dense)


@st.composite
def sparse_arrays(draw: st.DrawFn) -> tuple[NDArray[Any], Encoded]:
    rank = draw(st.integers(1, 4))
    inside = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(rank)]
    shape = [draw(st.integers(1, 4)) * block for block in inside]
    kept = draw(st.lists(st.integers(0, prod(shape) - 1), max_size=12))
    dense = np.zeros(prod(shape), np.int32)
    dense[kept] = np.arange(1, len(kept) + 1)
    dense = dense.reshape(shape)
    blocked = draw(st.permutations([axis for axis in range(rank) if inside[axis] > 1 or draw(st.booleans())]))
    blocks = {axis: inside[axis] for axis in blocked}
    order = [*draw(st.permutations(range(rank))), *draw(st.permutations(range(rank, rank + len(blocks))))]
    compressed = [draw(st.booleans()) if dimension < rank else False for dimension in order]
    return dense, encode(dense, order, compressed, blocks)


@given(sparse_arrays(), st.sampled_from([np.int32, np.uint16, np.uint8]))
def test_whatever_is_encoded_expands_to_what_it_was(case: tuple[NDArray[Any], Encoded], dtype: type) -> None:
    dense, encoded = case
    if dtype == np.uint8 and any(max(level[0]) > 255 for level in encoded.levels if not isinstance(level, int)):
        dtype = np.uint16
    assert np.array_equal(expanded(encoded, dense.shape, dtype), dense)


def sparse_weight(encoded: Encoded, shape: Sequence[int], kind: str = "INT32", **more: Any) -> bytes:
    stored = np.array(encoded.values, np.dtype(kind.lower())).tobytes()
    return model([constant("w", kind, shape, stored, sparsity=parameters(encoded), **more)])


DENSE = np.arange(24).reshape(4, 6) * (np.arange(24).reshape(4, 6) % 3 == 0)
GOOD = encode(DENSE, [0, 1], [False, True], {})


def test_an_expanded_tensor_is_read_in_parts(load: Load) -> None:
    weight = load(sparse_weight(GOOD, (4, 6)))["w"]
    parts = [part.codes() for part in weight.parts(24)]
    assert len(parts) == 4
    assert np.array_equal(np.concatenate(parts), DENSE)
    assert [weight.data.read(i, i + 1).tobytes() for i in range(96)] == [
        DENSE.astype(np.int32).tobytes()[i : i + 1] for i in range(96)
    ]


def test_a_sparse_tensor_is_expanded_once_for_all_its_parts(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecast.formats.tflite.sparsity import SparseLayout

    expansions: list[SparseLayout] = []
    original = SparseLayout.expand

    def expand(self: SparseLayout, stored: NDArray[Any]) -> NDArray[Any]:
        expansions.append(self)
        return original(self, stored)

    monkeypatch.setattr(SparseLayout, "expand", expand)
    weight = load(sparse_weight(GOOD, (4, 6)))["w"]
    assert expansions == []
    for _ in range(2):
        assert sum(part.codes().sum() for part in weight.parts(8)) == DENSE.sum()
    assert len(expansions) == 2


def test_a_quantized_sparse_tensor_has_its_zeros_at_code_0(load: Load) -> None:
    weight = load(sparse_weight(GOOD, (4, 6), "INT8", quantization=affine([0.5, 1, 2, 4])))["w"]
    assert np.array_equal(weight.dequantize(), DENSE * np.array([[0.5], [1], [2], [4]]))


# ---- what is wrong -------------------------------------------------------------------------------


def changed(**changes: Any) -> Encoded:
    return Encoded(**(vars(GOOD) | changes))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (changed(order=[0]), "traverses 1 dimensions with 2 descriptions"),
        (changed(order=[0, 0]), "a permutation of the 2 dimensions is needed"),
        (changed(order=[0, 2]), "a permutation of the 2 dimensions is needed"),
        (changed(order=[0, -1]), "a permutation of the 2 dimensions is needed"),
        (changed(order=[]), "traverses 0 dimensions with 2 descriptions"),
        (changed(levels=GOOD.levels[:1]), "traverses 2 dimensions with 1 descriptions"),
        (changed(levels=[*GOOD.levels, 2]), "traverses 2 dimensions with 3 descriptions"),
        (changed(order=[0, 1, 2], block_map=[2], levels=[*GOOD.levels, 2]), r"maps blocks to dimensions \(2,\) of 2"),
        (changed(order=[0, 1, 2], block_map=[-1], levels=[*GOOD.levels, 2]), "maps blocks to dimensions"),
        (changed(order=[0, 1, 2, 3], block_map=[1, 1], levels=[*GOOD.levels, 2, 2]), "maps blocks to dimensions"),
        (changed(order=[0, 2, 1], block_map=[1], levels=[*GOOD.levels, 2]), "block dimensions before others"),
        (changed(order=[0, 1, 2], block_map=[1], levels=[*GOOD.levels, 4]), "blocks of 4 along 6; a divisor"),
        (changed(order=[0, 1, 2], block_map=[1], levels=[*GOOD.levels, 0]), "blocks of 0 along 6; a divisor"),
        (changed(order=[0, 1, 2], block_map=[1], levels=[*GOOD.levels, -2]), "blocks of -2 along 6; a divisor"),
        (changed(levels=[3, GOOD.levels[1]]), "gives a dimension size 3; 4 is needed"),
        (changed(levels=[-4, GOOD.levels[1]]), "gives a dimension size -4; 4 is needed"),
        (changed(levels=[2**31 - 1, GOOD.levels[1]]), "gives a dimension size 2147483647; 4 is needed"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused_on_loading(
    load: Load, encoded: Encoded, message: str
) -> None:
    with pytest.raises(CorruptFile, match=f"tensor 'w': its sparsity .*{message}"):
        load(sparse_weight(encoded, (4, 6)))


SEGMENTS, INDICES = [0, 1, 3, 5, 7], [3, 0, 3, 0, 3, 0, 3]
assert GOOD.levels == [4, (SEGMENTS, INDICES)]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (([0, 1, 3, 5, 6], INDICES), "segments do not fit its indices"),
        (([0, 1, 3, 5, 8], INDICES), "segments do not fit its indices"),
        (([1, 1, 3, 5, 7], INDICES), "segments do not fit its indices"),
        (([0, 3, 1, 5, 7], INDICES), "segments do not fit its indices"),
        (([0, -1, 3, 5, 7], INDICES), "segments do not fit its indices"),
        ((SEGMENTS[:-1], INDICES), "has 4 segments for 4 nodes"),
        (([*SEGMENTS, 8], INDICES), "has 6 segments for 4 nodes"),
        (([], INDICES), "has 0 segments for 4 nodes"),
        ((SEGMENTS, [6, *INDICES[1:]]), "has indices 0 to 6 in a dimension of 6"),
        ((SEGMENTS, [-1, *INDICES[1:]]), "has indices -1 to 3 in a dimension of 6"),
        ((SEGMENTS, [2**31 - 1, *INDICES[1:]]), "has indices 0 to 2147483647"),
        ((SEGMENTS, INDICES[:-1]), "places 6 values, but 7 are stored"),
        ((SEGMENTS, [*INDICES, 1]), "places 8 values, but 7 are stored"),
        (6, "places 24 values, but 7 are stored"),
    ],
)
def test_segments_and_indices_that_do_not_fit_are_refused_when_read(load: Load, level: Any, message: str) -> None:
    weight = load(sparse_weight(changed(levels=[4, level]), (4, 6)))["w"]
    with pytest.raises(CorruptFile) as refused:
        weight.codes()
    assert f"model.tflite: tensor 'w': its sparsity {message}" in str(refused.value)


def described(*levels: Fields) -> Fields:
    return table(schema.SparsityParameters, traversal_order=ints(0, 1), dim_metadata=[*levels])


COMPRESSED = description(GOOD.levels[1])


@pytest.mark.parametrize("field", ["segments_type", "indices_type"])
@pytest.mark.parametrize("kind", [0, 4, 255])
def test_segments_of_no_known_type_are_refused(load: Load, field: str, kind: int) -> None:
    sparsity = described(description(4), COMPRESSED | table(schema.DimensionMetadata, **{field: np.uint8(kind)}))
    with pytest.raises(CorruptFile, match="a compressed dimension without segments or indices"):
        load(model([constant("w", "INT32", (4, 6), bytes(28), sparsity=sparsity)]))


@pytest.mark.parametrize("kind", [2, -1, 127])
def test_dimensions_of_no_known_format_are_refused(load: Load, kind: int) -> None:
    sparsity = described(description(4), COMPRESSED | table(schema.DimensionMetadata, format=np.int8(kind)))
    with pytest.raises(Unsupported, match=rf"has dimension format {kind}: dense \(0\) and CSR \(1\) are known"):
        load(model([constant("w", "INT32", (4, 6), bytes(28), sparsity=sparsity)]))


def test_the_inside_of_a_block_may_not_be_compressed(load: Load) -> None:
    level = ([0, 1], [0])
    with pytest.raises(Unsupported, match="compresses the inside of blocks"):
        load(sparse_weight(changed(order=[0, 1, 2], block_map=[1], levels=[*GOOD.levels, level]), (4, 6)))


def test_sparse_codes_below_a_byte_are_refused(load: Load) -> None:
    with pytest.raises(Unsupported, match="tensor 'w': is sparse with int4 values"):
        load(model([constant("w", "INT4", (4, 6), bytes(4), sparsity=parameters(GOOD))]))


def test_stored_bytes_that_are_no_whole_values_are_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match="tensor 'w': has 27 bytes of int32 values"):
        load(model([constant("w", "INT32", (4, 6), bytes(27), sparsity=parameters(GOOD))]))


def test_stored_values_that_are_not_the_leaves_are_refused(load: Load) -> None:
    for count in (6, 8):
        with pytest.raises(CorruptFile, match=f"places 7 values, but {count} are stored"):
            load(sparse_weight(changed(values=[1] * count), (4, 6)))["w"].codes()


@pytest.mark.parametrize("shape", [(4, 6, 1), (4,), (), (6, 4)])
def test_a_description_of_another_shape_is_refused(load: Load, shape: tuple[int, ...]) -> None:
    with pytest.raises(CorruptFile, match="tensor 'w': its sparsity"):
        load(sparse_weight(GOOD, shape))


# ---- bombs ---------------------------------------------------------------------------------------


def cost_of(weight: Tensor) -> tuple[float, int]:
    """Seconds and bytes that decoding takes; it must be refused."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(Error):
            weight.codes()
        return time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_dense_form_out_of_all_proportion_is_refused_on_loading(load: Load) -> None:
    shape = (2**15, 2**15)
    bomb = Encoded([0, 1], [], [2**15, ([0] * (2**15 + 1), [])], [1])
    with pytest.raises(Unsupported, match="tensor 'w': repeats or expands what the file holds: 10736"):
        load(sparse_weight(bomb, shape, "INT8"))


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_a_shape_beyond_all_memory_is_refused_on_loading(load: Load, rank: int) -> None:
    size = 2**31 - 1
    with pytest.raises(Error, match="repeats or expands what the file holds|is larger than any memory"):
        load(sparse_weight(Encoded(list(range(rank)), [], [size] * rank, [1]), (size,) * rank))


@pytest.mark.parametrize("shape", [(2**12, 2**12), (2**8, 2**8, 2**8), (2,) * 24])
def test_places_are_counted_before_they_are_made(load: Load, shape: tuple[int, ...]) -> None:
    """A dense tree of millions of leaves for one stored value: the numbers alone tell."""
    weight = load(sparse_weight(Encoded(list(range(len(shape))), [], list(shape), [1]), shape, "INT8"))["w"]
    seconds, most_bytes = cost_of(weight)
    assert seconds < 5  # millions of places would take minutes
    assert most_bytes < 1 << 20


def test_indices_far_outside_do_not_reach_the_dense_form(load: Load) -> None:
    level = ([0, 1, 1, 1, 1], [2**31 - 1])
    weight = load(sparse_weight(Encoded([0, 1], [], [4, level], [1]), (4, 6)))["w"]
    assert cost_of(weight)[1] < 1 << 20
