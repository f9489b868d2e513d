"""What cannot be read from, or written to, safetensors files: each by its message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.safetensors import file_layout, packed_layout
from tests import zoo


def matrix(name: str) -> Tensor:
    """A weight that GPTQ's layout holds."""
    codes = Tensor.from_array(name, np.zeros((32, 64), np.int8).astype(ml_dtypes.int4))
    return replace(codes, quantization=Quantization(Tensor.from_array("s", np.ones((32, 2), np.float16)), (1, 32)))


def plain(name: str, dtype: Any = np.float32) -> Tensor:
    return Tensor.from_array(name, np.zeros((4, 8), np.int8).astype(dtype))


def saved(folder: Path, *tensors: Tensor, **options: Any) -> Path:
    target = folder / "out"
    nibblecast.save(zoo.model(tensors), target, to="safetensors", layout="gptq", **options)
    return target


def test_plain_numbers_that_the_container_has_no_dtype_for(tmp_path: Path) -> None:
    assert len(nibblecast.load(saved(tmp_path, matrix("w.weight"), plain("p")))) == 2
    with pytest.raises(Unsupported, match=r"tensor 'p': is plain int4, .*not gptq: leave it out with --skip"):
        saved(tmp_path, matrix("w.weight"), plain("p", ml_dtypes.int4))


def test_a_tensor_and_a_part_of_a_weight_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"tensor 'w\.scales': would be stored twice.*--skip"):
        saved(tmp_path, matrix("w.weight"), plain("w.scales"))


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="not Unicode, which only the layout packed can hold: leave it out"):
        saved(tmp_path, matrix("w.weight"), plain("p\udcff"))


def test_a_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model([plain("a name of some length")])
    monkeypatch.setattr(file_layout, "MAX_HEADER_BYTES", 64)
    with pytest.raises(Unsupported, match=r"a header of \d+ bytes; safetensors allows 64: .*--only"):
        nibblecast.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.safetensors", "M.SAFETENSORS"])
def test_a_file_in_a_layout_that_needs_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="layout gptq needs a configuration .*name a folder"):
        nibblecast.save(zoo.model([matrix("w.weight")]), tmp_path / name, layout="gptq")


def test_a_tensor_that_two_files_describe() -> None:
    one, other = (packed_layout.description_of({name: {}}) for name in ("w", "v"))
    assert set(json.loads(packed_layout.merged([one, other]))["tensors"]) == {"w", "v"}
    with pytest.raises(CorruptFile, match="tensor 'w': is described in two files"):
        packed_layout.merged([one, other, one])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"{", "not a JSON object: "),
        (b"[" * 100_000, "not a JSON object: "),
        (b"\xff{}", "not a JSON object: "),
    ],
    ids=range(5),
)
def test_a_header_that_is_none(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptFile, match=rf"m\.safetensors: .*{message}") as caught:
        nibblecast.load(path)
    assert "\n" not in str(caught.value)
