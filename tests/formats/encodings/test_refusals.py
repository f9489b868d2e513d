"""What the encodings refuse, each by its message: one sound weight, one part of it changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from nibblecast.formats.encodings.values import refit
from nibblecast.formats.encodings.values.offsets import offsets_as_zero_points
from nibblecast.formats.encodings.values.parameters import small_floats
from nibblecast.formats.encodings.writable import WRITABLE, writable_encoding
from tests import zoo
from tests.formats.encodings.checkpoints import write_file, write_folder
from tests.formats.encodings.checkpoints_in_memory import refused

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 64]}
NESTED = {"nested_blocksize": 4, "nested_offset": 0.5, "nested_dtype": "float32"}


def bitsandbytes(**changed: Any) -> dict[str, np.ndarray]:
    """A weight with double quantization: 8 blocks, 2 nested ones."""
    parts = {
        "fc.weight": np.zeros((256, 1), np.uint8),
        "fc.weight.absmax": np.zeros(8, np.uint8),
        "fc.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "fc.weight.nested_absmax": np.ones(2, np.float32),
        "fc.weight.nested_quant_map": np.linspace(0, 1, 256, dtype=np.float32),
        "fc.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(STATE | NESTED).encode(), np.uint8),
    }
    return parts | {f"fc.weight.{role}": array for role, array in changed.items()}


INT8 = {"fc.weight": np.zeros((4, 8), np.int8), "fc.SCB": np.ones(4, np.float32)}
GPTQ = {
    "fc.qweight": np.zeros((4, 8), np.int32),
    "fc.qzeros": np.zeros((1, 1), np.int32),
    "fc.scales": np.ones((1, 8), np.float16),
}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
#: Of 40 columns of 3 bits, which are 4 words whether codes cross words or not.
ROWS_OF_3_BITS = {
    "m.weight_packed": np.zeros((40, 4), np.int32),
    "m.weight_scale": np.ones((40, 1), np.float32),
    "m.weight_shape": np.array([40, 40], np.int64),
}


def groups(**settings: Any) -> Mapping[str, Any]:
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    return {**CT, "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, **settings}


QUANTO = {
    "fc.weight._data._data": np.zeros((1, 4), np.uint8),
    "fc.weight._scale": np.ones((1, 1), np.float32),
}

REFUSED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], str, type[Error]]] = {
    "LLM.int8() that the configuration denies": (
        INT8,
        {"quant_method": "bitsandbytes", "load_in_8bit": False},
        "load_in_8bit False",
        CorruptFile,
    ),
    "nested scales of another dtype": (
        bitsandbytes(nested_absmax=np.ones(2, np.float16)),
        {},
        "nested_absmax of float16: float32",
        CorruptFile,
    ),
    "nested scales of another number": (
        bitsandbytes(nested_absmax=np.ones(3, np.float32)),
        {},
        "3 nested scales for 8 in blocks of 4",
        CorruptFile,
    ),
    "scales that are not nested after all": (
        bitsandbytes(absmax=np.ones(8, np.float32)),
        {},
        "absmax of float32 with nested scales",
        CorruptFile,
    ),
    "codes that may cross words, of no version": (ROWS_OF_3_BITS, groups(), "has the version ''", Unsupported),
    "codes that may cross words, of a version that is none": (
        ROWS_OF_3_BITS,
        groups(version="0.x"),
        "has the version '0.x'",
        Unsupported,
    ),
    "codes of one axis": (
        {"m.weight": np.zeros(4, np.int8), "m.weight_scale": np.ones(1, np.float32)},
        {**CT, "format": "int-quantized"},
        "codes of shape (4,), where a matrix",
        CorruptFile,
    ),
    "float8 of one axis": (
        {"m.weight": np.zeros(4, FLOAT8), "m.weight_scale_inv": np.ones(1, np.float32)},
        FP8,
        "codes of shape (4,), where a matrix",
        CorruptFile,
    ),
    "blocks that are none": (
        {"m.weight": np.zeros((4, 4), FLOAT8), "m.weight_scale_inv": np.ones((2, 2), np.float32)},
        {**FP8, "weight_block_size": [2, 0]},
        "weight_block_size [2, 0]",
        CorruptFile,
    ),
    "a layout of GPTQ's name": (GPTQ, {**GPTQ_CONFIG, "checkpoint_format": "odd"}, "layout 'odd'", Unsupported),
    "codes of 3 bits": (
        {
            "fc.qweight": np.zeros((3, 32), np.int32),
            "fc.qzeros": np.zeros((1, 3), np.int32),
            "fc.scales": np.ones((1, 32), np.float16),
        },
        {**GPTQ_CONFIG, "bits": 3},
        "codes of 3 bits: 2, 4 and 8",
        Unsupported,
    ),
    "codes of other bits than are told": (GPTQ, {**GPTQ_CONFIG, "bits": 8}, "4 bits, not 8", CorruptFile),
    "codes of 2 or 4 bits": (
        {**QUANTO, "fc.weight._shift": np.ones((1, 1), np.float32)},
        {"quant_method": "quanto"},
        "codes of 2 or 4 bits: quanto_qmap.json",
        Unsupported,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_part_that_does_not_fit(what: str) -> None:
    arrays, config, message, kind = REFUSED[what]
    refused(arrays, config, message, kind=kind)


def test_each_is_read_as_it_is() -> None:
    for arrays, config in (
        (INT8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        (bitsandbytes(), {}),
        (ROWS_OF_3_BITS, groups(version="0.18.0")),
        (GPTQ, GPTQ_CONFIG),
    ):
        tensors, _ = decode_checkpoint(Checkpoint({k: Tensor.from_array(k, v) for k, v in arrays.items()}, config))
        (weight,) = tensors.values()
        assert weight.quantization is not None


def quantized(name: str = "w", **parameters: Any) -> Tensor:
    scale = Tensor.from_array("scale", np.ones((4, 2), np.float32))
    codes = np.zeros((4, 8), np.int8).view(np.int8).astype(ml_dtypes.int4)
    return Tensor.from_array(name, codes, replace(Quantization(scale, (1, 4)), **parameters))


@pytest.mark.parametrize("layout", sorted(set(WRITABLE) - {"awq", "gptq"}))
def test_a_weight_that_is_not_quantized_is_not_encoded(layout: str) -> None:
    with pytest.raises(Unsupported, match="tensor 'w': "):
        writable_encoding(layout).encode(Tensor.from_array("w", np.zeros((64, 64), np.float32)))


def test_parameters_of_other_blocks() -> None:
    with pytest.raises(Unsupported, match=r"tensor 'w': .*blocks of \(1, 4\), which are not whole blocks of \(1, 3\)"):
        refit.refined(quantized(), (1, 3))
    index = GroupIndex(1, Tensor.from_array("index", np.zeros(8, np.int32)))
    with pytest.raises(Unsupported, match="tensor 'w': has a group index"):
        refit.refined(quantized(group_index=index), (1, 2))
    with pytest.raises(Unsupported, match="tensor 'w': has no axis"):
        refit.in_row_groups(Tensor.from_array("w", np.float32(1)))
    finer = refit.refined(quantized(), (1, 2))
    assert finer.quantization is not None
    assert finer.quantization.scale.shape == (4, 4)


def test_offsets_of_a_dtype_without_a_last_place() -> None:
    offset = Tensor.from_array("offset", np.zeros((4, 2), FLOAT8))
    with pytest.raises(Unsupported, match="tensor 'w': has offsets of float8_e4m3fn"):
        offsets_as_zero_points(quantized(offset=offset))


def test_small_floats_of_no_axis() -> None:
    scalar = Tensor.from_array("w", np.zeros((), FLOAT8))
    with pytest.raises(CorruptFile, match="codes of no axis"):
        small_floats("w", FLOAT8, scalar, scalar, 32)


#: Contents of config.json, and what is said of them.
CONFIGURATIONS = [
    (b"[]", "not a JSON object"),
    (b"{", "not a JSON object: "),
    (b"[" * 100_000, "not a JSON object: "),
    (b"\xff\xfe", "not a JSON object: "),
    (b" " * ((64 << 20) + 1), "more than 67108864 bytes"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_a_configuration_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"a.weight": np.zeros((2, 2), np.float32)})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"config\.json: .*{message}") as caught:
        nibblecast.load(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_no_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"a.weight": np.zeros((2, 2), np.float32)})
    (folder / "config.json").mkdir()
    with pytest.raises(CorruptFile, match=r"config\.json: .*"):
        nibblecast.load(folder)


INDEX = "model.safetensors.index.json"
INDEXES: list[tuple[Any, str]] = [
    ({}, "weight_map"),
    ({"weight_map": []}, "weight_map"),
    ({"weight_map": {"a": 1}}, "weight_map"),
    ({"weight_map": {"a": "../m.safetensors"}}, "names the file '../m.safetensors'"),
    ({"weight_map": {"a": "sub/m.safetensors"}}, "names the file 'sub/m.safetensors'"),
    (
        {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}},
        "tensor 'b': is in the index, but not in the file",
    ),
    ({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}, "is in the index, but not in the file"),
]


@pytest.mark.parametrize(("index", "message"), INDEXES, ids=range(len(INDEXES)))
def test_an_index_that_does_not_fit(index: Any, message: str, tmp_path: Path) -> None:
    for name, key in (("one", "a"), ("two", "b")):
        model = zoo.model([Tensor.from_array(key, np.zeros(2, np.float32))])
        nibblecast.save(model, tmp_path / f"{name}.safetensors")
    good = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(good))
    assert set(nibblecast.load(tmp_path)) == {"a", "b"}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match=message):
        nibblecast.load(tmp_path)


def test_files_and_indexes_of_which_there_is_one_too_many(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_file(tmp_path / f"{name}.safetensors", {"a": np.zeros(2, np.float32)})
    with pytest.raises(CorruptFile, match=r"tensor 'a': is in two files, 'one\.safetensors' as well"):
        nibblecast.load(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(CorruptFile, match=r"2 indexes \(x\.safetensors\.index\.json, y\.safetensors\.index\.json"):
        nibblecast.load(tmp_path)
