"""Tensor, Quantization and Model: what they check, how they are cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import GroupIndex, Model, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.converters.storage import InMemory


def scale_of(*shape: int) -> Tensor:
    return Tensor.from_array("scale", np.ones(shape, np.float32))


def test_block_shapes_of_the_usual_granularities() -> None:
    shape = (6, 3, 64)
    assert grid_shape(shape, per_tensor(shape)) == (1, 1, 1)
    assert grid_shape(shape, per_axis(shape, 1)) == (1, 3, 1)
    assert grid_shape(shape, blocked(shape, 2, 32)) == (6, 3, 2)
    assert grid_shape((5, 7), (2, 3)) == (3, 3)
    assert grid_shape((), ()) == ()
    assert grid_shape((0, 4), per_axis((0, 4), 1)) == (1, 4)


@pytest.mark.parametrize(
    ("block_shape", "granularity"),
    [((4, 8), "per-tensor"), ((1, 8), "per-axis 0"), ((4, 1), "per-axis 1"), ((1, 4), "blockwise (1, 4)")],
)
def test_granularity_has_a_name(block_shape: tuple[int, ...], granularity: str) -> None:
    quantization = Quantization(scale_of(*grid_shape((4, 8), block_shape)), block_shape)
    tensor = Tensor.from_array("w", np.zeros((4, 8), ml_dtypes.int4), quantization)
    assert tensor.granularity == granularity
    assert Tensor.from_array("b", np.zeros(3, np.float32)).granularity == "none"


def test_data_must_fill_the_shape_exactly() -> None:
    with pytest.raises(CorruptFile, match=r"tensor 'w': holds 3 bytes, but shape \(2, 2\) of int4 takes 2"):
        Tensor("w", (2, 2), np.dtype(ml_dtypes.int4), InMemory(np.zeros(3, np.uint8)))
    nothing = InMemory(np.zeros(0, np.uint8))
    with pytest.raises(CorruptFile, match="negative size"):
        Tensor("w", (-1, -2), np.dtype(np.int8), InMemory(np.zeros(2, np.uint8)))
    with pytest.raises(Unsupported, match="has 33 dimensions; 32 are the most"):
        Tensor("w", (0, *[1] * 32), np.dtype(np.int8), nothing)
    with pytest.raises(CorruptFile, match="larger than any memory"):
        Tensor("w", (0, 1 << 40, 1 << 40), np.dtype(np.int8), nothing)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (lambda: Quantization(scale_of(2), (4, 1)), r"scale of shape \(2,\).*\(1, 8\) is needed"),
        (lambda: Quantization(scale_of(1, 1), (4,)), "must have the rank of shape"),
        (lambda: Quantization(scale_of(4, 8), (1, 0)), "every block must hold at least one element"),
        (
            lambda: Quantization(scale_of(1, 1), (4, 8), zero_point=scale_of(1, 2)),
            r"zero point of shape \(1, 2\).*\(1, 1\) is needed",
        ),
        (lambda: Quantization(scale_of(1, 1), (4, 8), offset=scale_of(2, 1)), r"offset of shape \(2, 1\)"),
        (
            lambda: Quantization(Tensor.from_array("scale", np.ones((1, 1), np.int8)), (4, 8)),
            "scale of dtype int8: it must be floating-point",
        ),
        (lambda: Quantization(scale_of(1, 1), (4, 8), codebook=scale_of(16)), "unsigned codes"),
        (
            lambda: Quantization(scale_of(4, 2), (1, 4), group_index=GroupIndex(1, scale_of(8))),
            "group index of shape",
        ),
        (
            lambda: Quantization(
                scale_of(4, 2),
                (1, 4),
                group_index=GroupIndex(2, Tensor.from_array("i", np.zeros(8, np.int32))),
            ),
            "along axis 2",
        ),
    ],
)
def test_parameters_must_fit_the_tensor(quantization: object, message: str) -> None:
    with pytest.raises(CorruptFile, match="tensor 'w': .*" + message):
        Tensor.from_array("w", np.zeros((4, 8), ml_dtypes.int4), quantization())  # type: ignore[operator]


def test_codes_need_integers_or_small_floats() -> None:
    with pytest.raises(CorruptFile, match="dtype complex64 cannot hold codes"):
        Tensor.from_array("w", np.zeros(2, np.complex64), Quantization(scale_of(1), (2,)))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(-8, 8).astype(ml_dtypes.int4).reshape(4, 4),
        np.arange(9).astype(ml_dtypes.uint4).reshape(3, 3),
        np.array([0.5, -6, 3], ml_dtypes.float4_e2m1fn),
        np.array(1, ml_dtypes.int2),
        np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
        np.array([1 + 2j], np.complex64),
        np.zeros((0, 3), ml_dtypes.int4),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_from_array_and_back(array: np.ndarray) -> None:
    tensor = Tensor.from_array("x", array)
    assert tensor.shape == array.shape
    assert tensor.numpy().dtype == array.dtype
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.nbytes == -(-array.size * tensor.bits // 8)


@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=4),
    st.sampled_from([ml_dtypes.int2, ml_dtypes.int4, np.int8, np.int32]),
    st.integers(1, 20),
)
def test_parts_put_together_are_the_tensor(shape: list[int], dtype: type, nbytes: int) -> None:
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2).astype(dtype)
    tensor = Tensor.from_array("x", array)
    parts = list(tensor.parts(nbytes))
    np.testing.assert_array_equal(np.concatenate([part.packed() for part in parts]), tensor.packed())
    assert sum(part.size for part in parts) == tensor.size
    np.testing.assert_array_equal(np.concatenate([p.codes().reshape(-1) for p in parts]), tensor.codes().reshape(-1))


def test_parts_never_cut_a_block_or_a_byte() -> None:
    shape = (30, 5)
    zero_point = Tensor.from_array("zero_point", np.zeros((5, 5), ml_dtypes.int4))
    quantization = Quantization(scale_of(5, 5), (6, 1), zero_point)
    tensor = Tensor.from_array("w", np.zeros(shape, ml_dtypes.int4), quantization)
    # rows of 5 nibbles end on a byte every 2, blocks every 6, and their zero points (5 nibbles each) every 12
    assert tensor.row_step == 12
    assert [part.shape[0] for part in tensor.parts(1)] == [12, 12, 6]


def test_a_single_large_row_is_cut_too() -> None:
    tensor = Tensor.from_array("w", np.zeros((2, 1, 1000), np.int8))
    sizes = [part.size for part in tensor.parts(100)]
    assert max(sizes) <= 100
    assert sum(sizes) == 2000


def test_a_model_is_a_mapping_in_order() -> None:
    tensors = {name: Tensor.from_array(name, np.zeros(1, np.float32)) for name in ("b", "a")}
    model = Model(tensors, Metadata("test"))
    assert list(model) == ["b", "a"]
    assert len(model) == 2
    assert model["a"] is tensors["a"]
    assert "c" not in model
