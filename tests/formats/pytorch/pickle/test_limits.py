"""What one model may cost to read is one allowance for all its pickles and tensors; honest ones are far from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.input.allowance import VARIABLE
from nibblecast.formats.pytorch import reader
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import Global, Key, UnknownObject, described, key_of, reason_of
from tests.formats.pytorch.pickle.bombs import entry, get, pushed, put, saved, storage, tensor
from tests.formats.pytorch.pickle.hostile_pickles import zipped

FIXTURES = Path(__file__).parents[4] / "fixtures"
MIB = 1 << 20


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def expanded(count: int, elements: int) -> bytes:
    """A state dict of so many views of one element, each of so many floats."""
    views = (pushed(f"w{n}") + tensor(size=pushed((elements,)), stride=pushed((0,))) for n in range(count))
    return saved(b"}(" + b"".join(views) + b"u")


def test_all_views_of_a_model_share_one_allowance(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt", expanded(60, MIB))  # of 4 MiB each: 240 MiB together
    assert len(nibblecast.load(path)) == 60
    with pytest.raises(Unsupported, match=f"tensor 'w64': repeats elements of its file: .*{VARIABLE}"):
        nibblecast.load(written(path, expanded(2000, MIB)))


def test_all_shards_of_a_model_share_one_allowance(tmp_path: Path) -> None:
    for number in (1, 2):
        content = expanded(40, MIB).replace(b"w", f"{number}".encode())
        written(tmp_path / f"pytorch_model-0000{number}-of-00002.bin", content)
    with pytest.raises(Unsupported, match="repeats elements of its file"):
        nibblecast.load(tmp_path)


def test_the_environment_raises_the_allowance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.pt", expanded(100, MIB))
    with pytest.raises(Unsupported):
        nibblecast.load(path)
    monkeypatch.setenv(VARIABLE, "1G")
    assert len(nibblecast.load(path)) == 100


def test_tied_weights_are_read(tmp_path: Path) -> None:
    large = tensor(storage(count=pushed(MIB)), size=pushed((MIB,)), stride=pushed((1,)))
    names = b"}(" + b"".join(pushed(f"w{n}") + get(0) for n in range(60)) + b"u"
    content = saved(large + put(0) + b"0" + names, **{"0": b"\0" * (4 * MIB)})
    assert len(nibblecast.load(written(tmp_path / "m.pt", content))) == 60


def test_an_array_under_several_names_is_in_memory_once(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    zipped(pickle.dumps({"a": array, "b": array, "c": np.asfortranarray(array.reshape(2, 3))}, 2), tmp_path / "m.pt")
    model = nibblecast.load(tmp_path / "m.pt")
    assert np.shares_memory(model["a"].packed(), model["b"].packed())
    np.testing.assert_array_equal(model["c"].numpy(), array.reshape(2, 3))


def test_long_lists_of_numbers_are_read(tmp_path: Path) -> None:
    losses = b"](" + b"K\x01" * 2_500_000 + b"e"
    content = saved(b"}(" + pushed("losses") + losses + pushed("net1") + entry(tensor()) + b"u")
    assert list(nibblecast.load(written(tmp_path / "m.pt", content))) == ["net1.x"]


def test_integers_are_parts_of_names_as_keys_too(tmp_path: Path) -> None:
    content = saved(b"}(" + b"".join(pushed(key) + tensor() for key in (0, 1 << 40, "a", (1, 2), None, 2.5)) + b"u")
    assert list(nibblecast.load(written(tmp_path / "m.pt", content))) == ["0", str(1 << 40), "a"]


def test_a_tensor_may_be_a_key(tmp_path: Path) -> None:
    """Optimizers that are saved whole have their parameters for keys."""
    content = saved(b"}(" + tensor() + b"N" + pushed("w") + tensor() + b"u")
    assert list(nibblecast.load(written(tmp_path / "m.pt", content))) == ["w"]


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[Limits]:
    """The limits of the models that are read."""
    made: list[Limits] = []

    class Watched(Limits):
        def __init__(self, file_bytes: int) -> None:
            super().__init__(file_bytes)
            made.append(self)

    monkeypatch.setattr(reader, "Limits", Watched)
    return made


@pytest.mark.parametrize(
    "path",
    [path for folder in ("pytorch", "torchao") for path in sorted((FIXTURES / folder).glob("*.pt*"))],
    ids=lambda path: path.name,
)
def test_honest_models_spend_less_than_half_of_what_they_may(path: Path, spent: list[Limits]) -> None:
    """Without what the smallest pickles may spend in any case."""
    nibblecast.load(path)
    (limits,) = spent
    assert limits._spent < 32 * limits.read


def test_limits_grow_with_what_is_read() -> None:
    limits = Limits(0)
    limits.spend(MIB)
    with pytest.raises(CorruptFile, match="the values in its 0 bytes of pickle or JSON without end"):
        limits.spend(1)
    limits.read += 1
    limits.spend(63)
    limits.spend(60, 1)
    with pytest.raises(CorruptFile, match="without end"):
        limits.spend(10)


def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("nibblecast.formats.pytorch.pickle.unpickler.made", without_memory)
    with pytest.raises(CorruptFile, match="takes more memory than there is before byte"):
        nibblecast.load(written(tmp_path / "m.pt", saved(entry(tensor()))))


def nested(depth: int, width: int = 2) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value,) * width
    return value


def nothing(_nbytes: int) -> None:
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Global("torch", "float32"), "torch.float32"),
        (Global("m", "x" * 1000), f"m.{'x' * 198}…"),
        (UnknownObject(Global("a", "B"), nested(60)), "an object of a.B"),
        (nested(60), "(a tuple of 2, a tuple of 2)"),
        (1 << 8000, "an integer of 8001 bits"),
        ({1: 2}, "a dict of 1"),
        (None, "None"),
        (2.5, "2.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_are_described_briefly(value: object, text: str) -> None:
    assert described(value) == text


def test_our_own_objects_have_no_representation_of_what_they_hold() -> None:
    held = UnknownObject(Global("a", "B"), nested(60))
    assert "UnknownObject object at" in repr(held)
    assert described([held]) == "[a value of type UnknownObject]"


def test_the_reason_of_an_error_holds_no_value() -> None:
    assert reason_of(KeyError(nested(60))) == "KeyError"
    assert reason_of(ValueError("x" * 10_000)) == f"ValueError: {'x' * 200}…"
    assert reason_of(IndexError()) == "IndexError"


@pytest.mark.parametrize("value", ["x", b"x", UnknownObject(Global("a", "B"))], ids=["text", "bytes", "object"])
def test_texts_and_objects_are_keys_themselves(value: Any) -> None:
    assert key_of(value, nothing) is value


def test_keys_of_different_values_differ() -> None:
    values = [0, 1, True, 1.0, None, "1", b"1", (1,), ("1",), (b"1",), (1, 2), ((1, 2),), ((1,), 2), Global("a", "b")]
    assert len({key_of(value, nothing) for value in values}) == len(values)
    assert key_of((1, "a"), nothing) == key_of((1, "a"), nothing)
    assert key_of(7, nothing) == Key("7", is_integer=True)


STRANGE_KEYS = {
    "a list": [],
    "a dictionary": {},
    "a set": set(),
    "a bytearray": bytearray(),
    "a tuple three deep": nested(3),
    "a tuple sixty deep": nested(60),
    "a wide tuple": nested(1, 65),
    "an integer of 300 bits": 1 << 300,
    "a long text": "x" * 100_000,
    "long texts": ("x" * 10_000,) * 2,
}


@pytest.mark.parametrize("kind", STRANGE_KEYS)
def test_what_takes_long_to_hash_is_no_key(kind: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        key_of(STRANGE_KEYS[kind], nothing)


def test_what_keys_take_is_counted() -> None:
    seen: list[int] = []
    key_of(((1, "abc"), 2.5), seen.append)
    assert sum(seen) >= 5 * 32 + 3
