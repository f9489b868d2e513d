"""ONNX models that repeat, expand or go round in circles: counted against the allowance, or refused in one line."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.input.allowance import VARIABLE
from nibblecast.formats.onnx.file.graph import Node, ParsedGraph
from nibblecast.formats.onnx.file.rewrite import GraphEdit, _Renamed
from tests.formats.onnx.onnx_models import linear, raw, save
from tests.growth import assert_linear

pytestmark = pytest.mark.slow

WEIGHT = raw("w", np.arange(16, dtype=np.int8).reshape(4, 4))
SCALE = raw("s", np.array(0.5, np.float32))


def identity(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [source], [result])


def external(name: str, file: str, count: int) -> TensorProto:
    """An int8 tensor whose payload is the beginning of a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.INT8, dims=[count], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=file)
    return tensor


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


# ---- external data ---------------------------------------------------------------------------------------------------


def test_one_range_of_external_data_counts_for_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "10M")
    (tmp_path / "w.data").write_bytes(bytes(1 << 20))
    tensors = [external(f"w{i}", "w.data", 1 << 20) for i in range(20)]
    path = save(tmp_path / "m.onnx", [identity("w0", "y")], tensors)
    with pytest.raises(Unsupported, match="tensor 'w1.': repeats or expands what the file holds"):
        nibblecast.load(path)
    monkeypatch.setenv(VARIABLE, "20M")
    assert len(nibblecast.load(path)) == 20


def test_external_data_of_attributes_count_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no tensors of the model, and yet each would be written."""
    (tmp_path / "w.data").write_bytes(bytes(1 << 20))
    nodes = [
        helper.make_node("Table", ["x"], [f"y{i}"], domain="com.microsoft", value=external("", "w.data", 1 << 20))
        for i in range(20)
    ]
    path = save(tmp_path / "m.onnx", nodes, inputs=["x"], outputs=["y0"])
    monkeypatch.setenv(VARIABLE, "10M")
    with pytest.raises(Unsupported, match="repeats or expands what the file holds"):
        nibblecast.convert(path, tmp_path / "n.onnx")
    monkeypatch.setenv(VARIABLE, "20M")
    nibblecast.convert(path, tmp_path / "n.onnx")


def test_large_external_data_allow_more(tmp_path: Path) -> None:
    """The allowance goes by all files of the model: two names for 300 MB are 300 MB more than the files hold."""
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(300 << 20)
    path = save(tmp_path / "m.onnx", [identity("w0", "y")], [external(f"w{i}", "w.data", 300 << 20) for i in range(2)])
    assert len(nibblecast.load(path)) == 2


# ---- sizes that nothing holds ----------------------------------------------------------------------------------------


def test_one_scale_for_codes_that_are_not_there_makes_nothing(tmp_path: Path) -> None:
    """The operator's zero points say that there are 8 GiB of scales, before it is known that there are no codes."""
    lying = [TensorProto(name=name, data_type=TensorProto.INT8, dims=[1 << 33], raw_data=b"") for name in "wz"]
    node = helper.make_node("QGemm", ["x", "xs", "xz", "w", "s", "z"], ["y"], domain="com.microsoft")
    path = save(tmp_path / "m.onnx", [node], [*lying, SCALE], inputs=["x", "xs", "xz"])
    with little_memory(), pytest.raises(CorruptFile, match="has 0 bytes of raw_data"):
        nibblecast.load(path)


def test_one_zero_point_for_many_scales_is_each_of_theirs(tmp_path: Path) -> None:
    scales, zero = raw("ss", np.arange(1, 5, dtype=np.float32)), raw("z", np.array([3], np.uint8))
    codes = raw("w", np.arange(16, dtype=np.uint8).reshape(4, 4))
    node = helper.make_node("QGemm", ["x", "xs", "xz", "w", "ss", "z"], ["y"], domain="com.microsoft", transB=1)
    path = save(tmp_path / "m.onnx", [node], [codes, scales, zero], inputs=["x", "xs", "xz"])
    wanted = (np.arange(16, dtype=np.float32).reshape(4, 4) - 3) * np.arange(1, 5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(nibblecast.load(path)["w"].dequantize(np.float32), wanted)


def test_the_index_of_an_axis_without_elements_counts(tmp_path: Path) -> None:
    """No element, but 4 billion positions, each of which ONNX would want the group of."""
    size, block = 1 << 32, 1 << 20
    codes = TensorProto(name="w", data_type=TensorProto.UINT4, dims=[0, size], raw_data=b"")
    scales = raw("s", np.ones((1, size // block), np.float32))
    path = save(tmp_path / "m.onnx", [linear("w", "s", axis=1, block_size=block)], [codes, scales])
    model = nibblecast.load(path)
    assert model["w"].quantization is not None
    with little_memory(), pytest.raises(Unsupported, match="needs an index of the groups along an axis"):
        nibblecast.save(nibblecast.Model(model.tensors), tmp_path / "n.onnx")


@pytest.mark.parametrize("port", ["input", "output"])
def test_ports_of_many_axes_are_refused(port: str, tmp_path: Path) -> None:
    model = onnx.load(save(tmp_path / "m.onnx", [identity("x", "y")], inputs=["x"]))
    info = getattr(model.graph, port)[0]
    info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, [1 << 40] * 50_000))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(Unsupported, match="has 50000 dimensions; 32 are the most"):
        nibblecast.load(tmp_path / "m.onnx")


# ---- functions -------------------------------------------------------------------------------------------------------


def test_functions_that_call_each_other_count_for_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "4M")
    functions = []
    for depth in range(12):
        called = ("Identity", "") if depth == 11 else (f"f{depth + 1}", "f")
        body = [helper.make_node(called[0], ["a"], [f"b{i}"], domain=called[1]) for i in range(8)]
        opsets = [helper.make_opsetid("", 25), helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", f"f{depth}", ["a"], ["b0"], body, opsets))
    path = save(tmp_path / "m.onnx", [helper.make_node("f0", ["w"], ["y"], domain="f")], [WEIGHT], functions=functions)
    with pytest.raises(Unsupported, match="its functions call 'f[0-9]+' again and again"):
        nibblecast.load(path)


def test_graphs_in_the_bodies_of_functions_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "4M")
    inner = helper.make_graph([identity("a", f"i{n}") for n in range(1000)], "inner", [], [])
    body = [helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner)]
    function = helper.make_function("f", "f", ["a"], ["b"], body, [helper.make_opsetid("", 25)])
    nodes = [helper.make_node("f", ["w"], [f"y{n}"], domain="f") for n in range(10)]
    path = save(tmp_path / "m.onnx", nodes, [WEIGHT], outputs=["y0"], functions=[function])
    with pytest.raises(Unsupported, match="its functions call 'f' again and again"):
        nibblecast.load(path)


# ---- names and circles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes",
    [
        [identity("w", "y"), identity("w", "y")],
        [identity("w", "y"), identity("y", "w")],
        [helper.make_node("Split", ["w"], ["y", "y"])],
        [identity("w", "x"), identity("x", "y")],
    ],
    ids=["two nodes", "an initializer", "one node", "an input"],
)
def test_a_name_that_two_make_is_refused(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", nodes, [WEIGHT], inputs=["x"])
    with pytest.raises(CorruptFile, match="which something else in its graph makes"):
        nibblecast.load(path)


def test_an_initializer_that_is_an_input_is_one_name(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [identity("w", "y")], [WEIGHT], inputs=["w"])
    assert list(nibblecast.load(path)) == ["w"]


COUNT = 3000


def leading_nowhere() -> list[onnx.NodeProto]:
    """Codes that are decoded, and taken by a long chain as well."""
    return [identity("w", "v0"), *(identity(f"v{i}", f"v{i + 1}") for i in range(COUNT))]


def going_round() -> list[onnx.NodeProto]:
    return [helper.make_node("Add", ["w", "b"], ["a"]), identity("a", "b")]


@pytest.mark.parametrize("others", [leading_nowhere(), going_round()], ids=["long", "round"])
def test_what_else_takes_codes_is_followed_to_its_end(others: list[onnx.NodeProto], tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [linear("w", "s"), *others], [WEIGHT, SCALE])
    with pytest.raises(Unsupported, match="its codes are also taken by a"):
        nibblecast.convert(path, tmp_path / "n.onnx", dequantize="float32")


def test_a_long_chain_of_what_nothing_takes_any_more_is_left_out(tmp_path: Path) -> None:
    """An input more than the operator has, at the end of thousands of nodes."""
    moved = [identity(f"v{i}", f"v{i + 1}") for i in range(COUNT)]
    nodes = [*moved, linear("w", "s", "", f"v{COUNT}", output="d"), identity("d", "y")]
    path = save(tmp_path / "m.onnx", nodes, [WEIGHT, SCALE, raw("v0", np.zeros(1, np.float32))])
    nibblecast.convert(path, tmp_path / "n.onnx", dequantize="float32")
    assert [node.op_type for node in onnx.load(tmp_path / "n.onnx").graph.node] == ["Identity"]


@pytest.mark.parametrize("suffix", [".onnx", ".h", ".safetensors", ".gguf"])
def test_a_graph_that_goes_round_is_written_or_refused(suffix: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["w", "b"], ["a"]), identity("a", "b"), identity("b", "y"), linear("w", "s")]
    nodes[-1].output[0] = "d"
    path = save(tmp_path / "m.onnx", nodes, [WEIGHT, SCALE])
    for more in ({}, {"dequantize": "float32"}, {"weights": "matmulnbits"} if suffix == ".onnx" else {}):
        try:
            nibblecast.convert(path, tmp_path / f"n{suffix}", **more)  # type: ignore[arg-type]
        except Error as error:
            assert "\n" not in str(error)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_scales_of_many_weights_are_looked_at_once(tmp_path: Path) -> None:
    """With an index of the groups there may be any number of scales for a weight; here they are varints, which are
    counted. They are refused for what they are all together."""

    def make(count: int) -> Callable[[], object]:
        scales = TensorProto(name="scales", data_type=TensorProto.FLOAT16, dims=[1, count * 5000])
        scales.int32_data.extend([1] * (count * 5000))
        nodes = [helper.make_node("Cast", ["scales"], ["scales32"], to=TensorProto.FLOAT)]
        tensors = [scales, raw("groups", np.array([0, 5, 5, 0]))]
        for i in range(count):
            tensors.append(raw(f"w{i}", np.zeros((1, 4), np.int8)))
            nodes.append(helper.make_node("Cast", [f"w{i}"], [f"c{i}"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Gather", ["scales32", "groups"], [f"g{i}"], axis=1))
            nodes.append(helper.make_node("Mul", [f"c{i}", f"g{i}"], [f"y{i}"]))
        path = save(tmp_path / f"{count}.onnx", nodes, tensors, outputs=["y0"])

        def run() -> None:
            try:
                nibblecast.load(path)
            except Unsupported as error:
                assert "repeats or expands" in str(error)

        return run

    assert_linear(make, 200)


def test_names_that_graphs_have_are_looked_up_in_those_around_them() -> None:
    """Every weight may have another name in every graph: no graph has a table of all of them."""

    def make(count: int) -> Callable[[], object]:
        edit = GraphEdit(renamed={f"d{i}": f"w{i}" for i in range(count)})
        inner = ParsedGraph((Node("Neg", ("d0",), ("d1",)),), (), (), ("d1",))

        def run() -> None:
            around = _Renamed.inside(None, inner, edit)
            for _ in range(count):
                renamed = _Renamed.inside(around, inner, GraphEdit())
                assert (renamed.get("d0"), renamed.get("d1"), renamed.get("x")) == ("w0", "", "")

        return run

    assert_linear(make, 2000)
