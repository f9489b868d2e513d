"""The canonical order of sub-byte codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.arithmetic.packing import byte_table, pack, packed_size, unpack

INTEGERS = [ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4]


def test_first_element_is_in_the_low_nibble() -> None:
    packed = pack(np.array([1, 2, 3, 4], np.int8), 4)
    assert packed.tolist() == [0x21, 0x43]  # the example in CMSIS-NN's arm_nnfunctions.h


def test_first_of_four_is_in_the_low_bits() -> None:
    assert pack(np.array([0, 1, 2, 3], np.uint8), 2).tolist() == [0b11_10_01_00]


def test_negative_codes_are_twos_complement_and_the_tail_is_zero() -> None:
    assert pack(np.array([-8, -1, 7], np.int8), 4).tolist() == [0xF8, 0x07]
    assert unpack(np.array([0xF8, 0x07], np.uint8), np.dtype(ml_dtypes.int4), 3).tolist() == [-8, -1, 7]
    assert unpack(np.array([0b10_01_11_00], np.uint8), np.dtype(ml_dtypes.int2), 4).tolist() == [0, -1, 1, -2]


def test_unused_bits_of_the_last_byte_are_ignored() -> None:
    assert unpack(np.array([0xF5], np.uint8), np.dtype(ml_dtypes.uint4), 1).tolist() == [5]


@pytest.mark.parametrize("dtype", INTEGERS)
@given(data=st.data())
def test_unpack_undoes_pack(dtype: type, data: st.DataObject) -> None:
    info = ml_dtypes.iinfo(dtype)
    bits, storage = SUB_BYTE[np.dtype(dtype)]
    codes = np.array(data.draw(st.lists(st.integers(int(info.min), int(info.max)), max_size=70)), storage)
    packed = pack(codes, bits)
    assert packed.size == packed_size(codes.size, bits)
    unpacked = unpack(packed, np.dtype(dtype), codes.size)
    assert unpacked.dtype == storage
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("dtype", list(SUB_BYTE), ids=str)
def test_every_byte_unpacks_as_its_bits_say(dtype: np.dtype) -> None:
    bits, storage = SUB_BYTE[dtype]
    for byte in range(256):
        for i, code in enumerate(byte_table(dtype)[byte].tolist()):
            pattern = (byte >> (bits * i)) & ((1 << bits) - 1)
            signed = pattern - (1 << bits) if storage == np.int8 and pattern >> (bits - 1) else pattern
            assert code == signed


def test_ml_dtypes_agrees_on_signedness_and_width() -> None:
    for dtype, (bits, _) in SUB_BYTE.items():
        assert bits_of(dtype) == bits
        if dtype != np.dtype(ml_dtypes.float4_e2m1fn):
            assert ml_dtypes.iinfo(dtype).bits == bits


def test_pack_takes_any_shape_and_any_memory_order() -> None:
    codes = np.arange(12, dtype=np.int8).reshape(3, 4) % 8
    np.testing.assert_array_equal(pack(codes.T, 4), pack(np.ascontiguousarray(codes.T), 4))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [(1 << 19) - 1, (1 << 19) + 5])
def test_pack_of_more_than_one_piece_is_that_of_every_element(bits: int, size: int) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, size).astype(np.int8)
    packed = pack(codes, bits)
    per_byte, mask = 8 // bits, (1 << bits) - 1
    for i in range(per_byte):
        np.testing.assert_array_equal(
            (packed >> (bits * i))[: len(codes[i::per_byte])] & mask, codes[i::per_byte] & mask
        )
        assert packed[-1] >> (bits * i) == 0 or (packed.size - 1) * per_byte + i < size
