"""GGUF to GGUF: what nobody asked to change stays, byte for byte."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.gguf.container import GGUFHeader, open_container
from tests.formats.gguf import gguf_files

FIXTURE = Path(__file__).parents[3] / "fixtures" / "gguf" / "types.gguf"


def container(path: Path) -> GGUFHeader:
    return open_container(MappedFile.open(path))


def key_values(path: Path) -> dict[str, bytes]:
    """The key-values of a file as they stand in it."""
    return {key: entry.read(0, entry.nbytes).tobytes() for key, entry in container(path).entries.items()}


def value(key: str, kind: int, stored: bytes) -> bytes:
    return gguf_files.string(key) + struct.pack("<I", kind) + stored


NESTED = struct.pack("<IQ", 9, 2) + (struct.pack("<IQ", 8, 1) + gguf_files.string("é")) * 2
ODD = [
    value("", 8, gguf_files.string("")),
    value("a\nb", 12, struct.pack("<d", 0.1)),
    value("nested", 9, NESTED),
    value("empty", 9, struct.pack("<IQ", 8, 0)),
    value("general.architecture", 4, struct.pack("<I", 7)),
    value("general.file_type", 8, gguf_files.string("no number")),
    value("general.quantized_by", 7, b"\x01"),
    value("long", 9, struct.pack("<IQ", 0, 100_000) + bytes(100_000)),
]
BLOCKS = np.random.default_rng(2).integers(0, 128, 4 * 18).astype(np.uint8).tobytes()


def make(path: Path, values: list[bytes], *, alignment: int = 32, hole: int = 0, **changed: Any) -> Path:
    """A file with a tensor of Q4_0 and one of float32."""
    offset = -(-len(BLOCKS) // alignment) * alignment + hole
    infos = [gguf_files.info("q", (2, 64), gguf_files.Q4_0, 0), gguf_files.info("f", (2, 32), gguf_files.F32, offset)]
    data = BLOCKS + bytes(offset - len(BLOCKS)) + np.arange(64, dtype=np.float32).tobytes()
    path.write_bytes(gguf_files.file(infos, data, values, alignment=alignment, **changed))
    return path


def test_every_type_is_copied(tmp_path: Path) -> None:
    target = tmp_path / "copy.gguf"
    comparison = nibblecast.convert(FIXTURE, target, verify=True, fail_on_loss=True).verified[target]
    assert comparison is not None
    assert comparison.equal
    assert target.read_bytes() == FIXTURE.read_bytes()


def test_blocks_are_copied_beside_another_format(tmp_path: Path) -> None:
    targets = [tmp_path / "copy.gguf", tmp_path / "copy.safetensors"]
    nibblecast.convert(FIXTURE, *targets, verify=True)
    assert targets[0].read_bytes() == FIXTURE.read_bytes()


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_key_values_of_all_kinds_are_kept(alignment: int, tmp_path: Path) -> None:
    values = [*ODD, gguf_files.number("general.alignment", alignment)]
    source = make(tmp_path / "source.gguf", values, alignment=alignment)
    target = tmp_path / "copy.gguf"
    nibblecast.convert(source, target, verify=True)
    assert target.read_bytes() == source.read_bytes()


def test_holes_between_tensors_are_not_kept(tmp_path: Path) -> None:
    """llama.cpp refuses them."""
    source = make(tmp_path / "source.gguf", ODD, hole=64)
    target = tmp_path / "copy.gguf"
    nibblecast.convert(source, target, verify=True)
    assert target.read_bytes() == make(tmp_path / "without.gguf", ODD).read_bytes()


def test_version_2_becomes_version_3(tmp_path: Path) -> None:
    source = make(tmp_path / "source.gguf", ODD, version=2)
    target = tmp_path / "copy.gguf"
    nibblecast.convert(source, target, verify=True)
    written, read = target.read_bytes(), source.read_bytes()
    assert written[:4] + written[8:] == read[:4] + read[8:]
    assert written[4] == 3


def test_tensors_that_change_change_the_file_type(tmp_path: Path) -> None:
    target = tmp_path / "halves.gguf"
    source = make(tmp_path / "source.gguf", ODD)
    nibblecast.convert(source, target, dequantize="float16", verify=True)
    kept, written = key_values(source), key_values(target)
    assert list(written) == list(kept)
    assert {key for key in kept if kept[key] != written[key]} == {"general.file_type"}
    assert container(target).metadata["general.file_type"].value == 1


def test_tensors_that_become_blocks_say_so(tmp_path: Path) -> None:
    target = tmp_path / "quantized.gguf"
    source = make(tmp_path / "source.gguf", [])
    nibblecast.convert(source, target, quantize="int4,block=32,scale=float16", verify=True)
    values = {key: found.value for key, found in container(target).metadata.items()}
    assert values == {"general.file_type": 2, "general.quantization_version": 2}
    assert [info.type_id for info in container(target).tensors.values()] == [2, 2]


def test_some_of_the_tensors_keep_all_key_values(tmp_path: Path) -> None:
    target = tmp_path / "one.gguf"
    source = make(tmp_path / "source.gguf", ODD)
    nibblecast.convert(source, target, skip=["f"], verify=True, fail_on_loss=True)
    assert key_values(target) == key_values(source)
    assert list(container(target).tensors) == ["q"]


def test_an_alignment_that_ggml_does_not_take_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    content = gguf_files.file([], b"", [gguf_files.number("general.alignment", 1 << 31)])
    path.write_bytes(content)
    with pytest.raises(nibblecast.Error, match=r"general\.alignment 2147483648, and ggml takes 1048576"):
        nibblecast.convert(path, tmp_path / "copy.gguf")


def test_a_source_that_has_gone_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source.gguf", ODD)
    model = nibblecast.load(source)
    source.unlink()
    with pytest.raises(nibblecast.Error, match=r"source\.gguf: does not exist"):
        nibblecast.save(model, tmp_path / "copy.gguf")


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(8, 700), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_headers_that_are_damaged_are_copied_as_they_read_or_refused(
    changes: list[tuple[int, int]], dequantizes: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "copy.gguf"
        content = bytearray(make(source, ODD[:-1]).read_bytes())
        for place, byte in changes:
            content[place % len(content)] = byte
        source.write_bytes(content)
        try:
            nibblecast.convert(source, target, dequantize="float32" if dequantizes else None)
        except nibblecast.Error as error:
            assert "\n" not in str(error)
            return
        changed = {"general.file_type"} if dequantizes else set()
        kept, written = key_values(source), key_values(target)
        assert {key for key in kept if kept[key] != written[key] and not key.startswith("split.")} <= changed
        assert list(container(source).tensors) == list(container(target).tensors)
