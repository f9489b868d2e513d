"""Bytes that are computed ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nibblecast
from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import Model, Quantization, Tensor, blocked
from nibblecast.converters.machine import THREADS
from nibblecast.converters.output.streaming import pieces_of
from nibblecast.converters.storage import Computed, Data, InMemory

_ROWS, _COLUMNS = 64, 32
_BYTES = np.arange(_ROWS * _COLUMNS, dtype=np.uint16).view(np.uint8)[: _ROWS * _COLUMNS]


def pieces(tensor: Tensor, nbytes: int) -> Iterator[NDArray[np.uint8]]:
    return (piece for _, piece in pieces_of([tensor], nbytes))


class Source(Data):
    """Bytes that remember what of them was let go."""

    nbytes = _BYTES.size

    def __init__(self) -> None:
        self.released: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return _BYTES[start:stop]

    def release(self, start: int, stop: int) -> None:
        self.released.append((start, stop))


def tensor(compute: Callable[[int, int], NDArray[np.uint8]], *sources: Source) -> Tensor:
    return Tensor("w", (_ROWS, _COLUMNS), np.dtype(np.uint8), Computed(_BYTES.size, compute, sources))


@pytest.fixture
def others() -> int:
    """How many threads there are already: libraries that other tests import may have some."""
    return threading.active_count()


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv(THREADS, str(request.param))
    return int(request.param)


def test_pieces_come_in_order_whatever_computes_them_first(threads: int, others: int) -> None:
    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        time.sleep(0.002 * (start // _COLUMNS % 3))
        return _BYTES[start:stop]

    found = list(pieces(tensor(compute), 2 * _COLUMNS))
    assert len(found) == _ROWS // 2
    np.testing.assert_array_equal(np.concatenate(found), _BYTES)
    assert threading.active_count() == others


@given(st.integers(1, 3000), st.sampled_from([np.float16, np.float32]))
@settings(max_examples=30)
def test_they_are_the_tensor(nbytes: int, dtype: type) -> None:
    scale = Tensor.from_array("s", np.linspace(0.1, 3, 3 * 5 * 4, dtype=np.float32).reshape(3, 5, 4))
    codes = np.arange(3 * 5 * 64, dtype=np.uint8).reshape(3, 5, 64).view(np.int8)
    plain = Tensor.from_array("w", codes, Quantization(scale, blocked((3, 5, 64), 2, 16)))
    values = plain.dequantized(dtype)
    np.testing.assert_array_equal(np.concatenate([piece.copy() for piece in pieces(values, nbytes)]), values.packed())


def test_no_more_is_computed_ahead_than_there_are_threads(threads: int) -> None:
    computed: list[int] = []

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        computed.append(start)
        return _BYTES[start:stop]

    for number, _ in enumerate(pieces(tensor(compute), _COLUMNS)):
        assert len(computed) <= number + 1 + (threads if threads > 1 else 0)


def test_each_is_let_go_after_it_was_taken(threads: int) -> None:
    source = Source()
    for number, _ in enumerate(pieces(tensor(source.read, source), _COLUMNS)):
        assert source.released == [(row * _COLUMNS, (row + 1) * _COLUMNS) for row in range(number)]
    assert len(source.released) == _ROWS


def test_errors_come_out_where_they_are_due_and_no_thread_stays(threads: int, others: int) -> None:
    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        if start == 5 * _COLUMNS:
            raise CorruptFile("the sixth")
        return _BYTES[start:stop]

    stream = pieces(tensor(compute), _COLUMNS)
    assert len(list(islice(stream, 5))) == 5
    with pytest.raises(CorruptFile, match="the sixth"):
        next(stream)
    assert threading.active_count() == others


def test_no_thread_stays_when_not_all_are_taken(threads: int, others: int) -> None:
    stream = pieces(tensor(lambda start, stop: _BYTES[start:stop]), _COLUMNS)
    next(stream)
    stream.close()
    assert threading.active_count() == others


def test_what_is_there_already_needs_no_thread(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "4")
    stored = Tensor("w", (_ROWS, _COLUMNS), np.dtype(np.uint8), InMemory(_BYTES))
    for piece in pieces(stored, _COLUMNS):
        assert piece.base is not None
        assert threading.active_count() == others


def test_data_that_are_not_made_in_order_are_let_go_at_the_end() -> None:
    source = Source()
    reversed_ = Computed(
        source.nbytes, lambda start, stop: source.read(0, source.nbytes)[::-1][start:stop], (source,), in_order=False
    )
    list(pieces(Tensor("w", (_ROWS, _COLUMNS), np.dtype(np.uint8), reversed_), _COLUMNS))
    assert source.released == [(0, source.nbytes)]


def test_columns_of_an_array_are_written_as_well(tmp_path: Path) -> None:
    """What ONNX's QMoE has as zero points: one in each row of two, a view that is not contiguous."""
    pairs = np.arange(2 * _ROWS, dtype=np.uint8).reshape(_ROWS, 2)
    every_other = Computed(_ROWS, lambda start, stop: pairs[:, :1].reshape(-1)[start:stop])
    model = Model({"w": Tensor("w", (_ROWS,), np.dtype(np.uint8), every_other)})
    nibblecast.save(model, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(nibblecast.load(tmp_path / "w.safetensors")["w"].numpy(), pairs[:, 0])
