"""Tensors of types that are not decoded: known by name, copied whole, in the way of nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nibblecast
from tests.formats.gguf import gguf_files

IQ2_XXS = 16
BLOCKS = np.random.default_rng(5).integers(0, 256, (3, 2, 66)).astype(np.uint8).tobytes()
INFOS = [
    gguf_files.info("blk.0.lattice", (3, 512), IQ2_XXS, 0),
    gguf_files.info("norm", (8,), gguf_files.F32, 416),
]
VALUES = np.arange(8, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.file(INFOS, BLOCKS + bytes(416 - len(BLOCKS)) + VALUES.tobytes()))
    return path


def test_the_other_tensors_are_read(path: Path) -> None:
    np.testing.assert_array_equal(nibblecast.load(path)["norm"].numpy(), VALUES)


def test_its_elements_are_blocks_of_a_dtype_called_as_the_type(path: Path) -> None:
    tensor = nibblecast.load(path)["blk.0.lattice"]
    assert tensor.shape == (3, 2)
    assert tensor.dtype.names == ("IQ2_XXS",)
    assert tensor.numpy().tobytes() == BLOCKS


def test_its_values_are_refused(path: Path) -> None:
    with pytest.raises(nibblecast.Error, match="'blk.0.lattice': IQ2_XXS values have no float form: .*--skip"):
        nibblecast.load(path)["blk.0.lattice"].dequantize(np.float32)


@pytest.mark.parametrize("dequantize", [None, "float32"])
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".h"])
def test_other_formats_refuse_it_and_take_the_rest(
    suffix: str, dequantize: str | None, path: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"weights{suffix}"
    with pytest.raises(nibblecast.Error, match="'blk.0.lattice': .*cannot hold IQ2_XXS values: .*--skip"):
        nibblecast.convert(path, target, dequantize=dequantize)
    assert not target.exists()
    comparison = nibblecast.convert(path, target, dequantize=dequantize, skip=["blk.*"], verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal


def test_gguf_takes_its_blocks_as_they_are(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.gguf"
    comparison = nibblecast.convert(path, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal
    assert target.read_bytes() == path.read_bytes()


def test_inspect_shows_the_name_of_its_type(path: Path) -> None:
    from typer.testing import CliRunner

    from nibblecast.converters.cli import app

    shown = CliRunner().invoke(app, ["inspect", "--json", str(path)])
    assert '"dtype": "IQ2_XXS"' in shown.stdout


def test_blocks_that_differ_are_found(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = bytearray(path.read_bytes())
    content[content.index(BLOCKS) + 70] ^= 1
    other.write_bytes(content)
    (difference,) = nibblecast.verify(path, other).differences
    assert (difference.tensor, difference.count) == ("blk.0.lattice", 1)
    assert difference.detail.startswith("(0, 1) ")


@pytest.mark.peers
def test_the_tables_of_types_are_those_of_gguf() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    from nibblecast.formats.gguf.blocks import BLOCK_TYPES, OPAQUE_TYPES, OTHER_TYPES, PLAIN_TYPES
    from nibblecast.formats.gguf.key_values import _FILE_TYPES

    sizes = {i: (kind.name, kind.elements, kind.nbytes) for i, kind in BLOCK_TYPES.items()} | dict(OPAQUE_TYPES)
    for type_id, (name, *size) in sizes.items():
        assert GGMLQuantizationType[name] == type_id
        assert GGML_QUANT_SIZES[GGMLQuantizationType(type_id)] == tuple(size)
    assert {int(kind) for kind in GGMLQuantizationType} <= {*sizes, *OTHER_TYPES, *PLAIN_TYPES}
    for type_id, file_type in _FILE_TYPES.items():
        assert GGMLQuantizationType(type_id).name in LlamaFileType(file_type).name
