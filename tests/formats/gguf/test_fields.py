"""Fields are taken apart alike by NumPy and by compiled code, and as they are defined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.arithmetic import compiled
from nibblecast.formats.gguf.fields import fields, paired_halves

pytestmark = pytest.mark.slow

#: Of GGUF's types: bytes of a block, where the fields begin and end, bytes of a group, bits, how far they are moved.
FIELDS = (
    (34, 2, 34, 32, 8, 0),
    (22, 6, 22, 16, 4, 0),
    (84, 16, 80, 32, 2, 0),
    (110, 0, 32, 32, 1, 2),
    (110, 96, 104, 8, 4, 0),
    (110, 104, 108, 4, 2, 4),
    (136, 4, 8, 1, 4, 0),
    (210, 0, 128, 64, 4, 0),
    (210, 128, 192, 32, 2, 4),
    (292, 4, 260, 256, 8, 0),
    (18, 0, 2, 2, 8, 0),
)
HALVES = ((18, 2, 16), (144, 16, 32), (36, 4, 8), (17, 1, 16))


@pytest.fixture(params=["numpy", "compiled"], autouse=True)
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH", "never" if request.param == "numpy" else "0")
    assert compiled.is_used() == (request.param == "compiled")


def blocks_of(count: int, nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, nbytes), np.uint8)


@pytest.mark.parametrize(("nbytes", "begin", "end", "group", "bits", "up"), FIELDS)
@given(count=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_fields(nbytes: int, begin: int, end: int, group: int, bits: int, up: int, count: int, seed: int) -> None:
    blocks = blocks_of(count, nbytes, seed)
    expected = [
        [
            ((int(byte) >> shift) & ((1 << bits) - 1)) << up
            for start in range(begin, end, group)
            for shift in range(0, 8, bits)
            for byte in block[start : start + group]
        ]
        for block in blocks
    ]
    before = blocks.copy()
    np.testing.assert_array_equal(fields(blocks, begin, end, group, bits, up), expected)
    np.testing.assert_array_equal(blocks, before)


@pytest.mark.parametrize(("nbytes", "begin", "half"), HALVES)
@given(count=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_halves(nbytes: int, begin: int, half: int, count: int, seed: int) -> None:
    blocks = blocks_of(count, nbytes, seed)
    groups = blocks[:, begin:].reshape(-1, half)
    nibbles = np.concatenate([groups & 15, groups >> 4], axis=1).reshape(-1, 2)
    np.testing.assert_array_equal(paired_halves(blocks, begin, half), nibbles[:, 0] | (nibbles[:, 1] << 4))
