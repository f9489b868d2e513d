"""The reader of FlatBuffers: what it checks, and that it raises nothing but the project's own errors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.flatbuffer import Table, payload, scalar, string, table, tables, vector
from tests.formats.tflite.models import Patch, fixture, serialize
from tests.formats.tflite.models import table as fields


class Leaf(Table):
    number = scalar(0, "i", -5)
    flag = scalar(1, "?")


class Root(Table):
    number = scalar(0, "I", 7)
    text = string(1)
    numbers = vector(2, np.int32)
    leaf = table(3, Leaf)
    leaves = tables(4, Leaf)
    raw = payload(5)


def read(content: bytes) -> Root:
    return Root.root(np.frombuffer(content, np.uint8))


def number(value: int) -> dict[int, Any]:
    return fields(Leaf, number=np.int32(value))


FULL = serialize(
    fields(
        Root,
        number=np.uint32(2**32 - 1),
        text="zwölf",
        numbers=np.array([-(2**31), 3], np.int32),
        leaf=number(11) | fields(Leaf, flag=np.bool_(True)),
        leaves=[number(1), number(2)],
        raw=np.array([0, 255], np.uint8),
    )
)
#: A vtable of 16 bytes at 4, a table at 20, then room for what its fields refer to.
FIELD = {"number": 24, "text": 28, "numbers": 32, "leaf": 36, "leaves": 40, "raw": 44}
ROOT = struct.pack("<I8Hi", 20, 16, 28, 4, 8, 12, 16, 20, 24, 16)
assert len(ROOT) == 24


def with_field(name: str, value: int, tail: bytes = b"") -> bytes:
    """A flatbuffer whose root has one field that holds `value`, and `tail` behind the table, at byte 48."""
    place = FIELD[name]
    slots = [4 * (i + 1) if each == name else 0 for i, each in enumerate(FIELD)]
    content = bytearray(struct.pack("<I8Hi", 20, 16, 28, *slots, 16) + bytes(24) + tail)
    struct.pack_into("<I", content, place, value % 2**32)
    return bytes(content)


def test_every_kind_of_field_is_read() -> None:
    root = read(FULL)
    assert root.number == 2**32 - 1
    assert root.text == "zwölf"
    assert root.numbers.tolist() == [-(2**31), 3]
    assert (root.leaf.number, root.leaf.flag) == (11, 1)
    assert [leaf.number for leaf in root.leaves] == [1, 2]
    assert root.raw.tolist() == [0, 255]


def test_absent_fields_have_their_defaults() -> None:
    root = read(serialize({}))
    assert (root.number, root.text, root.numbers, root.leaf, root.leaves, root.raw) == (7, None, None, None, [], None)
    assert read(serialize({3: {}})).leaf.number == -5


def test_a_vtable_shorter_than_the_schema_leaves_the_later_fields_out() -> None:
    content = struct.pack("<IHHHHiI", 12, 6, 8, 4, 0, 8, 9)  # a vtable of one field
    root = read(content)
    assert (root.number, root.text, root.leaves) == (9, None, [])


def test_vectors_are_views_of_the_file() -> None:
    content = np.frombuffer(FULL, np.uint8)
    root = Root.root(content)
    assert np.shares_memory(root.numbers, content)
    assert np.shares_memory(root.raw, content)


def test_a_string_that_is_not_utf8_appears_as_escapes() -> None:
    place = FULL.index("zwölf".encode())
    assert read(FULL[: place + 2] + b"\xff\xfe" + FULL[place + 4 :]).text == "zw\\xff\\xfelf"


@pytest.mark.parametrize("vtable", [-8, -2, -1])
def test_a_vtable_before_the_flatbuffer_is_refused(vtable: int) -> None:
    """`struct` takes a negative position from the end: there would be one, of other sizes."""
    content = bytearray(ROOT + bytes(24) + struct.pack("<4H", 8, 28, 4, 8))
    struct.pack_into("<i", content, 20, 20 - vtable)
    with pytest.raises(CorruptFile, match=f"byte {vtable}, before the flatbuffer"):
        _ = read(bytes(content)).number


READS: dict[str, Callable[[Root], Any]] = {
    "number": lambda root: root.number,
    "text": lambda root: root.text,
    "numbers": lambda root: root.numbers,
    "leaf": lambda root: root.leaf,
    "leaves": lambda root: root.leaves,
    "raw": lambda root: root.raw,
}


@pytest.mark.parametrize("name", ["text", "numbers", "leaf", "leaves", "raw"])
@pytest.mark.parametrize("offset", [2**32 - 1, 2**31, 10_000, 22])
def test_an_offset_outside_is_refused(name: str, offset: int) -> None:
    root = read(with_field(name, offset))
    with pytest.raises(CorruptFile, match=r"truncated or damaged|before the flatbuffer"):
        READS[name](root)


@pytest.mark.parametrize("name", ["text", "numbers", "leaf", "leaves", "raw"])
def test_an_offset_to_itself_is_refused(name: str) -> None:
    with pytest.raises(CorruptFile, match=f"the offset at byte {FIELD[name]} points to itself"):
        READS[name](read(with_field(name, 0)))


def test_an_offset_outside_names_the_byte_and_the_size() -> None:
    with pytest.raises(CorruptFile, match=r"points to byte 10028, beyond the flatbuffer's 48 bytes"):
        READS["text"](read(with_field("text", 10_000)))


@pytest.mark.parametrize("name", ["text", "numbers", "leaves", "raw"])
@pytest.mark.parametrize("length", [1, 2, 2**30, 2**31, 2**32 - 1])
def test_a_vector_longer_than_the_file_is_refused_before_it_is_made(name: str, length: int) -> None:
    content = with_field(name, 48 - FIELD[name], struct.pack("<I", length))
    with pytest.raises(CorruptFile, match=f"claims {length} elements"):
        READS[name](read(content))


@pytest.mark.parametrize("name", ["text", "numbers", "leaves", "raw"])
def test_a_vector_that_ends_with_the_file_is_read(name: str) -> None:
    assert len(READS[name](read(with_field(name, 48 - FIELD[name], struct.pack("<I", 0))))) == 0


def test_a_field_that_begins_inside_the_file_and_ends_outside_is_refused() -> None:
    content = struct.pack("<IHHHHi", 12, 6, 8, 2, 0, 8)  # the number begins in the table's last two bytes
    with pytest.raises(CorruptFile, match="beyond the flatbuffer"):
        READS["number"](read(content))


@pytest.mark.parametrize("distance", [-1000, 1000, -(2**31), 2**31 - 1, 21])
def test_a_vtable_outside_is_refused(distance: int) -> None:
    with pytest.raises(CorruptFile, match=r"before the flatbuffer|beyond the flatbuffer"):
        read(ROOT[:20] + struct.pack("<i", distance) + bytes(24))


@pytest.mark.parametrize("size", [0, 2, 3, 7, 46, 0xFFFF])
def test_a_vtable_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptFile, match=f"the vtable at byte 4 has size {size}"):
        read(ROOT[:4] + struct.pack("<H", size) + ROOT[6:] + bytes(24))


@pytest.mark.parametrize("size", range(24))
def test_a_file_cut_inside_its_root_is_refused(size: int) -> None:
    with pytest.raises(CorruptFile):
        read(ROOT[:size])


def test_tables_that_are_listed_again_and_again_are_refused() -> None:
    leaf = number(1)
    assert len(read(serialize(fields(Root, leaves=[leaf] * 1000))).leaves) == 1000
    many = read(serialize(fields(Root, leaves=[leaf] * 20_000)))
    with pytest.raises(Unsupported, match="refused as a bomb"):
        READS["leaves"](many)


@pytest.mark.parametrize("name", ["text", "numbers"])
def test_strings_and_vectors_that_are_read_again_and_again_are_refused(name: str) -> None:
    root = read(serialize(fields(Root, text="x" * 10_000, numbers=np.zeros(2500, np.int32))))

    def again_and_again() -> None:
        for _ in range(100):
            READS[name](root)

    READS[name](root)
    with pytest.raises(Unsupported, match="again and again"):
        again_and_again()


def test_payloads_may_be_looked_at_as_often_as_wanted() -> None:
    root = read(serialize(fields(Root, raw=np.zeros(10_000, np.uint8))))
    assert sum(root.raw.size for _ in range(100)) == 1_000_000


def visit(root: Table) -> int:
    """Reads every field of a table and of all below it; gives the number of tables."""
    count = 1
    for name in vars(type(root)):
        value = getattr(root, name)
        below = value if isinstance(value, list) else [value]
        count += sum(visit(each) for each in below if isinstance(each, Table))
    return count


@given(st.binary(max_size=200))
@example(FULL)
@example(ROOT + bytes(24))
def test_random_bytes_raise_nothing_but_errors(content: bytes) -> None:
    try:
        assert visit(read(content)) >= 1
    except Error as error:
        assert "\n" not in str(error)


@given(st.integers(0, len(FULL) - 4), st.integers(0, 2**32 - 1))
def test_a_damaged_number_raises_nothing_but_errors(place: int, value: int) -> None:
    content = FULL[:place] + struct.pack("<I", value) + FULL[place + 4 :]
    try:
        assert visit(read(content)) >= 1
    except Error as error:
        assert "\n" not in str(error)


MODEL = fixture("mlp_int4_blockwise.tflite")
HEADER = [
    place
    for place in range(len(MODEL))
    if not any(begin <= place < end for begin, end in Patch("mlp_int4_blockwise.tflite").buffer_spans())
]


@given(st.lists(st.tuples(st.sampled_from(HEADER), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_model_raises_nothing_but_errors(changes: list[tuple[int, int]]) -> None:
    content = bytearray(MODEL)
    for place, value in changes:
        content[place] = value
    try:
        assert visit(schema.Model.root(np.frombuffer(bytes(content), np.uint8))) >= 1
    except Error as error:
        assert "\n" not in str(error)
