"""The layout `packed`: lossless for all that the IR holds, and readable without us."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.input.allowance import VARIABLE
from nibblecast.converters.ir import Model, Quantization, Tensor
from nibblecast.formats.safetensors.container import METADATA_KEY
from nibblecast.formats.safetensors.packed_layout import METADATA_NAME
from nibblecast.formats.safetensors.reader import SafetensorsReader
from nibblecast.formats.safetensors.writer import SafetensorsOptions, SafetensorsWriter
from tests import zoo

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "fixtures" / "tflite"


def round_trip(model: Model, path: Path) -> Model:
    zoo.write(SafetensorsWriter(), model, path, SafetensorsOptions())
    return SafetensorsReader().read(path)


def test_everything_comes_back_identical(tmp_path: Path) -> None:
    model = zoo.zoo()
    zoo.assert_identical(round_trip(model, tmp_path / "zoo.safetensors"), model)


def test_complex_values_come_back_identical(tmp_path: Path) -> None:
    model = Model({name: t for name, t in zoo.plain().items() if t.dtype.kind == "c"})
    assert len(model) == 2
    zoo.assert_identical(round_trip(model, tmp_path / "complex.safetensors"), model)


def test_second_level_scales_come_back_identical(tmp_path: Path) -> None:
    outer = Quantization(
        Tensor.from_array("s2", np.array([0.5, 2.0], np.float32)),
        (4,),
        offset=Tensor.from_array("o", np.array([1.0, -1.0], np.float32)),
        codebook=Tensor.from_array("c", np.linspace(-1, 1, 256).astype(np.float32)),
    )
    inner = Tensor.from_array("s1", np.arange(8, dtype=np.uint8), outer)
    codes = Tensor.from_array("w", np.arange(64).reshape(8, 8).astype(np.uint8) % 16)
    codes = Tensor.from_array("w", codes.codes().astype(ml_dtypes.uint4))
    grid = replace(inner, shape=(8, 1), quantization=replace(outer, block_shape=(4, 1), **_in_2d(outer)))
    model = Model({"w": replace(codes, quantization=Quantization(grid, (1, 8)))})
    zoo.assert_identical(round_trip(model, tmp_path / "nested.safetensors"), model)


def _in_2d(quantization: Quantization) -> dict[str, Tensor]:
    assert quantization.offset is not None
    return {"scale": replace(quantization.scale, shape=(2, 1)), "offset": replace(quantization.offset, shape=(2, 1))}


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.tflite")), ids=lambda path: path.stem)
def test_tflite_models_survive(path: Path, tmp_path: Path) -> None:
    model = nibblecast.load(path)
    read = round_trip(model, tmp_path / "m.safetensors")
    zoo.assert_identical(read, model)
    assert [t.uses for t in read.values()] == [t.uses for t in model.values()]
    for tensor in read.values():  # a parameter that is a tensor of the model is that tensor, not a copy
        if tensor.parameter_of is not None:
            owner = read[tensor.parameter_of].quantization
            assert owner is not None
            assert any(parameter is tensor for _, parameter in owner.parameters())


@settings(max_examples=60)
@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True),
    dtype=st.sampled_from(zoo.PLAIN),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
)
def test_any_name_dtype_and_shape_survives(
    tmp_path: Path, names: list[str], dtype: Any, shape: tuple[int, ...]
) -> None:
    model = zoo.model(zoo.codes(name, shape, dtype) for name in names)
    path = tmp_path / "any.safetensors"
    zoo.assert_identical(round_trip(model, path), model)


def test_the_bytes_of_a_tiny_file_are_these(tmp_path: Path) -> None:
    scale = Tensor.from_array("s", np.array([[0.5]], np.float32))
    tensor = Tensor.from_array("w", np.array([[1, -2, 3]], ml_dtypes.int4), Quantization(scale, (1, 3)))
    round_trip(Model({"w": tensor}), tmp_path / "tiny.safetensors")
    content = (tmp_path / "tiny.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    assert content[8 + length :] == b"\x00\x00\x00\x3f" + b"\xe1\x03"  # the scale first: it is the widest
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header.pop(METADATA_KEY)[METADATA_NAME])
    assert header == {
        "w.scale": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "w": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
    }
    assert description == {
        "version": 1,
        "tensors": {
            "w": {
                "data": "w",
                "dtype": "int4",
                "shape": [1, 3],
                "quantization": {
                    "block_shape": [1, 3],
                    "scale": {"data": "w.scale", "dtype": "float32", "shape": [1, 1]},
                },
            }
        },
    }


def test_the_documented_ten_lines_of_numpy_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs/safetensors.md").read_text(), re.DOTALL)
    assert program is not None
    for fixture, name in (
        ("cnn_int4_per_channel", "cnn_1/dense_1/MatMul"),
        ("cnn_int4_per_channel", "cnn_1/depthwise_1/depthwise"),
        ("mlp_int4_odd", None),
        ("mlp_int4_blockwise", None),
    ):
        model = nibblecast.load(FIXTURES / f"{fixture}.tflite")
        name = name or next(n for n, t in model.items() if t.dtype == ml_dtypes.int4)
        nibblecast.convert(FIXTURES / f"{fixture}.tflite", tmp_path / "weights.safetensors")
        monkeypatch.chdir(tmp_path)
        variables: dict[str, Any] = {}
        exec(program[1].replace("dense/kernel", name), variables)
        np.testing.assert_array_equal(variables["values"].astype(np.float32), model[name].dequantize(np.float32))


def test_the_official_library_opens_it(tmp_path: Path) -> None:
    model = Model({n: t for n, t in zoo.zoo().items() if t.dtype.itemsize > 1 and n.isprintable()})
    round_trip(model, tmp_path / "zoo.safetensors")
    with safetensors.safe_open(tmp_path / "zoo.safetensors", "np") as file:
        assert set(model) <= set(file.keys())
        assert file.metadata()["format"] == "pt"
        np.testing.assert_array_equal(file.get_tensor("plain int32"), model["plain int32"].numpy())


def test_a_tensor_named_as_the_metadata_is_stored_under_another_key(tmp_path: Path) -> None:
    model = zoo.model([zoo.codes(METADATA_KEY, (3,), np.float32), zoo.codes(f"{METADATA_KEY}:1", (2,), np.float32)])
    zoo.assert_identical(round_trip(model, tmp_path / "odd.safetensors"), model)


def test_parameters_do_not_collide_with_tensors(tmp_path: Path) -> None:
    weight = zoo.quantized("w", (2, 4), (1, 4))
    model = zoo.model([zoo.codes("w.scale", (3,), np.float16), weight, zoo.codes("w.scale:1", (3,), np.float16)])
    zoo.assert_identical(round_trip(model, tmp_path / "odd.safetensors"), model)


def _with_description(path: Path, change: Any) -> Path:
    """The file with its description changed."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header[METADATA_KEY][METADATA_NAME])
    header[METADATA_KEY][METADATA_NAME] = change(description)
    text = json.dumps(header).encode()
    changed = path.with_name("changed.safetensors")
    changed.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return changed


def _set(*path: Any, value: Any) -> Any:
    def change(description: Any) -> str:
        at = description
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return json.dumps(description)

    return change


def _activation(shape: list[int], zero_point: int) -> Any:
    use = ["ADD", 1, 0, ["int8", shape, 1.0, zero_point], None]
    return _set("tensors", "w", "uses", value=[use])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: "{", CorruptFile, "metadata is damaged"),
        (lambda d: "[" * 100_000, CorruptFile, "metadata is damaged"),
        (lambda d: "[]", CorruptFile, "metadata is damaged"),
        (_set("version", value=2), Unsupported, "of version 2; this one reads 1"),
        (_set("tensors", value=3), CorruptFile, "damaged"),
        (_set("tensors", "w", "data", value="gone"), CorruptFile, "'gone', which is not stored"),
        (_set("tensors", "w", "data", value=["w"]), CorruptFile, "damaged"),
        (_set("tensors", "w", "dtype", value="int3"), CorruptFile, "damaged"),
        (_set("tensors", "w", "shape", value=[2, -4]), CorruptFile, "damaged"),
        (_set("tensors", "w", "shape", value=[2, 1 << 40]), CorruptFile, "tensor 'w': holds 4 bytes"),
        (_set("tensors", "w", "shape", value=[2, 1 << 70]), CorruptFile, "larger than any memory"),
        (_set("tensors", "w", "shape", value=[2, True]), CorruptFile, "damaged"),
        (_set("tensors", "w", "quantization", "block_shape", value=[1]), CorruptFile, "tensor 'w': block shape"),
        (_set("tensors", "w", "quantization", "block_shape", value=[0, 4]), CorruptFile, "at least one element"),
        (_set("tensors", "w", "quantization", "scale", value=None), CorruptFile, "damaged"),
        (_set("tensors", "w", "uses", value=[[1]]), CorruptFile, "damaged"),
        (_set("tensors", "w", "uses", value=[[["ADD"], 1, 0]]), CorruptFile, "not a use of a tensor"),
        (_set("tensors", "w", "uses", value=[["ADD", 1, "0"]]), CorruptFile, "not a use of a tensor"),
        (_set("tensors", "w", "uses", value=[["ADD", 1 << 40, 0]]), CorruptFile, "not a use of a tensor"),
        (_activation([1], 200), CorruptFile, "200 is not a zero point of int8"),
        (_activation([10**400], 0), CorruptFile, "larger than any memory"),
        (_set("tensors", "w", "parameter_of", value=["w"]), CorruptFile, "\\['w'\\] is not a name"),
        (_set("tensors", "w", "quantization", "block_shape", value=[1, 10**400]), CorruptFile, "less than 2"),
        (_set("tensors", "w", "quantization", "factor", value=10**400), CorruptFile, "damaged"),
        (_set("version", value=10**4000), Unsupported, "of version an integer of"),
        (_set("tensors", "w", "dtype", value="x" * 10**6), CorruptFile, "damaged"),
    ],
)
def test_a_damaged_description_is_one_line(change: Any, error: type, message: str, tmp_path: Path) -> None:
    round_trip(zoo.model([zoo.quantized("w", (2, 4), (1, 4))]), tmp_path / "w.safetensors")
    changed = _with_description(tmp_path / "w.safetensors", change)
    with pytest.raises(error, match=message) as raised:
        nibblecast.load(changed)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(changed))


def test_scales_of_scales_without_end_are_refused(tmp_path: Path) -> None:
    round_trip(zoo.model([zoo.quantized("w", (2, 4), (1, 4))]), tmp_path / "w.safetensors")

    def nest(description: Any) -> str:
        scale = description["tensors"]["w"]["quantization"]["scale"]
        for _ in range(200):
            scale = {**scale, "quantization": {"block_shape": [2, 1], "scale": scale}}
        description["tensors"]["w"]["quantization"]["scale"] = scale
        return json.dumps(description)

    with pytest.raises(CorruptFile, match="nested more than 8 deep"):
        nibblecast.load(_with_description(tmp_path / "w.safetensors", nest))


def test_bytes_of_many_names_count_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1M")
    round_trip(zoo.model([Tensor.from_array("w", np.zeros(1 << 18, np.int8))]), tmp_path / "w.safetensors")
    again = {"data": "w", "dtype": "int8", "shape": [1 << 18]}
    names = {"version": 1, "tensors": {f"w{i}": again for i in range(8)}}
    content = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": {"nibblecast": json.dumps(names)}}
    text = json.dumps(header).encode()
    (tmp_path / "n.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(Unsupported, match="tensor 'w5': repeats or expands what the file holds"):
        nibblecast.load(tmp_path / "n.safetensors")


@pytest.mark.peers
def test_torch_opens_floats_and_codes(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    source = FIXTURES / "cnn_int4_per_channel.tflite"
    model = nibblecast.load(source)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        nibblecast.convert(source, tmp_path / "plain.safetensors", dequantize=_numpy(name))
        loaded = safetensors.torch.load_file(tmp_path / "plain.safetensors")
        assert sorted(loaded) == sorted(model)
        weight = loaded["cnn_1/dense_1/MatMul"]
        assert weight.dtype == dtype
        expected = model["cnn_1/dense_1/MatMul"].dequantize(_numpy(name)).astype(np.float32)
        np.testing.assert_array_equal(weight.float().numpy(), expected)
    nibblecast.convert(source, tmp_path / "packed.safetensors")
    packed = safetensors.torch.load_file(tmp_path / "packed.safetensors")["cnn_1/dense_1/MatMul"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten().to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    np.testing.assert_array_equal(codes.reshape(5, 32).numpy(), model["cnn_1/dense_1/MatMul"].codes())


def _numpy(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
