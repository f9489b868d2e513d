"""What a graph's sizes describe, and what its subgraphs repeat: counted before it is made. And graphs that contradict
themselves: refused in one line, whoever asks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.input.allowance import VARIABLE, Allowance
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.graph import TFLiteGraph
from nibblecast.formats.tflite.options import OPTIONS
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, TensorInfo
from tests.formats.tflite.models import Fields, affine, ints, operator, table, tensor, whole
from tests.growth import assert_linear

pytestmark = pytest.mark.slow

MOST_MEMORY = 16 << 20


def graph(tensors: Sequence[Fields], operators: Sequence[Fields], inputs: Sequence[int], outputs: Sequence[int]) -> Any:
    return table(
        schema.SubGraph, tensors=[*tensors], operators=[*operators], inputs=ints(*inputs), outputs=ints(*outputs)
    )


def options(name: str, **values: Any) -> Mapping[str, Any]:
    """The options of an operator; which table they are is not looked at."""
    fields = OPTIONS[name]
    return {
        "builtin_options_type": np.uint8(1),
        "builtin_options": {fields[key].slot: value for key, value in values.items()},
    }


def one(
    name: str, inputs: Sequence[Fields | tuple[Fields, bytes]], output: Fields, more: Mapping[str, Any] | None = None
) -> bytes:
    """A model of one operator; inputs with bytes are constants."""
    tensors, buffers, ports = [], [b""], []
    for number, each in enumerate(inputs):
        if isinstance(each, tuple):
            tensors.append(each[0] | table(schema.Tensor, buffer=np.uint32(len(buffers))))
            buffers.append(each[1])
        else:
            tensors.append(each)
            ports.append(number)
    made = operator(0, range(len(inputs)), [len(inputs)], **(more or {}))
    return whole([graph([*tensors, output], [made], ports, [len(inputs)])], buffers, [name])


def refused(content: bytes, folder: Path, kind: type[Error], message: str) -> None:
    """Converting it to ONNX is refused, in little memory."""
    source = folder / "model.tflite"
    source.write_bytes(content)
    model = nibblecast.load(source)
    small = folder / "small.tflite"
    small.write_bytes(one("ABS", [floats("x", 2)], floats("y", 2)))
    nibblecast.convert(small, folder / "small.onnx")  # what is imported for it takes memory, too
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=message):
            nibblecast.save(model, folder / "model.onnx")
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def floats(name: str, *shape: int, **more: Any) -> Fields:
    return tensor(name, "FLOAT32", shape, **more)


def whole_numbers(name: str, *values: int) -> tuple[Fields, bytes]:
    return tensor(name, "INT32", (len(values),)), np.array(values, "<i4").tobytes()


# ---- constants that sizes describe -----------------------------------------------------------------------------------

N = 1 << 15  # squared, a gigabyte


def described(n: int) -> dict[str, bytes]:
    pairs = tensor("p", "INT32", (1, 2)), np.array([[n * n // 8, 0]], "<i4").tobytes()
    symmetric = options("MIRROR_PAD", mode=np.int8(1))
    update = [floats("x", n, n), floats("u", n // 4, n // 4), whole_numbers("s", 0, 0)]
    shapes = [tensor("a", "INT32", (n * n // 8,)), tensor("b", "INT32", (2,))]
    return {
        "MATRIX_DIAG": one("MATRIX_DIAG", [floats("x", n)], floats("y", n, n)),
        "MATRIX_SET_DIAG": one("MATRIX_SET_DIAG", [floats("x", n, n), floats("d", n)], floats("y", n, n)),
        "MIRROR_PAD": one("MIRROR_PAD", [floats("x", 3), pairs], floats("y", 3), symmetric),
        "DYNAMIC_UPDATE_SLICE": one("DYNAMIC_UPDATE_SLICE", update, floats("y")),
        "BROADCAST_ARGS": one("BROADCAST_ARGS", shapes, tensor("y", "INT32", ())),
        "a state": whole(
            [
                graph(
                    [tensor("r", "RESOURCE", ()), floats("v", n // 2, n // 2)],
                    [operator(0, [], [0]), operator(1, [0], [1])],
                    [],
                    [1],
                )
            ],
            [b""],
            ["VAR_HANDLE", "READ_VARIABLE"],
        ),
    }


@pytest.mark.parametrize("name", described(N))
def test_what_sizes_describe_is_refused_before_it_is_made(name: str, tmp_path: Path) -> None:
    refused(described(N)[name], tmp_path, Unsupported, f"its graph needs constants .* set {VARIABLE}")


@pytest.mark.parametrize("name", described(N))
def test_the_environment_allows_more_or_less(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(described(512)[name])  # 32 to 256 KiB of constants
    monkeypatch.setenv(VARIABLE, "16K")
    with pytest.raises(Unsupported, match="its graph needs constants"):
        nibblecast.convert(source, tmp_path / "model.onnx")
    monkeypatch.setenv(VARIABLE, "2M")
    nibblecast.convert(source, tmp_path / "model.onnx")


def test_many_small_ones_count_together(tmp_path: Path) -> None:
    count, size = 400, 1000  # 400 diagonals of a megabyte
    tensors = [floats(f"x{i}", size + i) for i in range(count)] + [floats(f"y{i}", 1, 1) for i in range(count)]
    made = [operator(0, [i], [count + i]) for i in range(count)]
    model = whole([graph(tensors, made, range(count), range(count, 2 * count))], [b""], ["MATRIX_DIAG"])
    source = tmp_path / "model.tflite"
    source.write_bytes(model)
    with pytest.raises(Unsupported, match="its graph needs constants"):
        nibblecast.convert(source, tmp_path / "model.onnx")


def test_lists_that_many_operators_share_count_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 50
    monkeypatch.setenv(VARIABLE, "32M")
    shape = tensor("s", "INT32", (100_000,)), np.ones(100_000, "<i4").tobytes()
    tensors = [floats("x", 1), shape[0] | table(schema.Tensor, buffer=np.uint32(1)), *[floats("y", 1)] * count]
    made = [operator(0, [0, 1], [2 + i]) for i in range(count)]
    source = tmp_path / "model.tflite"
    source.write_bytes(whole([graph(tensors, made, [0], [2])], [b"", shape[1]], ["RESHAPE"]))
    with pytest.raises(Unsupported, match="its graph needs constants"):
        nibblecast.convert(source, tmp_path / "model.onnx")


# ---- subgraphs that run each other -----------------------------------------------------------------------------------


def nested(depth: int, last: int | None = None) -> bytes:
    """Subgraphs each of which runs the next one in both branches of an IF; the last one, `last` or nothing."""
    graphs = []
    for number in range(depth):
        tensors = [tensor("c", "BOOL", ()), floats("x", 2), floats("y", 2)]
        then = np.int32(number + 1 if number < depth - 1 else last or 0)
        branches = options("IF", then_subgraph_index=then, else_subgraph_index=then)
        is_end = number == depth - 1 and last is None
        made = operator(1, [1], [2]) if is_end else operator(0, [0, 0, 1], [2], **branches)
        graphs.append(graph(tensors, [made], [0, 1], [2]))
    return whole(graphs, [b""], ["IF", "ABS"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(1, last=0), "subgraph 0 runs itself"),
        (nested(3, last=1), "subgraph 1 runs itself"),
        (nested(300), "run each other more than 32 deep"),
        (nested(24), "its graph needs constants or nodes"),
        (nested(2, last=9), "subgraph 9 of 2"),
    ],
    ids=["itself", "a circle", "deep", "2 ** 24 times", "none"],
)
@pytest.mark.parametrize("custom", ["", "my.domain"])
def test_subgraphs_without_end_are_refused(
    content: bytes, message: str, custom: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "16M")
    source = tmp_path / "model.tflite"
    source.write_bytes(content)
    with pytest.raises(Error, match=message):
        nibblecast.convert(source, tmp_path / "model.onnx", custom=custom)


def test_a_few_subgraphs_within_each_other_are_written(tmp_path: Path) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(nested(6))
    nibblecast.convert(source, tmp_path / "model.onnx", verify=True)


# ---- contradictions --------------------------------------------------------------------------------------------------


def with_port(shape: Sequence[int]) -> bytes:
    """An image that is channels first when the graph gives it as one of another number of axes."""
    pool = options("MAX_POOL_2D", stride_w=np.int32(1), stride_h=np.int32(1), filter_width=np.int32(1))
    return one("MAX_POOL_2D", [floats("x", 1, 4, 4, 1)], floats("y", *shape), pool)


def with_signature(subgraph: int, index: int = 0) -> bytes:
    port = table(schema.TensorMap, name="a", tensor_index=np.uint32(index))
    signature = table(schema.SignatureDef, signature_key="s", subgraph_index=np.uint32(subgraph), inputs=[port])
    made = graph([floats("x", 2), floats("y", 2)], [operator(0, [0], [1])], [0], [1])
    return whole([made], [b""], ["ABS"], signature_defs=[signature])


FAKE = options("FAKE_QUANT", min=np.float32(-1), max=np.float32(1), num_bits=np.int32((1 << 31) - 1))
BATCHES = options("GATHER", axis=np.int32(1), batch_dims=np.int32((1 << 31) - 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_port([]), "an output has shapes, inputs or options that contradict each other"),
        (with_port([2, 2]), "an output has shapes, inputs or options that contradict each other"),
        (with_signature(1), "its signature 's' is of subgraph 1 of 1"),
        (with_signature((1 << 32) - 1), "its signature 's' is of subgraph 4294967295 of 1"),
        (one("FAKE_QUANT", [floats("x", 2)], floats("y", 2), FAKE), "FAKE_QUANT to 2147483647 bits"),
        (
            one("GATHER", [floats("x", 2, 3, 4), tensor("i", "INT32", (2, 3))], floats("y", 2, 3), BATCHES),
            "GATHER with 2147483647 axes of a batch",
        ),
        (one("ABS", [floats("x", *[1] * 5000)], floats("y", 1)), "has 5000 dimensions; 32 are the most"),
        (one("ABS", [floats("x", 1)], floats("y", *[1] * 33)), "has 33 dimensions; 32 are the most"),
    ],
)
def test_contradictions_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(content)
    with pytest.raises((CorruptFile, Unsupported), match=message):
        nibblecast.convert(source, tmp_path / "model.onnx")


@pytest.mark.parametrize("ports", [([-1], [1]), ([0], [-1]), ([-2], [1]), ([0], [2])])
def test_ports_that_are_no_tensors_are_refused(ports: tuple[list[int], list[int]], tmp_path: Path) -> None:
    source = tmp_path / "model.tflite"
    made = graph([floats("x", 2), floats("y", 2)], [operator(0, [0], [1])], *ports)
    source.write_bytes(whole([made], [b""], ["ABS"]))
    with pytest.raises(CorruptFile, match="subgraph 0 refers to tensor"):
        nibblecast.load(source)


def test_a_signature_of_a_tensor_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "model.tflite"
    source.write_bytes(with_signature(0, index=7))
    nibblecast.convert(source, tmp_path / "model.onnx")


# ---- one buffer of many tensors --------------------------------------------------------------------------------------


def test_a_buffer_of_many_tensors_counts_for_each(tmp_path: Path) -> None:
    """The file of a megabyte would be written as one of a gigabyte."""
    data = bytes(1 << 20)
    tensors = [tensor(f"w{i}", "INT8", (len(data),), buffer=np.uint32(1)) for i in range(1000)]
    source = tmp_path / "model.tflite"
    source.write_bytes(whole([graph(tensors, [], [], [])], [b"", data]))
    with pytest.raises(Unsupported, match="tensor 'w.*': repeats or expands what the file holds"):
        nibblecast.load(source)


def test_a_buffer_of_two_tensors_is_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    tensors = [tensor(f"w{i}", "INT8", (len(data),), buffer=np.uint32(1)) for i in range(2)]
    source = tmp_path / "model.tflite"
    source.write_bytes(whole([graph(tensors, [], [], [])], [b"", data]))
    assert [weight.nbytes for weight in nibblecast.load(source).values()] == [len(data)] * 2


# ---- time ------------------------------------------------------------------------------------------------------------


def lowered(model: nibblecast.Model) -> Any:
    assert isinstance(model.graph, TFLiteGraph)
    return model.graph.lowered(opset=21)


def test_a_graph_may_be_asked_for_again_and_again(tmp_path: Path) -> None:
    """Each time its tables are read anew; what may be read of them is for one time."""
    count = 300
    tensors = [tensor(f"x{i}", "INT8", (1, 1), quantization=affine([0.5])) for i in range(count + 1)]
    made = [operator(0, [i], [i + 1]) for i in range(count)]
    source = tmp_path / "model.tflite"
    source.write_bytes(whole([graph(tensors, made, [0], [count])], [b""], ["ABS"]))
    model = nibblecast.load(source)
    for _ in range(12):
        lowered(model)


def a_chain_of_moves(count: int) -> Callable[[], object]:
    """Codes that are moved again and again: whether the result is rounded is seen where they come from."""
    info = TensorInfo("x", (2, 2), (2, 2), np.dtype(np.int8), 0.5, 0, None)

    def run() -> None:
        b = GraphBuilder([info], 21, UniqueNames(), Allowance(0), run_subgraph=lambda *_: ())
        b.write(0, b.argument("x", [2, 2]))
        for _ in range(count):
            b.write(0, b.emit("Transpose", [b.read(0)], perm=[1, 0]))
        assert [node.op_type for node in b.nodes] == ["QuantizeLinear", "DequantizeLinear", *["Transpose"] * count]

    return run


def test_a_long_chain_of_moves_takes_time_in_proportion() -> None:
    assert_linear(a_chain_of_moves, 1000)
