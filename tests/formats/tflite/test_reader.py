"""The reader against LiteRT's own answers, and what it makes of damaged and of unusual files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from nibblecast import Model, Tensor
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.ir import Loss
from nibblecast.converters.storage import FileRange
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.reader import TFLiteReader
from tests.formats.tflite.models import (
    FIXTURES,
    MODELS,
    Load,
    Patch,
    affine,
    blockwise,
    constant,
    fixture,
    ints,
    model,
    operator,
    subgraph,
    table,
    tensor,
    whole,
)

WEIGHTS = "external_buffer.weights.bin"
ODD = fixture("mlp_int4_odd.tflite")
CODES = bytes(range(0x10, 0x20))  # 32 INT4 codes
SCALES = np.arange(1, 9, dtype=np.float16)

# ---- every fixture against its truth -------------------------------------------------------------


def names_by_key(path: Path, taken: Model) -> dict[str, str]:
    """The reader's name for each tensor, by its key in the .npz (fixtures/README.md): the first of a name in file order
    keeps it, the next get `:1`, `:2`."""
    content = np.fromfile(path, np.uint8)
    names: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, graph in enumerate(schema.Model.root(content).subgraphs):
        prefix = f"subgraph{number}/" if number else ""
        own = [each.name for each in graph.tensors]
        for index, name in enumerate(own):
            unique = name or f"subgraph{number}/tensor{index}"
            if unique not in taken:
                continue
            count = seen.get(unique, 0)
            seen[unique] = count + 1
            key = f"/{name}" if name and own.count(name) == 1 else f"_by_index/{index}"
            names[f"{prefix}{{}}{key}"] = f"{unique}:{count}" if count else unique
    return names


def values_of(tensor: Tensor) -> NDArray[Any]:
    """As the .npz has them: narrow floats and quantized integers in float32, everything else as it is stored."""
    narrow = tensor.dtype.kind == "V" or tensor.dtype in (np.float16, ml_dtypes.bfloat16)
    narrow |= tensor.dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    return tensor.dequantize(np.float32) if tensor.quantization is not None or narrow else tensor.codes()


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_a_fixture_has_the_codes_and_values_that_litert_reads(name: str) -> None:
    path = FIXTURES / f"{name}.tflite"
    loaded = nibblecast.load(path)
    truth = {key: value for key, value in np.load(FIXTURES / f"{name}.npz").items() if value.dtype.kind != "S"}
    keys = names_by_key(path, loaded)
    assert sorted(keys.values()) == sorted(loaded)
    assert {key.format(kind) for key in keys for kind in ("codes", "values")} >= set(truth)
    for key, unique in keys.items():
        tensor = loaded[unique]
        assert_same_bits(values_of(tensor), truth[key.format("values")])
        assert (tensor.quantization is not None) == (key.format("codes") in truth)
        if tensor.quantization is not None:
            assert_same_bits(tensor.codes(), truth[key.format("codes")])


@pytest.mark.parametrize(
    ("fixture", "tensor", "dtype", "granularity", "block_shape"),
    [
        ("cnn_int4_per_channel", "cnn_1/conv_1/convolution", ml_dtypes.int4, "per-axis 0", (1, 3, 3, 3)),
        ("cnn_int4_per_channel", "cnn_1/depthwise_1/depthwise", ml_dtypes.int4, "per-axis 3", (1, 3, 3, 1)),
        ("cnn_int8_full", "cnn_1/depthwise_1/depthwise", np.int8, "per-axis 3", (1, 3, 3, 1)),
        ("cnn_int8_full", "cnn_1/dense_1/BiasAdd", np.int32, "per-axis 0", (1,)),
        ("mlp_int4_per_tensor", "mlp_1/dense_1_1/MatMul", ml_dtypes.int4, "per-tensor", (24, 16)),
        ("mlp_int4_blockwise", "mlp_1/dense_1_1/MatMul", ml_dtypes.int4, "blockwise (1, 32)", (1, 32)),
        ("mlp_int4_blockwise", "mlp_1/dense_2_1/MatMul", ml_dtypes.int4, "per-axis 0", (1, 32)),
        ("mlp_int2_per_channel", "mlp_1/dense_1_1/MatMul", ml_dtypes.int2, "per-axis 0", (1, 16)),
        ("uint4_weights", "mlp_1/dense_1_1/MatMul", ml_dtypes.uint4, "per-tensor", (24, 16)),
        ("mlp_int16x8", "mlp_1/dense_2_1/BiasAdd", np.int64, "per-axis 0", (1,)),
        ("mlp_w4a8", "mlp_1/dense_2_1/BiasAdd", np.int32, "per-axis 0", (1,)),
    ],
)
def test_granularity(fixture: str, tensor: str, dtype: type, granularity: str, block_shape: tuple[int, ...]) -> None:
    found = nibblecast.load(FIXTURES / f"{fixture}.tflite")[tensor]
    assert found.dtype == dtype
    assert found.granularity == granularity
    assert found.quantization is not None
    assert found.quantization.block_shape == block_shape
    assert found.quantization.scale.dtype == (np.float16 if fixture == "mlp_int4_blockwise" else np.float32)


def test_a_float_model_has_no_quantization() -> None:
    assert {each.granularity for each in nibblecast.load(FIXTURES / "mlp_float32.tflite").values()} == {"none"}


def test_zero_points_are_kept_apart_for_every_channel() -> None:
    weight = nibblecast.load(FIXTURES / "mlp_int4_asymmetric.tflite")["mlp_1/dense_2_1/MatMul"]
    assert weight.quantization is not None
    assert weight.quantization.zero_point is not None
    assert weight.quantization.zero_point.codes().tolist() == [[-3], [2], [-1], [2]]
    assert weight.quantization.zero_point.dtype == np.int64


def test_rows_of_odd_length_begin_in_the_middle_of_a_byte() -> None:
    weight = nibblecast.load(FIXTURES / "mlp_int4_odd.tflite")["mlp_1/dense_1_1/MatMul"]
    assert (weight.shape, weight.nbytes) == ((7, 5), 18)
    low, high = weight.packed() & 15, weight.packed() >> 4
    nibbles = np.stack([low, high], 1).reshape(-1)[:35].reshape(7, 5).astype(np.int8)
    assert np.array_equal(weight.codes(), np.where(nibbles > 7, nibbles - 16, nibbles))


def test_metadata_tell_the_producer_the_source_the_operators_and_the_ports() -> None:
    path = FIXTURES / "cnn_int4_per_channel.tflite"
    metadata = nibblecast.load(path).metadata
    assert (metadata.format, metadata.source) == ("tflite", path)
    assert metadata.producer == schema.Model.root(np.fromfile(path, np.uint8)).description
    assert metadata.operators["DEQUANTIZE"] == 3
    assert [(port.name, port.dtype, port.shape) for port in metadata.inputs] == [
        ("serving_default_x:0", "float32", (1, 8, 8, 3))
    ]
    assert [(port.dtype, port.shape) for port in metadata.outputs] == [("float32", (1, 5))]


# ---- names ---------------------------------------------------------------------------------------


def test_the_second_tensor_of_a_name_gets_a_number_and_a_loss() -> None:
    loaded = nibblecast.load(FIXTURES / "two_signatures.tflite")
    first, second = loaded["shared/weight"], loaded["shared/weight:1"]
    assert (first.name, second.name) == ("shared/weight", "shared/weight:1")
    assert np.array_equal(first.dequantize(), second.dequantize())
    assert isinstance(first.data, FileRange)
    assert isinstance(second.data, FileRange)
    assert (first.data.offset, first.data.nbytes) == (second.data.offset, second.data.nbytes)
    assert loaded.losses == (
        Loss("shared/weight:1", "renamed", "has a number in its name, because another tensor is named 'shared/weight'"),
    )


def test_odd_names_are_kept_and_missing_ones_made() -> None:
    loaded = nibblecast.load(FIXTURES / "odd_names.tflite")
    assert set(loaded) == {
        "same",
        "same:1",
        "subgraph0/tensor7",
        "end of comment */ here",
        "ünïcode/重み_🙂",
        "subgraph0/tensor1",
        "back\\slash",
        "new\nline",
        "n" * 300,
        "white space\tand 'both' \"quotes\"",
    }
    assert all(name == each.name for name, each in loaded.items())
    assert [loss.tensor for loss in loaded.losses] == ["same:1"]


def test_numbers_for_duplicates_go_past_names_that_are_there(load: Load) -> None:
    names = ["a", "a", "a:1", "a", "a:1", "a:2", ""]
    loaded = load(model([constant(name, "INT8", (1,), bytes([i])) for i, name in enumerate(names)]))
    by_value = {each.codes().item(): name for name, each in loaded.items()}
    assert [by_value[i] for i in range(len(names))] == ["a", "a:3", "a:1", "a:4", "a:1:1", "a:2", "subgraph0/tensor6"]
    assert [loss.tensor for loss in loaded.losses] == ["a:3", "a:4", "a:1:1"]


def test_blockwise_tensors_of_the_same_names_in_two_subgraphs_keep_to_their_own(load: Load) -> None:
    """As in a language model whose `prefill` and `decode` share their weights."""
    both = []
    for number in range(2):
        own = table(schema.Tensor, buffer=np.uint32(2 * number + 1))
        weight = tensor("w", "INT4", (4, 8), quantization=blockwise(1, 4)) | own
        scales = tensor("w_scales", "FLOAT16", (4, 2)) | table(schema.Tensor, buffer=np.uint32(2 * number + 2))
        both.append(subgraph([weight, scales]))
    loaded = load(whole(both, [b"", CODES, SCALES.tobytes(), CODES, (SCALES * 2).tobytes()]))
    assert list(loaded) == ["w", "w_scales", "w:1", "w_scales:1"]
    for suffix in ("", ":1"):
        quantization = loaded[f"w{suffix}"].quantization
        assert quantization is not None
        assert quantization.scale is loaded[f"w_scales{suffix}"]
        assert loaded[f"w_scales{suffix}"].parameter_of == f"w{suffix}"
    assert np.array_equal(loaded["w:1"].dequantize(), loaded["w"].dequantize() * 2)


# ---- types and sizes -----------------------------------------------------------------------------


def test_every_type_of_numbers_is_read_and_strings_are_reported() -> None:
    loaded = nibblecast.load(FIXTURES / "types_zoo.tflite")
    zoo = {name.removeprefix("zoo/"): each.dtype.name for name, each in loaded.items() if name.startswith("zoo/")}
    assert zoo.pop("zero_size") == zoo.pop("scalar") == "float32"
    assert zoo == {name: name for name in zoo}
    assert len(zoo) == 16
    assert loaded.losses == (Loss("zoo/string", "dropped", "its STRING elements, which are not numbers"),)
    assert "zoo/string" not in loaded


def test_a_constant_without_elements_is_there() -> None:
    empty = nibblecast.load(FIXTURES / "types_zoo.tflite")["zoo/zero_size"]
    assert (empty.shape, empty.nbytes, empty.dequantize().shape) == ((0, 3), 0, (0, 3))


@pytest.mark.parametrize("role", ["input", "output"])
def test_an_activation_without_elements_is_no_constant(load: Load, role: str) -> None:
    graph = subgraph(
        [tensor("x", "FLOAT32", (0, 3)), tensor("y", "FLOAT32", (2,))],
        [operator(0, [1], [0])] if role == "output" else [],
        [0] if role == "input" else [],
    )
    assert list(load(whole([graph], [b""], ["ABS"]))) == []


def test_complex128_is_read(load: Load) -> None:
    values = np.array([1 + 2j, -3j], np.complex128)
    assert np.array_equal(load(model([constant("c", "COMPLEX128", (2,), values.tobytes())]))["c"].codes(), values)


@pytest.mark.parametrize("kind", [23, 99, -1, -128])
def test_an_unknown_type_is_refused(tmp_path: Path, kind: int) -> None:
    patch = Patch("mlp_int4_odd.tflite")
    patch.put("b", patch.need(patch.tensor("dense_1_1/MatMul"), schema.Tensor.type.slot), kind)
    with pytest.raises(Unsupported, match=f"dense_1_1/MatMul': has tensor type {kind}"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_buffer_a_byte_too_short_or_too_long_is_refused(tmp_path: Path, change: int) -> None:
    patch = Patch("mlp_int4_odd.tflite")
    tensor = patch.tensor("dense_1_1/MatMul")
    buffer = patch.buffers()[patch.get("I", patch.need(tensor, schema.Tensor.buffer.slot))]
    place = patch.child(buffer, schema.Buffer.data.slot)
    assert patch.get("I", place) == 18
    patch.put("I", place, 18 + change)
    expected = rf"dense_1_1/MatMul': holds {18 + change} bytes, but shape \(7, 5\) of int4 takes 18"
    with pytest.raises(CorruptFile, match=expected):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


def test_codes_stored_one_to_a_byte_are_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match=r"tensor 'w': holds 32 bytes, but shape \(4, 8\) of int4 takes 16"):
        load(model([constant("w", "INT4", (4, 8), bytes(32), quantization=affine([1]))]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1, 4), "has a negative size"),
        ((2**31 - 1,) * 32, "is larger than any memory"),
        ((2**29, 2**29), "holds 4 bytes, but shape"),
        ((1,) * 33, "has 33 dimensions; 32 are the most"),
        ((2,) * 5000, "has 5000 dimensions"),
    ],
)
def test_impossible_shapes_are_refused(load: Load, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(Error, match=f"tensor 'w': .*{message}"):
        load(model([constant("w", "INT8", shape, bytes(4), quantization=affine([1]))]))


def test_a_shape_too_large_for_any_array_is_refused_though_it_is_empty(load: Load) -> None:
    with pytest.raises(CorruptFile, match="is larger than any memory"):
        load(model([tensor("w", "INT8", (0, 2**31 - 1, 2**31 - 1, 2**31 - 1))]))


def test_as_many_dimensions_as_every_numpy_holds_are_read(load: Load) -> None:
    weight = load(model([constant("w", "INT4", (1,) * 31 + (3,), b"\x21\x03", quantization=affine([2]))]))["w"]
    assert weight.dequantize().reshape(-1).tolist() == [2, 4, 6]


# ---- the file as a whole -------------------------------------------------------------------------


def test_bytes_behind_the_flatbuffer_are_no_fault(load: Load) -> None:
    name = "mlp_int4_blockwise"
    loaded = load(fixture(f"{name}.tflite") + b"metadata, or anything" * 1000)
    for key, each in nibblecast.load(FIXTURES / f"{name}.tflite").items():
        assert np.array_equal(loaded[key].dequantize(), each.dequantize())


def test_reading_a_model_touches_no_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every byte of every buffer changed, all that reading gives is the same; and nothing is asked for."""
    reads: list[tuple[int, int]] = []
    original = FileRange.read

    def read(self: FileRange, start: int, stop: int) -> NDArray[np.uint8]:
        reads.append((start, stop))
        return original(self, start, stop)

    monkeypatch.setattr(FileRange, "read", read)
    for name in MODELS:
        patch = Patch(f"{name}.tflite")
        for begin, end in patch.buffer_spans():
            patch.data[begin:end] = bytes(byte ^ 0xFF for byte in patch.data[begin:end])
        shutil.copy(FIXTURES / WEIGHTS, tmp_path)
        changed, good = (
            TFLiteReader().read(path)
            for path in (patch.write(tmp_path / f"{name}.tflite"), FIXTURES / f"{name}.tflite")
        )
        assert [(each.name, each.shape, each.granularity) for each in changed.values()] == [
            (each.name, each.shape, each.granularity) for each in good.values()
        ]
    assert len(reads) == 2 * len(MODELS)  # each file's headers, as one view
    nibblecast.load(FIXTURES / "mlp_int4_odd.tflite")["mlp_1/dense_1_1/MatMul"].codes()
    assert reads[-1] == (0, 18)


@pytest.mark.parametrize("identifier", [b"TFL2", b"TFL4", b"\0\0\0\0", b"tfl3"])
def test_a_wrong_identifier_is_refused(load: Load, identifier: bytes) -> None:
    content = ODD[:4] + identifier + ODD[8:]
    with pytest.raises(CorruptFile, match=r"has identifier b'.*' at byte 4; a TFLite model has b'TFL3'"):
        load(content)


@pytest.mark.parametrize("version", [0, 1, 2, 4, 2**32 - 1])
def test_another_schema_version_is_refused(tmp_path: Path, version: int) -> None:
    patch = Patch("mlp_int4_odd.tflite")
    patch.put("I", patch.need(patch.root(), schema.Model.version.slot), version)
    with pytest.raises(Unsupported, match=f"has schema version {version}; 3 is the one"):
        nibblecast.load(patch.write(tmp_path / "m.tflite"))


def test_an_empty_file_is_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match=r"model\.tflite: .*(empty|identifier b'')"):
        load(b"")


def test_an_operator_without_a_code_is_refused(load: Load) -> None:
    content = model([tensor("a", "INT8", (1,))], [operator(1, [0], [0])], ["ABS"])
    with pytest.raises(CorruptFile, match="operator 0 of subgraph 0 has code 1 of 1"):
        load(content)


@pytest.mark.parametrize("index", [1, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_an_operator_of_a_tensor_that_is_not_there_is_refused(load: Load, index: int, role: str) -> None:
    inputs, outputs = ([index], [0]) if role == "inputs" else ([0], [index])
    content = model([tensor("a", "INT8", (1,))], [operator(0, inputs, outputs)], ["ABS"])
    with pytest.raises(CorruptFile, match=rf"operator 0 \(ABS\) of subgraph 0 refers to tensor {index} of 1"):
        load(content)


@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_a_graphs_input_that_is_not_there_is_refused(load: Load, role: str) -> None:
    graph = subgraph([tensor("a", "INT8", (1,))]) | table(schema.SubGraph, **{role: ints(3)})
    with pytest.raises(CorruptFile, match="subgraph 0 refers to tensor 3 of 1"):
        load(whole([graph], [b""]))


@pytest.mark.parametrize("buffer", [1, 2**32 - 1])
def test_a_buffer_that_is_not_there_is_refused(load: Load, buffer: int) -> None:
    with pytest.raises(CorruptFile, match=f"tensor 'a': has buffer {buffer} of 1"):
        load(model([tensor("a", "INT8", (1,), buffer=np.uint32(buffer))]))


def test_a_model_of_nothing_has_no_tensors(load: Load) -> None:
    assert dict(load(whole([], [])).tensors) == {}
