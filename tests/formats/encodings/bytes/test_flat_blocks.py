"""Blocks and cycles of a flattened tensor, against the index of each element's parameter."""

from __future__ import annotations

from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.bytes.flat_blocks import cycle, flat_blocks

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def ones(shape: tuple[int, ...]) -> Tensor:
    return Tensor.from_array("w", np.ones(shape, ml_dtypes.uint4))


def scales(count: int) -> Tensor:
    return Tensor.from_array("scale", np.arange(1, count + 1, dtype=np.float32))


def with_quantization(shape: tuple[int, ...], quantization: Quantization) -> Tensor:
    plain = ones(shape)
    return Tensor("w", shape, plain.dtype, plain.data, quantization)


@given(SHAPES, st.integers(1, 100))
def test_each_element_has_the_parameter_of_its_block(shape: tuple[int, ...], size: int) -> None:
    blocks = flat_blocks(shape, size)
    assert size % prod(blocks.block_shape) == 0 or blocks.repeats == 1
    tensor = with_quantization(shape, Quantization(blocks.spread(scales(blocks.count)), blocks.block_shape))
    wanted = 1 + np.arange(prod(shape)) // size
    np.testing.assert_array_equal(tensor.dequantize(np.float32).reshape(-1), wanted)


@given(SHAPES, st.integers(1, 20), st.integers(1, 20))
def test_parameters_may_be_in_blocks_themselves(shape: tuple[int, ...], size: int, nested: int) -> None:
    blocks = flat_blocks(shape, size)
    codes = np.arange(blocks.count, dtype=np.uint8)
    inner = Quantization(scales(-(-blocks.count // nested)), (nested,))
    scale = Tensor("scale", codes.shape, codes.dtype, Tensor.from_array("scale", codes).data, inner)
    tensor = with_quantization(shape, Quantization(blocks.spread(scale), blocks.block_shape))
    block = np.arange(prod(shape)) // size
    wanted = (block % 256) * (1 + block // nested)
    np.testing.assert_array_equal(tensor.dequantize(np.float32).reshape(-1), wanted)


@given(SHAPES, st.data())
def test_cycles_begin_again(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = prod(shape)
    period = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    groups = cycle(shape, period)
    quantization = Quantization(groups.spread(scales(period)), groups.block_shape, group_index=groups.index)
    wanted = 1 + np.arange(count) % period
    np.testing.assert_array_equal(with_quantization(shape, quantization).dequantize(np.float32).reshape(-1), wanted)


@pytest.mark.parametrize(
    ("shape", "size", "block_shape", "repeats"),
    [
        ((8, 128), 64, (1, 64), 1),
        ((12, 32), 64, (2, 32), 1),
        ((2, 3, 64), 64, (1, 1, 64), 1),
        ((2, 4, 32), 64, (1, 2, 32), 1),
        ((3, 7), 64, (3, 7), 1),
        ((300, 200), 64, (1, 8), 8),
        ((5, 33), 64, (1, 1), 64),
    ],
)
def test_blocks_are_the_largest_boxes(
    shape: tuple[int, ...], size: int, block_shape: tuple[int, ...], repeats: int
) -> None:
    blocks = flat_blocks(shape, size)
    assert (blocks.block_shape, blocks.repeats) == (block_shape, repeats)


def test_another_number_of_parameters_is_refused() -> None:
    with pytest.raises(CorruptFile, match="has 3 of scale for 4 blocks"):
        flat_blocks((4, 8), 8).spread(scales(3))
    with pytest.raises(CorruptFile, match="has 3 of scale: 8 are needed"):
        cycle((4, 8), 8).spread(scales(3))
