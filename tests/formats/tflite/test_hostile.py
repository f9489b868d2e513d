"""Files made to do harm: each is read, or refused in one line that names it, in bounded time and memory."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import Error
from nibblecast.formats.tflite import schema
from tests.formats.tflite.models import (
    Fields,
    Patch,
    affine,
    constant,
    fixture,
    hostile,
    ints,
    model,
    operator,
    serialize,
    subgraph,
    table,
    tensor,
    whole,
)

pytestmark = pytest.mark.slow

SECONDS = 5.0  # of the processor, on a busy machine; what is not in proportion takes minutes
MEMORY = 32 << 20  # small files: the fixtures have some thousand bytes, the bombs at most some hundred thousand


@contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Fails when what is done inside takes more processor time or memory than a small file may."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        seconds, most_bytes = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 4 * SECONDS  # tracemalloc makes allocations about four times as slow
    assert most_bytes < memory


def outcome(path: Path) -> str:
    """Loads and decodes a file; "read", or the line with which it is refused."""
    try:
        for each in nibblecast.load(path).values():
            each.codes()
            if each.dtype.kind != "c":
                each.dequantize(np.float32)
    except Error as error:
        line = str(error)
        assert line.isprintable()
        assert line.startswith(f"{path}: ")
        return line
    return "read"


GOOD = fixture("cnn_int4_per_channel.tflite")
VARIANTS = hostile.hostile_files(GOOD)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_hostile_variant_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(VARIANTS[name])
    with bounded():
        found = outcome(path)
    if name not in hostile.LITERT_ACCEPTS and not name.startswith("flipped"):
        # a weight without bytes looks like an activation; LiteRT finds out when it runs the model
        assert found != "read" or name == "buffer_no_bytes"


def test_the_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(GOOD)
    assert outcome(path) == "read"


@pytest.mark.parametrize("name", ["lstm_while", "sparse_block", "mlp_int4_blockwise"])
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, name: str) -> None:
    patch = Patch(f"{name}.tflite")
    inside = {place for begin, end in patch.buffer_spans() for place in range(begin, end)}
    places = [place for place in range(len(patch.data)) if place not in inside]
    path = tmp_path / "model.tflite"
    seen = set()
    for seed in range(150):
        generator = random.Random(seed)
        data = bytearray(patch.data)
        for _ in range(1 + seed % 4):
            data[generator.choice(places)] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        begin = time.process_time()
        seen.add(outcome(path) == "read")
        assert time.process_time() - begin < SECONDS
    assert seen == {True, False}


# ---- small files that stand for a lot ------------------------------------------------------------

COUNT = 4000


def many_subgraphs_of_one_table() -> bytes:
    graph = subgraph([tensor("a", "INT8", (1,))] * 200)
    return whole([graph] * COUNT, [b""])


def many_tensors_of_one_table() -> bytes:
    return whole([subgraph([tensor("a", "INT8", (1,), buffer=np.uint32(1))] * COUNT)], [b"", b"x"])


def many_tensors_of_one_name() -> bytes:
    return model([constant("a", "INT8", (1,), b"x")] * COUNT)


def many_tensors_of_a_long_name() -> bytes:
    name = "n" * 100_000
    return model([constant(name, "INT8", (1,), b"x") for _ in range(COUNT)])


def many_tensors_of_a_long_shape() -> bytes:
    shape = ints(*[1] * 30_000)
    return model([tensor("a", "INT8", ()) | table(schema.Tensor, shape=shape) for _ in range(COUNT)])


def many_tensors_of_one_quantization() -> bytes:
    quantization = affine([1.0] * 10_000)
    buffer = table(schema.Tensor, buffer=np.uint32(1), quantization=quantization)
    tensors = [tensor(f"w{i}", "INT8", (10_000,)) | buffer for i in range(COUNT)]
    return whole([subgraph(tensors)], [b"", bytes(10_000)])


def many_operators_of_one_table() -> bytes:
    tensors = [constant("a", "INT8", (1,), b"x"), tensor("b", "INT8", (1,))]
    return model(tensors, [operator(0, [0] * 500, [1])] * COUNT, ["ABS"])


def many_operators_of_one_tensor() -> bytes:
    tensors = [constant("a", "INT8", (1,), b"x"), tensor("b", "INT8", (1,))]
    return model(tensors, [operator(0, [0], [1]) for _ in range(COUNT)], ["ABS"])


def a_chain_that_doubles() -> bytes:
    """Each DEQUANTIZE takes its input twice, and hands the uses of its output on."""
    count = 200
    tensors: list[Fields | tuple[Fields, bytes]] = [tensor(f"t{i}", "INT8", (1,)) for i in range(count)]
    tensors[0] = constant("w", "INT8", (1,), b"x")
    chain = [operator(0, [i, i], [i + 1, i + 1]) for i in range(count - 1) for _ in range(2)]
    return model(tensors, [*chain, operator(1, [count - 1], [])], ["DEQUANTIZE", "ABS"])


def many_operator_codes() -> bytes:
    custom = table(schema.OperatorCode, builtin_code=np.int32(schema.CUSTOM), custom_code="custom")
    return serialize(
        table(
            schema.Model,
            version=np.uint32(schema.VERSION),
            subgraphs=[subgraph([]) for _ in range(COUNT)],
            operator_codes=[dict(custom) for _ in range(COUNT)],
        )
    )


BOMBS: list[Callable[[], bytes]] = [
    many_subgraphs_of_one_table,
    many_tensors_of_one_table,
    many_tensors_of_one_name,
    many_tensors_of_a_long_name,
    many_tensors_of_a_long_shape,
    many_tensors_of_one_quantization,
    many_operators_of_one_table,
    many_operators_of_one_tensor,
    a_chain_that_doubles,
    many_operator_codes,
]


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_small_file_takes_little_time_and_memory(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(make())
    with bounded():
        outcome(path)
    begin = time.process_time()
    outcome(path)
    assert time.process_time() - begin < SECONDS
