"""Schemes as text."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.errors import UsageError
from nibblecast.converters.stages.scheme import CODE_DTYPES, Blocked, PerAxis, PerTensor, Scheme, parse_scheme

INT4, UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4", Scheme(INT4)),
        ("uint4", Scheme(UINT4, symmetric=False)),
        ("uint4,symmetric", Scheme(UINT4)),
        ("int4,block=32", Scheme(INT4, Blocked(32))),
        ("block=32,int4,axis=-2", Scheme(INT4, Blocked(32, -2))),
        ("int4, axis=0", Scheme(INT4, PerAxis(0))),
        ("int4,per-channel,axis=1", Scheme(INT4, PerAxis(1))),
        ("int8,per-tensor,narrow", Scheme(np.dtype(np.int8), PerTensor(), narrow=True)),
        (
            "int4,block=128,asymmetric,mse,scale=float16,requantize",
            Scheme(INT4, Blocked(128), False, False, "mse", np.dtype(np.float16), True),
        ),
        ("int4,except=lm_head*|*embed*", Scheme(INT4, excepted=("lm_head*", "*embed*"))),
        ("int4,only=*.mlp.*", Scheme(INT4, only=("*.mlp.*",))),
        ("int4,symmetric,full,minmax,per-channel,scale=float32", Scheme(INT4)),
    ],
)
def test_texts(text: str, expected: Scheme) -> None:
    scheme = parse_scheme(text)
    assert scheme == expected
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not one of"),
        ("block=32", "one of int2, uint2, int4"),
        ("int4,int8", "one of int2, uint2, int4"),
        ("int3", "'int3' is not one of int2, uint2, int4"),
        ("int4=1", "'int4=1' is not one of"),
        ("int4,block", "'block' is not one of"),
        ("int4,block=", "block=: must be a whole number"),
        ("int4,block=0", "block=0: must be at least 1"),
        ("int4,block=-1", "block=-1: must be at least 1"),
        ("int4,block=3_2", "block=3_2: must be a whole number"),
        ("int4,block=" + "9" * 5000, "a whole number"),
        ("int4,axis=x", "axis=x: must be a whole number"),
        ("int4,axis=1,axis=1", "'axis' is given twice"),
        ("int4,only=a,only=b", "'only' is given twice"),
        ("int4,symmetric,asymmetric", "'symmetric' and 'asymmetric' cannot be combined"),
        ("int4,per-tensor,block=32", "'per-tensor' and 'block' cannot be combined"),
        ("int4,per-tensor,axis=0", "'per-tensor' and 'axis' cannot be combined"),
        ("int4,scale=float64", "scale=float64: use float32, float16, bfloat16"),
    ],
)
def test_texts_that_say_nothing_sensible(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(text)
    assert why in str(caught.value)


def test_impossible_dtypes() -> None:
    with pytest.raises(UsageError, match="cannot quantize to int16"):
        Scheme(np.dtype(np.int16))
    with pytest.raises(UsageError, match="cannot have scales of float64"):
        Scheme(INT4, scale_dtype=np.dtype(np.float64))


def test_ranges_of_codes() -> None:
    full = {name: (s.lowest, s.middle, s.highest) for name, d in CODE_DTYPES.items() for s in [Scheme(d)]}
    assert full == {
        "int2": (-2, 0, 1),
        "uint2": (0, 2, 3),
        "int4": (-8, 0, 7),
        "uint4": (0, 8, 15),
        "int8": (-128, 0, 127),
        "uint8": (0, 128, 255),
    }
    assert Scheme(INT4, narrow=True).lowest == -7


def test_only_and_except_choose_weights_by_name() -> None:
    scheme = parse_scheme("int4,only=*.weight,except=lm_head*|*embed*")
    names = ("layers.0.weight", "layers.0.bias", "lm_head.weight", "embed.weight")
    assert [scheme.takes(name) for name in names] == [True, False, False, False]
