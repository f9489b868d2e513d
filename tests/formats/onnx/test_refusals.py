"""What of an ONNX model is refused, each by its message."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported, UsageError, VerificationFailed
from nibblecast.formats.onnx.file.validation import validate
from nibblecast.formats.onnx.file.wire import Range, unpack_varints, varint
from nibblecast.formats.onnx.runner import OnnxRuntimeRunner
from tests.formats.onnx.onnx_models import linear, raw, save
from tests.formats.onnx.writing import onnx_graphs
from tests.growth import ends

node = helper.make_node


def external(tensor: TensorProto, location: str, nbytes: int) -> TensorProto:
    """The tensor with its data in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def test_a_sparse_initializer_elsewhere(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", [node("Identity", ["x"], ["y"])], inputs=["x"])
    model = onnx.load(source)
    for role in ("values", "indices"):
        sparse = model.graph.sparse_initializer.add()
        sparse.dims.append(5)
        sparse.values.CopyFrom(raw("thin", np.float32([1])))
        sparse.indices.CopyFrom(raw("places", np.int64([2])))
        external(getattr(sparse, role), "thin.bin", 8)
        source.write_bytes(model.SerializeToString())
        (tmp_path / "thin.bin").write_bytes(bytes(8))
        with pytest.raises(Unsupported, match="a sparse initializer with external data, which cannot be written"):
            nibblecast.convert(source, tmp_path / "out.onnx")
        del model.graph.sparse_initializer[:]


def test_a_model_that_onnx_refuses(tmp_path: Path) -> None:
    """Unless the source was refused likewise."""
    ports = [onnx_graphs.info("x", 2)], [onnx_graphs.info("y", 2)]
    good = onnx_graphs.save(tmp_path / "good.onnx", [node("Identity", ["x"], ["y"])], [], *ports)
    bad = onnx_graphs.save(tmp_path / "bad.onnx", [node("Identity", ["nothing"], ["y"])], [], *ports)
    assert validate(good) == ()
    for source in (None, good):
        with pytest.raises(VerificationFailed, match=r"bad\.onnx: onnx\.checker refuses it: .*nothing"):
            validate(bad, source)
    (note,) = validate(bad, bad)
    assert note.startswith("onnx.checker refuses bad.onnx, and bad.onnx likewise: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01\x80", "byte 2: the last integer of an array does not end"),
        (b"\x80" * 3, "byte 3: the last integer of an array does not end"),
        (b"\x01" + b"\x80" * 10 + b"\x01", "byte 0: an integer of an array is longer than ten bytes"),
    ],
)
def test_packed_integers(content: bytes, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        unpack_varints(memoryview(content), Range(0, len(content)))


def test_packed_integers_of_every_length() -> None:
    values = [0, 1, 127, 128, 1 << 35, -1, (1 << 63) - 1]
    content = b"".join(map(varint, values))
    found = unpack_varints(memoryview(content), Range(0, len(content)))
    assert found.view(np.int64).tolist() == values


def test_the_runner(tmp_path: Path) -> None:
    unknown = save(tmp_path / "unknown.onnx", [node("Odd", ["x"], ["y"], domain="com.microsoft")], inputs=["x"])
    with pytest.raises(Unsupported, match=r"unknown\.onnx: onnxruntime does not load it: ") as caught:
        OnnxRuntimeRunner(unknown)
    assert "\n" not in str(caught.value)
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    runner = OnnxRuntimeRunner(save(tmp_path / "m.onnx", nodes, [raw("w", np.ones((3, 2), np.float32))], inputs=["x"]))
    assert runner.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[3, 3]]
    with pytest.raises(Unsupported, match=r"m\.onnx: onnxruntime does not run it: ") as caught:
        runner.run({"x": np.ones((1, 4), np.float32)})
    assert "\n" not in str(caught.value)


def microsoft(operator: str, inputs: list[str], **attributes: object) -> onnx.NodeProto:
    return node(operator, inputs, ["y"], domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("taker", "arrays", "message"),
    [
        (
            microsoft("QMoE", ["x", "x", "w", "s"]),
            {"w": np.zeros((8, 8), np.uint8), "s": np.ones((2, 8), np.float32)},
            r"has dims \(8, 8\): \(experts, N, K\) are needed",
        ),
        (
            microsoft("MatMulBlockQuantizedFp4Weight", ["x", "w", "s", "t"]),
            {"w": np.zeros((2, 8), np.uint8), "s": np.ones((2, 1), np.float32), "t": np.ones((1, 1), np.float32)},
            "has scales of float32: the bytes of float8",
        ),
        (
            microsoft("MatMulNBits", ["x", "w", "s"], K=32, N=2, bits=4, block_size=16),
            {"w": np.zeros((2, 2, 7), np.uint8), "s": np.ones(4, np.float32)},
            r"has dims \(2, 2, 7\) of uint8: 2 rows of 16 bytes",
        ),
        (
            microsoft("GatherBlockQuantized", ["w", "x", "s"], quantize_axis=2),
            {"w": np.zeros((4, 128), ml_dtypes.int4), "s": np.ones((4, 1), np.float32)},
            "has quantize_axis 2, and 2 axes",
        ),
    ],
    ids=["experts", "float4", "blobs", "table"],
)
def test_weights_of_operators(
    taker: onnx.NodeProto, arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "m.onnx", [taker], [raw(name, array) for name, array in arrays.items()], inputs=["x"])
    with pytest.raises(CorruptFile, match=rf"m\.onnx: tensor 'w': {message}"):
        nibblecast.load(source)


@pytest.mark.parametrize("index", [np.int64([0, 0, 5, 1]), np.int64([0, 0, -1, 1])])
def test_an_index_of_groups_that_there_are_not(index: np.ndarray, tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        node("Gather", ["s", "i"], ["t"], axis=0),
        node("Mul", ["f", "t"], ["v"]),
        node("MatMul", ["x", "v"], ["y"]),
    ]
    arrays = {"w": np.zeros((4, 8), np.int8), "s": np.ones((2, 8), np.float32)}
    tensors = [raw(name, array) for name, array in arrays.items()]
    good = save(tmp_path / "good.onnx", nodes, [*tensors, raw("i", np.int64([0, 1, 1, 0]))], inputs=["x"])
    assert nibblecast.load(good)["w"].quantization is not None
    source = save(tmp_path / "m.onnx", nodes, [*tensors, raw("i", index)], inputs=["x"])
    with pytest.raises(CorruptFile, match=f"tensor 'w': .*groups {index.min()} to {index.max()}: there are 2"):
        nibblecast.load(source)


def float_model(path: Path) -> Path:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    return save(path, nodes, [raw("w", np.random.default_rng(1).random((64, 4), np.float32))], inputs=["x"])


def test_an_ir_version_without_the_types(tmp_path: Path) -> None:
    source = float_model(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"ir-version 8 .*10 or higher is needed"):
        nibblecast.convert(source, tmp_path / "out.onnx", quantize="int4,block=32", ir_version=8)
    assert nibblecast.convert(source, tmp_path / "out.onnx", quantize="int4,block=32", ir_version=10)


def test_a_file_that_is_too_large_for_protobuf(tmp_path: Path) -> None:
    """Known before anything is read, or written."""
    nbytes = (2 << 30) + (1 << 20)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(nbytes)  # a hole: no disk holds it
    tensor = external(TensorProto(name="w", data_type=1, dims=[nbytes // 4]), "w.bin", nbytes)
    source = save(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], [tensor], inputs=["x"])
    with ends(), pytest.raises(Unsupported, match=r"an ONNX file of \d+ bytes is more .*--opt external_data=1M"):
        nibblecast.convert(source, tmp_path / "out.onnx", external_data="10G", dry_run=True)
    assert nibblecast.convert(source, tmp_path / "out.onnx", dry_run=True)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_that_is_cut_is_refused_or_is_a_part_of_the_whole(cut: int, tmp_path: Path) -> None:
    """What is read of it is what the whole file has."""
    nodes = [linear("w", "s", output="v", axis=1), node("MatMul", ["x", "v"], ["y"])]
    tensors = [raw("w", np.arange(32, dtype=np.int8).reshape(4, 8)), raw("s", np.arange(8, dtype=np.float32))]
    whole = save(tmp_path / "m.onnx", nodes, tensors, inputs=["x"])
    before = nibblecast.load(whole)
    part = tmp_path / "part.onnx"
    part.write_bytes(whole.read_bytes()[:-cut])
    with ends():
        try:
            after = nibblecast.load(part)
        except Error as error:
            assert str(error).startswith(f"{part}: ")
            assert "\n" not in str(error)
            return
    for name, tensor in after.items():
        assert tensor.dequantize(np.float32).tobytes() == before[name].dequantize(np.float32).tobytes()


@pytest.mark.parametrize("change", [-1, 1, 4])
def test_raw_data_of_another_size(change: int, tmp_path: Path) -> None:
    tensor = raw("w", np.ones((2, 3), np.float32))
    tensor.raw_data = bytes(24 + change)
    source = save(tmp_path / "m.onnx", [node("Add", ["x", "w"], ["y"])], [tensor], inputs=["x"])
    with pytest.raises(CorruptFile, match=rf"tensor 'w': has {24 + change} bytes of raw_data, .* take 24"):
        nibblecast.load(source)["w"].numpy()


def test_a_node_without_an_operator(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", [node("", ["x"], ["y"])], inputs=["x"])
    with pytest.raises(CorruptFile, match=r"byte \d+: a node names no operator"):
        nibblecast.load(source)
