"""float6 in safetensors: six bits an element, four in three bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile
from tests.formats.safetensors.containers import entry, file_of

DTYPES: dict[str, Any] = {"F6_E2M3": ml_dtypes.float6_e2m3fn, "F6_E3M2": ml_dtypes.float6_e3m2fn}


def packed(codes: list[int]) -> bytes:
    """The bits of the codes as one number, the first one's lowest."""
    number = sum(code << 6 * position for position, code in enumerate(codes))
    return number.to_bytes(len(codes) * 6 // 8, "little")


def load(tmp_path: Path, kind: str, shape: list[int], data: bytes) -> nibblecast.Model:
    path = tmp_path / "float6.safetensors"
    path.write_bytes(file_of({"a": entry(kind, shape, 0, len(data))}, data))
    return nibblecast.load(path)


@pytest.mark.parametrize("kind", DTYPES)
def test_every_code_has_its_value(kind: str, tmp_path: Path) -> None:
    tensor = load(tmp_path, kind, [4, 16], packed(list(range(64))))["a"]
    codes = np.arange(64, dtype=np.uint8).reshape(4, 16)
    assert (tensor.shape, tensor.dtype) == ((4, 16), np.dtype(DTYPES[kind]))
    np.testing.assert_array_equal(tensor.numpy().view(np.uint8), codes)
    np.testing.assert_array_equal(tensor.dequantize(np.float32), codes.view(DTYPES[kind]).astype(np.float32))
    assert tensor.dequantize(np.float32).max() == {"F6_E2M3": 7.5, "F6_E3M2": 28}[kind]


@settings(max_examples=50)
@given(codes=st.lists(st.lists(st.integers(0, 63), min_size=4, max_size=4), max_size=9), data=st.data())
def test_any_part_is_that_of_the_whole(codes: list[list[int]], data: st.DataObject, tmp_path_factory: Any) -> None:
    flat = [code for four in codes for code in four]
    tensor = load(Path(tmp_path_factory.getbasetemp()), "F6_E2M3", [len(codes), 4], packed(flat))["a"]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert tensor.data.read(start, stop).tolist() == flat[start:stop]


def test_the_order_that_is_assumed_is_said(tmp_path: Path) -> None:
    (loss,) = load(tmp_path, "F6_E2M3", [4], bytes(3)).losses
    assert (loss.tensor, loss.kind) == ("", "reinterpreted")
    assert "lowest bits first" in loss.detail


def test_bits_must_be_whole_bytes(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="has 2 bytes for shape \\[3\\] of F6_E3M2, which takes 2.25"):
        load(tmp_path, "F6_E3M2", [3], bytes(2))


def test_it_goes_onward_as_the_layout_of_ours(tmp_path: Path) -> None:
    data = packed(list(range(8)))
    source = load(tmp_path, "F6_E3M2", [2, 4], data).metadata.source
    assert source is not None
    nibblecast.convert(source, tmp_path / "out.safetensors")
    assert nibblecast.verify(source, tmp_path / "out.safetensors").equal
    again = nibblecast.load(tmp_path / "out.safetensors")
    assert (again["a"].dtype.name, again.losses) == ("float6_e3m2fn", ())


def test_every_dtype_of_the_official_library_is_known(tmp_path: Path) -> None:
    """The library says which there are when it refuses one."""
    with pytest.raises(safetensors.SafetensorError) as raised:
        safetensors.deserialize(file_of({"a": entry("I4")}, bytes(8)))
    names = str(raised.value).partition("expected one of ")[2]
    official = {part.strip(" `") for part in names.partition(" at ")[0].split(",")}
    assert len(official) > 20
    for kind in sorted(official):
        digits = re.match(r"[A-Z]+?(\d+)", kind)
        nbytes = 4 * (int(digits[1]) if digits else 8) // 8
        data = bytes(nbytes)
        safetensors.deserialize(file_of({"a": entry(kind, [4], 0, nbytes)}, data))
        assert load(tmp_path, kind, [4], data)["a"].shape == (4,)
