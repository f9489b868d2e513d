"""What is damaged or hostile is refused in one line, wherever its payloads lie."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.interfaces import Size
from nibblecast.converters.storage import FileRange
from nibblecast.formats.onnx.file.schema import TENSOR
from nibblecast.formats.onnx.file.wire import Range, decode, encode, read_varint, signed, varint
from nibblecast.formats.onnx.options import OnnxOptions
from tests import zoo
from tests.formats.onnx.onnx_models import INT4_CODES, linear, raw, read, save, write

pytestmark = pytest.mark.slow

# External data


def external(path: Path, **entries: str) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return save(path, initializers=[tensor], outputs=["w"])


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "d.bin"}, b"0123"),
        ({"location": "d.bin", "offset": "3"}, b"3456"),
        ({"location": "./d.bin", "offset": "6", "length": "4"}, b"6789"),
        ({"location": "sub/e.bin", "checksum": "x"}, b"abcd"),
    ],
)
def test_external_data(entries, expected, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "d.bin").write_bytes(b"0123456789")
    (tmp_path / "sub" / "e.bin").write_bytes(b"abcdef")
    assert read(external(tmp_path / "m.onnx", **entries))["w"].packed().tobytes() == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "the path of a file inside its folder"),
        ({"location": ""}, "the path of a file inside its folder"),
        ({"location": "../d.bin"}, "the path of a file inside its folder"),
        ({"location": "sub/../../d.bin"}, "the path of a file inside its folder"),
        ({"location": "/etc/passwd"}, "the path of a file inside its folder"),
        ({"location": "C:\\d.bin"}, "the path of a file inside its folder"),
        ({"location": "a\0b"}, "the path of a file inside its folder"),
        ({"location": "out.bin"}, "is a link out of the folder"),
        ({"location": "linked/d.bin"}, "is a link out of the folder"),
        ({"location": "loop.bin"}, ""),
        ({"location": "folder"}, "folder: tensor 'w': cannot be read: Is a directory"),
        ({"location": "none.bin"}, "does not exist"),
        ({"location": "x" * 5000}, ""),
        ({"location": "d.bin", "offset": "7"}, "outside the file of 10 bytes"),
        ({"location": "d.bin", "offset": "-1"}, "decimal number"),
        ({"location": "d.bin", "offset": "1" * 30}, "decimal number"),
        ({"location": "d.bin", "offset": "٣"}, "decimal number"),
        ({"location": "d.bin", "offset": "9" * 18}, "outside the file"),
        ({"location": "d.bin", "length": "5"}, "5 bytes of external data where its dims take 4"),
    ],
)
def test_external_data_that_are_refused(entries, message, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "d.bin").write_bytes(b"0123456789")
    (inside / "out.bin").symlink_to(outside / "d.bin")
    (inside / "linked").symlink_to(outside)
    (inside / "loop.bin").symlink_to(inside / "loop.bin")
    (inside / "folder").mkdir()
    path = external(inside / "m.onnx", **entries)
    with pytest.raises(CorruptFile) as refused:
        read(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_external_data_in_a_cache_of_links(tmp_path):
    """huggingface_hub keeps files by their hashes, and snapshots of links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "22").write_bytes(b"0123456789")
    (tmp_path / "other.bin").write_bytes(b"0123456789")
    external(blobs / "11", location="m.onnx_data", offset="2")
    (snapshot / "m.onnx").symlink_to("../../../blobs/11")
    (snapshot / "m.onnx_data").symlink_to("../../../blobs/22")
    assert read(snapshot / "m.onnx")["w"].packed().tobytes() == b"2345"
    (snapshot / "m.onnx_data").unlink()
    (snapshot / "m.onnx_data").symlink_to("../../../other.bin")
    with pytest.raises(CorruptFile, match="is a link out of the folder"):
        read(snapshot / "m.onnx")


def test_external_data_may_be_a_link_within_the_folder(tmp_path):
    (tmp_path / "d.bin").write_bytes(b"0123456789")
    (tmp_path / "inside.bin").symlink_to(tmp_path / "d.bin")
    assert read(external(tmp_path / "m.onnx", location="inside.bin"))["w"].packed().tobytes() == b"0123"


def test_ten_gigabytes_are_opened_by_their_headers(tmp_path, monkeypatch):
    """No byte of a payload is read; then the last ones are."""
    rows, columns, block, count = 1 << 15, 1 << 15, 128, 20
    nbytes = rows * columns // 2
    nodes, initializers = [], []
    for n in range(count):
        shapes = [
            (f"w{n}", TensorProto.UINT8, [rows, columns // block, block // 2], n * nbytes, "codes.bin"),
            (f"s{n}", TensorProto.FLOAT16, [rows, columns // block], n * rows * columns // block * 2, "scales.bin"),
        ]
        for name, data_type, dims, offset, location in shapes:
            tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value=location)
            tensor.external_data.add(key="offset", value=str(offset))
            initializers.append(tensor)
        attributes = {"K": columns, "N": rows, "block_size": block, "bits": 4}
        nodes.append(
            helper.make_node("MatMulNBits", ["x", f"w{n}", f"s{n}"], [f"y{n}"], domain="com.microsoft", **attributes)
        )
    for location, size in (("codes.bin", count * nbytes), ("scales.bin", count * rows * columns // block * 2)):
        with (tmp_path / location).open("wb") as file:
            file.truncate(size)
            file.seek(-1, 2)
            file.write(b"\x3c")
    path = save(tmp_path / "m.onnx", nodes, initializers, outputs=["y0"], inputs=["x"])
    with monkeypatch.context() as patched:
        patched.setattr(FileRange, "read", lambda *_: pytest.fail("a payload is read"))
        model = read(path)
        assert sum(tensor.nbytes for tensor in model.values()) == 10 << 30
        assert {tensor.granularity for tensor in model.values()} == {"blockwise (1, 128)"}
    last = model[f"w{count - 1}"].rows(rows - 1, rows)
    assert last.codes()[0, -2:].tolist() == [0xC, 3]
    assert last.dequantize(np.float32)[0, -1] == (3 - 8) * 1.0


def test_external_data_of_a_model_behind_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "d.bin").write_bytes(b"0123456789")
    external(tmp_path / "real" / "m.onnx", location="d.bin")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read(tmp_path / "link" / "m.onnx")["w"].packed().tobytes() == b"0123"


def test_external_data_of_our_own(tmp_path):
    write(zoo.granularities(), tmp_path / "m.onnx", OnnxOptions(external_data=Size(1)))
    (tmp_path / "m.onnx.data").write_bytes((tmp_path / "m.onnx.data").read_bytes()[:-1])
    with pytest.raises(CorruptFile, match=r"m\.onnx\.data.*truncated"):
        read(tmp_path / "m.onnx")


# Models


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x08\x0a", "0 graphs"),
        (b"\x3a\x00", "0 IR versions"),
        (b"\x08\x0a\x3a\x00\x3a\x00", "2 graphs"),
        (b"\x08\x0a\x3a\x7f", "truncated"),
        (b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "truncated"),
        (b"\xff" * 40, "does not end"),
        (b"\x08\x0a\x38\x01", "wire type 0, not that of a message"),
        (b"\x08\x0a\x3b", "wire type 3"),
        (b"\x08\x0a\x02\x00", "field 0"),
        (b"not an ONNX model at all", "not an ONNX model"),
        (b"\x08\x0a\x3a\x02\x0a\x00", "names no operator"),
    ],
)
def test_files_that_are_no_models(content, message, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CorruptFile) as refused:
        read(tmp_path / "m.onnx")
    assert message in str(refused.value)
    assert str(tmp_path / "m.onnx") in str(refused.value)


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        attribute = encode_field(6, graph)
        graph = encode_field(1, encode_field(4, b"If") + encode_field(5, attribute))
    return b"\x08\x0a" + encode_field(7, graph)


def encode_field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_deep_nesting(tmp_path):
    (tmp_path / "m.onnx").write_bytes(nested(5000))
    with pytest.raises(Unsupported, match="nested deeper than 64"):
        read(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(nested(60))
    assert not read(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [3, 6]}, "has 8 bytes of raw_data, but dims (3, 6) of int4 take 9"),
        ({"dims": [-1]}, "has a negative size"),
        ({"dims": [1 << 40, 1 << 40]}, "larger than any memory"),
        ({"dims": [1 << 62, 0]}, "larger than any memory"),
        ({"dims": [1] * 65}, "has 65 dimensions; 32 are the most"),
        ({"data_type": 99}, "ONNX type 99"),
        ({"data_type": 0}, "ONNX type 0"),
        ({"name": ""}, "no name"),
    ],
)
def test_initializers_that_contradict_themselves(change, message, tmp_path):
    tensor = raw("w", INT4_CODES)
    for field, value in change.items():
        if field == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, field, value)
    with pytest.raises(Error) as refused:
        read(save(tmp_path / "m.onnx", initializers=[tensor], outputs=[]))
    assert message in str(refused.value)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("data_type", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT8, TensorProto.DOUBLE])
def test_typed_fields_of_the_wrong_length(count, data_type, tmp_path):
    tensor = helper.make_tensor("w", data_type, [count], [1] * count)
    del tensor.dims[:]
    tensor.dims.append(2)
    with pytest.raises(CorruptFile, match="entries of"):
        read(save(tmp_path / "m.onnx", initializers=[tensor], outputs=[]))


@pytest.mark.parametrize(
    ("scale", "attributes", "message"),
    [
        ((4,), {}, "(5,) is needed"),
        ((5,), {"axis": 2}, "axis 2"),
        ((5,), {"axis": -3}, "axis -3"),
        ((3, 5), {}, "do not fit"),
        ((3, 2), {"block_size": 2}, "(3, 3) is needed"),
        ((3, 3), {"block_size": -2}, "block_size -2"),
        ((5,), {"block_size": 2}, None),
        ((1, 1, 1), {"axis": 1, "block_size": 2}, None),
    ],
)
def test_parameters_that_do_not_fit(scale, attributes, message, tmp_path):
    initializers = [raw("q", INT4_CODES), raw("s", np.ones(scale, np.float32))]
    path = save(tmp_path / "m.onnx", [linear("q", "s", **attributes)], initializers)
    if message is None:
        assert read(path)["q"].dequantize(np.float32).shape == (3, 5)
        return
    with pytest.raises(CorruptFile) as refused:
        read(path)
    assert message in str(refused.value)
    assert "tensor 'q'" in str(refused.value)


def test_zero_points_that_do_not_fit(tmp_path):
    initializers = [raw("q", INT4_CODES), raw("s", np.float32([1, 2, 3, 4, 5])), raw("z", np.zeros(3, ml_dtypes.int4))]
    with pytest.raises(CorruptFile, match="zero point of dims"):
        read(save(tmp_path / "m.onnx", [linear("q", "s", "z")], initializers))


def test_names_that_nothing_makes(tmp_path):
    with pytest.raises(CorruptFile, match="Relu takes 'x', which nothing"):
        read(save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])]))
    with pytest.raises(CorruptFile, match="output 'y' is made by nothing"):
        read(save(tmp_path / "m.onnx"))
    with pytest.raises(CorruptFile, match="the name of another"):
        read(save(tmp_path / "m.onnx", initializers=[raw("w", INT4_CODES)] * 2, outputs=["w"]))


def test_nodes_in_a_circle(tmp_path):
    nodes = [
        helper.make_node("Gather", ["a", "i"], ["b"], axis=0),
        helper.make_node("Gather", ["b", "i"], ["a"], axis=1),
        helper.make_node("Mul", ["q", "a"], ["y"]),
        helper.make_node("Add", ["y", "a"], ["z"]),
    ]
    properties = {"nibblecast.layout": "weights"}
    path = save(tmp_path / "m.onnx", nodes, [raw("q", INT4_CODES), raw("i", np.int32([0]))], outputs=["z"])
    model = onnx.load(path)
    helper.set_model_props(model, properties)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFile, match="decode no weight"):
        read(path)


def edited(tmp_path: Path, edit) -> Path:
    write(zoo.schemes(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    edit(model.graph, {i.name: i for i in model.graph.initializer})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "m.onnx"


def test_the_graph_is_read_and_not_a_description(tmp_path):
    """An edited graph gives other tensors, or none, but never the old ones."""

    def scale(graph, initializers):
        initializers["offset_scale"].raw_data = bytes(len(initializers["offset_scale"].raw_data))

    assert not read(edited(tmp_path, scale))["offset"].quantization.scale.numpy().any()

    def operator(graph, initializers):
        next(node for node in graph.node if node.output[0] == "offset").op_type = "Sub"

    with pytest.raises(CorruptFile, match="tensor 'offset': the nodes that make this output decode no weight"):
        read(edited(tmp_path, operator))

    def index(graph, initializers):
        initializers["group index_group_index"].raw_data = b"\x09\0\0\0" * 24

    with pytest.raises(CorruptFile, match="index has groups 9 to 9: there are 3"):
        read(edited(tmp_path, index))


def test_truncated_anywhere(tmp_path):
    write(zoo.shared_parameters(), tmp_path / "whole.onnx")
    content = (tmp_path / "whole.onnx").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "m.onnx").write_bytes(content[:length])
        with pytest.raises(Error):
            read(tmp_path / "m.onnx")


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_damaged_anywhere(tmp_path_factory, changes, ours):
    """Any bytes changed: a model, or an Error of one line."""
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"damaged-{ours}-source.onnx"
    if not whole.exists():
        if ours:
            write(zoo.schemes(), whole)
        else:
            strings = [raw("q", INT4_CODES), raw("s", np.float32([1, 2, 3])), helper.make_tensor("t", 6, [2], [1, -1])]
            save(whole, [linear("q", "s", axis=0)], strings)
    content = bytearray(whole.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (folder / "damaged.onnx").write_bytes(content)
    with suppress(Error):
        decode_all(folder / "damaged.onnx")


@pytest.mark.parametrize("field", [2, 3, 8])
def test_attributes_that_are_packed_and_hold_nothing(field, tmp_path):
    """Found by the test below: an integer, or a float, as an array without any."""
    attribute = encode_field(1, b"axis") + encode_field(field, b"")
    node = encode_field(1, b"q") + encode_field(2, b"y") + encode_field(4, b"Relu") + encode_field(5, attribute)
    (tmp_path / "m.onnx").write_bytes(
        b"\x08\x0a" + encode_field(7, encode_field(1, node) + encode_field(11, b"\x0a\x01q"))
    )
    assert not read(tmp_path / "m.onnx")


FIXTURES = sorted((Path(__file__).parents[3] / "fixtures" / "onnx").glob("*.onnx"))


def outside_payloads(content: bytes) -> list[int]:
    """The bytes that say what is where: a changed payload is just another payload."""
    payloads: set[int] = set()
    for tensor in onnx.load_from_string(content).graph.initializer:
        at = content.find(tensor.raw_data) if len(tensor.raw_data) > 8 else -1
        payloads.update(range(at, at + len(tensor.raw_data)) if at >= 0 else ())
    return [at for at in range(len(content)) if at not in payloads]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_damaged_attributes_and_dims(path, tmp_path):
    """Four hundred files of each kind, one to three bytes of each changed: a model, or an Error of one line."""
    content, rng = path.read_bytes(), np.random.default_rng(len(path.stem))
    places = outside_payloads(content)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for at in rng.choice(places, rng.integers(1, 4)):
            damaged[at] = rng.choice([damaged[at] ^ (1 << rng.integers(8)), rng.integers(256), 0, 255, 127])
        (tmp_path / "m.onnx").write_bytes(damaged)
        try:
            decode_all(tmp_path / "m.onnx")
        except Error:
            refused += 1
    assert 40 < refused < 400


def decode_all(path: Path) -> None:
    try:
        for tensor in read(path).values():
            if tensor.dtype.kind != "c" and tensor.size < 1 << 20:
                tensor.dequantize(np.float32)
    except Error as error:
        if "\n" in str(error):
            raise AssertionError(f"not one line: {error}") from error
        raise


# The wire format


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_integers_round_trip(value):
    view = memoryview(varint(value))
    read_value, end = read_varint(view, 0, len(view))
    assert (signed(read_value), end) == (value, len(view))


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_packed_and_unpacked_integers_are_read_alike(values):
    apart = encode(TENSOR, dims=values)
    packed = b"".join(varint(value) for value in values)
    together = b"\x0a" + varint(len(packed)) + packed
    for content in (apart, together):
        assert decode(memoryview(content), Range(0, len(content)), TENSOR).ints("dims") == values
