"""Elements as text: every literal reads back as its element, at the planned width."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.formats.cheader.literals import floats, notation
from nibblecast.formats.cheader.literals.notation import NOTATIONS
from nibblecast.formats.cheader.literals.text import InitialiserText, text_size

NAMED = {
    "INT32_MIN": -(2**31),
    "INT64_MIN": -(2**63),
    "NIBBLECAST_NAN": np.nan,
    "NIBBLECAST_INF": np.inf,
    "-NIBBLECAST_INF": -np.inf,
    "-NIBBLECAST_NAN": np.nan,
}
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def literals_of(spelling, elements):
    encoded = spelling.encode(elements)
    assert encoded.shape == (elements.size, spelling.width)
    assert encoded.dtype == np.uint8
    tokens = encoded.tobytes().decode("ascii").split(",")
    assert tokens.pop() == ""
    return [token.strip() for token in tokens]


def value_of(literal, dtype):
    if literal in NAMED:
        return dtype(NAMED[literal])
    if np.dtype(dtype).kind == "f":
        return dtype(literal.rstrip("f"))
    return dtype(int(literal.rstrip("u"), 0))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype):
    info = np.iinfo(dtype)
    spread = np.linspace(info.min, info.max, 1000).astype(object)
    elements = np.array([info.min, info.min + 1, info.max, 0, 1, *(int(v) for v in spread[1:-1])], dtype)
    literals = literals_of(NOTATIONS[np.dtype(dtype)], elements)
    assert [value_of(literal, dtype) for literal in literals] == elements.tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_signed_integers_are_decimals(dtype):
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    elements = rng.integers(info.min, info.max, 20000, dtype, endpoint=True) >> rng.integers(0, info.bits, 20000, dtype)
    powers = [10**power for power in range(len(str(info.max)))]
    near = [sign * power + step for sign in (1, -1) for power in powers for step in (-1, 0, 1)]
    elements = np.concatenate([elements, np.array([info.min + 1, info.max, *near], dtype)])
    elements = elements[elements != info.min]
    spelling = NOTATIONS[np.dtype(dtype)]
    expected = "".join(f"{element:{spelling.width - 1}}," for element in elements.tolist())
    assert spelling.encode(elements).tobytes() == expected.encode()


@given(st.lists(st.floats(width=32), min_size=1))
def test_float32(values):
    elements = np.array(values, np.float32)
    for literal, element in zip(literals_of(notation.FLOAT32, elements), elements, strict=True):
        value = value_of(literal, np.float32)
        assert value.tobytes() == element.tobytes() or np.isnan([value, element]).all()


def test_float32_bits_of_every_kind():
    rng = np.random.default_rng(0)
    elements = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    powers = [2.0**exponent for exponent in range(-149, 128)] + [float(f"1e{exponent}") for exponent in range(-45, 39)]
    subnormal = rng.integers(0, 1 << 23, 5000, dtype=np.uint32).view(np.float32)
    elements = np.concatenate([elements, np.array(powers, np.float32), subnormal])
    elements = elements[np.isfinite(elements)]
    literals = literals_of(notation.FLOAT32, elements)
    assert np.array([literal[:-1] for literal in literals]).astype(np.float64).astype(np.float32).tobytes() == (
        elements.tobytes()
    )
    assert all(literal.endswith("f") and "." in literal for literal in literals)
    for literal, element in zip(literals, elements, strict=True):
        digits = len(literal.lstrip("-").split("e")[0].replace(".", "").rstrip("0"))
        assert digits == 1 or literal == f"{element:.{digits - 1}e}f"  # rounded from the element itself
        shortest = np.format_float_scientific(element, unique=True)
        if digits != len(shortest.lstrip("-").split("e")[0].replace(".", "").rstrip("0")):
            # numpy also takes decimals halfway between two floats and, beside powers of two, other than the nearest
            neighbours = (np.nextafter(element, direction) for direction in np.array([-np.inf, np.inf], np.float32))
            halfway = {float(element) + float(neighbour) for neighbour in neighbours}
            assert 2 * float(shortest) in halfway or np.frexp(abs(element))[0] == 0.5


def test_float32_halfway_between_two_decimals_is_rounded_once():
    """It is 9.33932665000000843e-20: of 9 digits 9.33932665e-20, which would be rounded to the even ...66."""
    assert literals_of(notation.FLOAT32, np.array([9.33932665e-20], np.float32)) == ["9.3393267e-20f"]


def test_float32_forms():
    elements = np.array([0.1, 0, -0.0, 1, -1 / 3, 1e-45, np.nan, -np.inf], np.float32)
    assert literals_of(notation.FLOAT32, elements) == [
        "1.0e-01f", "0.0e+00f", "-0.0e+00f", "1.0e+00f", "-3.3333334e-01f", "1.0e-45f",
        "NIBBLECAST_NAN", "-NIBBLECAST_INF",
    ]  # fmt: skip
    assert notation.FLOAT32.width == floats.WIDTH


@given(st.lists(st.floats(), min_size=1))
def test_float64(values):
    elements = np.array(values, np.float64)
    for literal, element in zip(literals_of(notation.FLOAT64, elements), elements, strict=True):
        value = value_of(literal, np.float64)
        assert value.tobytes() == element.tobytes() or np.isnan([value, element]).all()


def test_float64_forms():
    elements = np.array([0, -0.0, 1, 1e15, 1e16, 1e-4, -1e-5, 1.5e-5, 1e-100, 123.456, np.nan, np.inf, -np.inf])
    assert literals_of(notation.FLOAT64, elements) == [
        "0.0", "-0.0", "1.0", "1000000000000000.0", "1e+16", "0.0001", "-1e-05", "1.5e-05", "1e-100", "123.456",
        "NIBBLECAST_NAN", "NIBBLECAST_INF", "-NIBBLECAST_INF",
    ]  # fmt: skip


def test_packed_and_small_elements_are_unsigned():
    for dtype in (ml_dtypes.int4, ml_dtypes.uint2, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e5m2, np.bool_):
        assert NOTATIONS[np.dtype(dtype)].c_type == "uint8_t"
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert NOTATIONS[np.dtype(dtype)].c_type == "uint16_t"


@pytest.mark.parametrize("spelling", set(NOTATIONS.values()), ids=lambda spelling: spelling.c_type)
@pytest.mark.parametrize(
    ("count", "piece"), [(1, 1), (15, 1), (16, 5), (17, 5), (17, 100), (70_003, 7_001), (70_003, 70_003)]
)
def test_text_does_not_depend_on_pieces(spelling, count, piece):
    data = np.random.default_rng(0).integers(0, 256, count * spelling.nbytes, dtype=np.uint8)
    elements = data.view(spelling.dtype)
    stream = io.BytesIO()
    text = InitialiserText(stream, spelling, count)
    for start in range(0, count, piece):
        text.write(elements[start : start + piece])
    text.finish()
    lines = stream.getvalue().splitlines(keepends=True)
    assert sum(map(len, lines)) == text_size(spelling, count)
    assert all(line.startswith(b"    ") and line.endswith(b",\n") for line in lines)
    assert {len(line) for line in lines[:-1]} <= {5 + spelling.per_line * spelling.width}
    assert b"".join(line[4:-1] for line in lines) == spelling.encode(elements).tobytes()


def test_lines_of_bytes():
    stream = io.BytesIO()
    text = InitialiserText(stream, notation.UINT8, 18)
    text.write(np.arange(18, dtype=np.uint8))
    text.finish()
    assert stream.getvalue() == (
        b"    0x00,0x01,0x02,0x03,0x04,0x05,0x06,0x07,0x08,0x09,0x0a,0x0b,0x0c,0x0d,0x0e,0x0f,\n    0x10,0x11,\n"
    )
