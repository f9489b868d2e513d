"""The GGUF reader: gguf's own values, and files that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import Unsupported
from tests.formats.gguf import gguf_files
from tests.growth import assert_linear

FIXTURE = Path(__file__).parents[3] / "fixtures" / "gguf" / "types.gguf"
TRUTH = {key.removeprefix("w/"): value for key, value in np.load(FIXTURE.with_suffix(".npz")).items()}

DTYPES: dict[str, Any] = {
    "Q4_0": ml_dtypes.int4,
    "Q4_1": ml_dtypes.uint4,
    "Q5_0": np.int8,
    "Q2_K": ml_dtypes.uint2,
    "Q3_K": ml_dtypes.int4,
    "Q4_K": ml_dtypes.uint4,
    "Q6_K": np.int8,
    "TQ1_0": ml_dtypes.int2,
    "MXFP4": ml_dtypes.float4_e2m1fn,
    "BF16": ml_dtypes.bfloat16,
}


def load(tmp_path: Path, content: bytes) -> nibblecast.Model:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return nibblecast.load(path)


@pytest.mark.parametrize("name", TRUTH)
def test_values_are_those_of_gguf(name: str) -> None:
    tensor = nibblecast.load(FIXTURE)[name]
    wanted = TRUTH[name]
    got = tensor.numpy() if wanted.dtype.kind == "i" or wanted.dtype == np.float64 else tensor.dequantize(np.float32)
    np.testing.assert_array_equal(got, wanted)
    assert got.shape == wanted.shape


@pytest.mark.parametrize("name", DTYPES)
def test_codes_have_the_narrowest_dtype(name: str) -> None:
    assert nibblecast.load(FIXTURE)[name].dtype == DTYPES[name]


def test_scales_keep_their_dtype_and_nesting() -> None:
    model = nibblecast.load(FIXTURE)
    plain, nested = model["Q4_1"].quantization, model["Q4_K"].quantization
    assert plain is not None
    assert plain.scale.dtype == np.float16
    assert nested is not None
    assert nested.scale.dtype == np.uint8
    assert nested.scale.quantization is not None
    assert nested.scale.quantization.scale.dtype == np.float16
    assert nested.offset is not None
    assert nested.offset.quantization is not None


@pytest.mark.parametrize("name", TRUTH)
def test_any_range_of_bytes_is_that_of_the_whole(name: str) -> None:
    data = nibblecast.load(FIXTURE)[name].data
    whole = data.read(0, data.nbytes)
    for start, stop in ((0, 1), (1, 3), (data.nbytes // 2 - 1, data.nbytes), (data.nbytes, data.nbytes)):
        np.testing.assert_array_equal(data.read(start, stop), whole[start:stop])


def test_metadata_that_is_not_kept_is_a_loss() -> None:
    model = nibblecast.load(FIXTURE)
    assert model.metadata.producer == "gguf 0.19"
    assert [loss.kind for loss in model.losses] == ["dropped"]
    assert "llama.context_length" in model.losses[0].detail


@pytest.mark.parametrize("suffix", [".safetensors", ".h", ".onnx"])
def test_it_converts(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"weights{suffix}"
    comparison = nibblecast.convert(FIXTURE, target, skip=["F64", "I[0-9]*"], verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal


@given(st.lists(st.integers(0, 255), min_size=18, max_size=18), st.integers(1, 3))
def test_q4_0_is_what_its_definition_says(block: list[int], count: int) -> None:
    import tempfile

    block[1] = block[1] & 0x3F  # a finite scale
    d = np.array(block[:2], np.uint8).view(np.float16).astype(np.float32)[0]
    codes = [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
    content = gguf_files.file([gguf_files.info("w", (count, 32), gguf_files.Q4_0, 0)], bytes(block) * count)
    with tempfile.TemporaryDirectory() as folder:
        values = load(Path(folder), content)["w"].dequantize(np.float32)
    wanted = np.array([d * np.float32(code - 8) for code in codes], np.float32)
    np.testing.assert_array_equal(values, np.tile(wanted, (count, 1)))


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    infos = [gguf_files.info("one", (), gguf_files.F32, 0), gguf_files.info("none", (0, 4), gguf_files.F32, 32)]
    model = load(tmp_path, gguf_files.file(infos, struct.pack("<f", 1.5) + bytes(60)))
    assert model["one"].numpy() == 1.5
    assert model["none"].shape == (0, 4)


def test_the_alignment_of_the_metadata_counts(tmp_path: Path) -> None:
    infos = [gguf_files.info("a", (1,), gguf_files.F32, 0), gguf_files.info("b", (1,), gguf_files.F32, 64)]
    data = struct.pack("<f", 1) + bytes(60) + struct.pack("<f", 2)
    content = gguf_files.file(infos, data, [gguf_files.number("general.alignment", 64)], alignment=64)
    assert load(tmp_path, content)["b"].numpy() == 2


A = gguf_files.info("a", (8,), gguf_files.F32, 0)
DATA = bytes(128)
HOSTILE = {
    "other version": (gguf_files.file([A], DATA, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (gguf_files.file([A], DATA, counts=(1 << 40, 0)), "truncated"),
    "many keys": (gguf_files.file([A], DATA, counts=(1, 1 << 62)), "truncated"),
    "long key": (gguf_files.file([A], DATA, [struct.pack("<Q", 1 << 50)]), "truncated"),
    "key twice": (gguf_files.file([A], DATA, [gguf_files.number("k", 1)] * 2), "key 'k' twice"),
    "no UTF-8": (gguf_files.file([A], DATA, [gguf_files.string(b"\xff") + struct.pack("<II", 4, 1)]), "UTF-8"),
    "type of value": (gguf_files.file([A], DATA, [gguf_files.string("k") + struct.pack("<II", 13, 1)]), "type 13"),
    "long array": (
        gguf_files.file([A], DATA, [gguf_files.string("k") + struct.pack("<IIQ", 9, 4, 1 << 40)]),
        "truncated",
    ),
    "deep array": (
        gguf_files.file([A], DATA, [gguf_files.string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99]),
        "nests",
    ),
    "tensor twice": (gguf_files.file([A, A], DATA), "twice"),
    "shared bytes": (gguf_files.file([A, gguf_files.info("b", (4,), 0, 0)], DATA), "shares bytes"),
    "outside": (gguf_files.file([gguf_files.info("a", (64,), 0, 0)], DATA), "outside the file"),
    "far away": (gguf_files.file([gguf_files.info("a", (8,), 0, 1 << 63)], DATA), "outside the file"),
    "misaligned": (gguf_files.file([gguf_files.info("a", (8,), 0, 4)], DATA), "alignment"),
    "large": (gguf_files.file([gguf_files.info("a", (1 << 40, 1 << 10), 0, 0)], DATA), "outside the file"),
    "larger": (gguf_files.file([gguf_files.info("a", (1 << 40, 1 << 40), 0, 0)], DATA), "larger than any memory"),
    "half a block": (gguf_files.file([gguf_files.info("a", (2, 16), 2, 0)], DATA), "whole blocks"),
    "no type": (gguf_files.file([gguf_files.info("a", (8,), 99, 0)], DATA), "type 99"),
    "former type": (gguf_files.file([gguf_files.info("a", (256,), 4, 0)], DATA), "Q4_2"),
    "half a lattice": (gguf_files.file([gguf_files.info("a", (128,), 16, 0)], DATA), "whole blocks of 256"),
    "many axes": (gguf_files.file([gguf_files.info("a", (1,) * 40, 0, 0)], DATA), "dimensions"),
    "large axes": (gguf_files.file([gguf_files.info("a", (1 << 62,) * 240, 0, 0)], DATA), "has 240 dimensions"),
    "a long key": (
        gguf_files.file([A], DATA, [gguf_files.number("k" * 10**6, 1)] * 2),
        "has the key '" + "k" * 80 + "'… twice",
    ),
    "alignment": (gguf_files.file([A], DATA, [gguf_files.number("general.alignment", 0)]), "power of two"),
    "truncated": (gguf_files.file([A], DATA)[:40], "truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_lie_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    with pytest.raises(nibblecast.Error) as caught:
        load(tmp_path, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_axes_cost_nothing(tmp_path: Path) -> None:
    """800 KB of them, each the largest: they are counted, and not multiplied."""

    def make(count: int) -> Callable[[], object]:
        content = gguf_files.file([gguf_files.info("a", (1 << 62,) * count, 0, 0)], DATA)

        def run() -> None:
            with pytest.raises(Unsupported, match=f"has {count} dimensions"):
                load(tmp_path, content)

        return run

    assert_linear(make, 25_000)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = gguf_files.file([A], bytes(32), [gguf_files.number("k", 1)])
    for length in range(4, len(content)):
        with pytest.raises(nibblecast.Error):
            load(tmp_path, content[:length])


def test_an_nvfp4_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path: Path) -> None:
    content = gguf_files.file([gguf_files.info("w", (64,), 40, 0)], b"\xff" * 36)
    with pytest.raises(nibblecast.Error, match="0xFF"):
        load(tmp_path, content)["w"].dequantize(np.float32)
