"""Compiled code decodes bit for bit what NumPy does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.arithmetic import compiled
from nibblecast.converters.errors import UsageError
from nibblecast.converters.ir import Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from tests import zoo

pytestmark = pytest.mark.slow

FLOAT16, BFLOAT16, FLOAT32 = (np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))
FLOATS = (FLOAT16, BFLOAT16, FLOAT32)
CODES = (ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8, ml_dtypes.uint2, ml_dtypes.float4_e2m1fn)
SHAPES = ((6, 64), (3, 4, 32), (5, 2048), (1, 24), (2, 3000))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH", "0")


def by_numpy(tensor: Tensor, dtype: np.dtype[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as context:
        context.setattr(compiled, "_WORTH", "never")
        return tensor.dequantize(dtype)


def blocks_of(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield per_tensor(shape)
    yield per_axis(shape, 0)
    yield per_axis(shape, len(shape) - 1)
    for size in (8, 12, 16, 24, 32, 1500):
        yield blocked(shape, len(shape) - 1, size)


def same(a: Any, b: Any) -> None:
    """The same bits, whatever the payload of NaN."""
    nan = np.isnan(a.astype(np.float32))
    np.testing.assert_array_equal(nan, np.isnan(b.astype(np.float32)))
    bits = np.uint32 if a.dtype.itemsize == 4 else np.uint16
    np.testing.assert_array_equal(a.view(bits)[~nan], b.view(bits)[~nan])


@settings(max_examples=300)
@given(
    shape=st.sampled_from(SHAPES),
    blocks=st.integers(0, 8),
    codes=st.sampled_from(CODES),
    scales=st.sampled_from(FLOATS),
    magnitude=st.integers(-30, 20),
    parts=st.sets(st.sampled_from(["integer zero point", "zero point", "offset", "factor", "codebook"])),
    rounded=st.sampled_from(["", "each float16", "each bfloat16", "last float16", "last bfloat16"]),
    wanted=st.sampled_from(FLOATS),
    seed=st.integers(0, 1 << 20),
)
def test_every_form(  # type: ignore[no-untyped-def]
    shape, blocks, codes, scales, magnitude, parts, rounded, wanted, seed
) -> None:
    random = np.random.default_rng(seed)
    block_shape = list(blocks_of(shape))[blocks]
    grid = grid_shape(shape, block_shape)

    def floats(role: str) -> Tensor:
        numbers = random.normal(size=grid) * 2.0**magnitude
        numbers[random.random(grid) < 0.02] = random.choice([np.nan, np.inf, -np.inf, 0.0])
        with np.errstate(over="ignore"):
            return Tensor.from_array(role, numbers.astype(np.float32).astype(scales))

    zero_point = None
    if "integer zero point" in parts:
        zero_point = Tensor.from_array("z", random.integers(-8, 16, grid).astype(np.int8))
    elif "zero point" in parts:
        zero_point = Tensor.from_array("z", random.normal(size=grid).astype(np.float32))
    dtype = np.dtype(codes)
    quantization = Quantization(
        floats("s"),
        block_shape,
        zero_point,
        floats("o") if "offset" in parts else None,
        factor=0.007874015718698502 if "factor" in parts else 1.0,
    )
    if "codebook" in parts and dtype in (np.uint8, np.dtype(ml_dtypes.uint4), np.dtype(ml_dtypes.uint2)):
        entries = 1 << zoo.bits_of(dtype)
        codebook = Tensor.from_array("c", random.normal(size=entries).astype(np.float32))
        quantization = replace(quantization, codebook=codebook)
    which, _, name = rounded.partition(" ")
    if which:
        key = "compute_dtype" if which == "each" else "value_dtype"
        changed: dict[str, Any] = {key: np.dtype(getattr(ml_dtypes, name, name))}
        quantization = replace(quantization, **changed)
    tensor = replace(zoo.codes(f"w{seed}", shape, codes), quantization=quantization)
    with pytest.MonkeyPatch.context() as patch:
        same(tensor.dequantize(wanted), by_numpy(tensor, wanted, patch))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_every_kind_of_number_is_rounded(dtype: np.dtype[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Around every float16 and bfloat16 number and half-way between, subnormal, zeros, infinities and beyond, NaN."""
    if dtype == FLOAT16:
        exact = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    else:
        exact = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    bits = exact[np.isfinite(exact)].view(np.uint32)
    half = np.uint32(1 << 12 if dtype == FLOAT16 else 1 << 15)
    numbers = np.concatenate([bits + np.uint32(n) for n in (0, 1, half - 1, half, half + 1)]).view(np.float32)
    numbers = np.concatenate([numbers, np.float32([65519.996, 65520, 65536, 3e38, np.inf, -np.inf, 1e-45, 2.0**-25])])
    numbers = np.concatenate([numbers, np.uint32([0x7F800001, 0xFFFFFFFF, 0x7FC00000]).view(np.float32)])
    one = Quantization(Tensor.from_array("s", numbers[:, None]), (1, 8))
    tensor = Tensor.from_array("w", np.ones((numbers.size, 8), np.int8), one)
    got = tensor.dequantize(dtype)
    same(got, by_numpy(tensor, dtype, monkeypatch))
    rounded = Quantization(Tensor.from_array("s", numbers[:, None]), (1, 8), value_dtype=dtype)
    other = BFLOAT16 if dtype == FLOAT16 else FLOAT16
    tensor = replace(tensor, quantization=rounded)
    same(tensor.dequantize(other), by_numpy(tensor, other, monkeypatch))


def test_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would hold without it as well."""
    calls: list[bool] = []
    decode = compiled.decode

    def counted(*arguments: Any) -> bool:
        calls.append(decode(*arguments))
        return calls[-1]

    monkeypatch.setattr("nibblecast.converters.arithmetic.decoding.compiled.decode", counted)
    scale = Tensor.from_array("s", np.ones((4, 2), np.float16))
    quantization = Quantization(scale, (1, 32), value_dtype=FLOAT16)
    tensor = replace(zoo.codes("w", (4, 64), ml_dtypes.uint4), quantization=quantization)
    for dtype in FLOATS:
        tensor.dequantize(dtype)
    assert calls == [True] * 3


def test_what_is_expected_starts_its_import_and_numpy_decodes_meanwhile() -> None:
    program = (
        "import sys, numpy as np\nfrom nibblecast.converters.arithmetic import compiled\n"
        "from nibblecast.converters.ir import Quantization, Tensor\n"
        "s = Tensor.from_array('s', np.ones((1, 1), np.float32))\n"
        "tensor = Tensor.from_array('w', np.ones((1, 1024), np.int8), Quantization(s, (1, 1024)))\n"
        "compiled.expect(1 << 40)\nfirst = tensor.dequantize('float32')\n"
        "compiled._loading()[0].join()\nassert compiled.is_used()\n"
        "assert (tensor.dequantize('float32') == first).all() and 'numba' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("error", [ImportError("for another NumPy"), RuntimeError("no place for what is compiled")])
def test_without_a_compiler_that_works_numpy_decodes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: str) -> None:
        raise error

    monkeypatch.setattr(compiled, "import_module", failing)
    with pytest.warns(UserWarning, match=f"numba is not used, and decoding takes longer: {error}"):
        assert compiled._imported() is None


def test_a_threshold_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH", "soon")
    scale = Tensor.from_array("s", np.ones((4, 1), np.float32))
    tensor = replace(zoo.codes("w", (4, 64), ml_dtypes.uint4), quantization=Quantization(scale, (1, 64)))
    with pytest.raises(UsageError, match="NIBBLECAST_COMPILE_AFTER=soon: must be a number of elements"):
        tensor.dequantize(FLOAT32)


def test_little_work_does_not_import_the_compiler() -> None:
    program = (
        "import sys, numpy as np\nfrom nibblecast.converters.ir import Quantization, Tensor\n"
        "s = Tensor.from_array('s', np.ones((1, 1), np.float32))\n"
        "Tensor.from_array('w', np.ones((64, 64), np.int8), Quantization(s, (64, 64))).dequantize()\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
