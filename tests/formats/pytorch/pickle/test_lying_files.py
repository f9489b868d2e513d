"""Archives and pickles that lie about sizes, or that would grow without end: refused before anything is allocated."""

from __future__ import annotations

import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.formats.pytorch.modules.state_dict import state_dict_of
from nibblecast.formats.pytorch.pickle.limits import Limits

FLOATS = np.arange(6, dtype=np.float32)


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int = 0,
    *,
    count: int = 6,
    key: str = "0",
    storage: str = "torch\nFloatStorage",
) -> bytes:
    """The pickle of one tensor called `x`, protocol 2."""

    def pushed(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    identifier = (
        b"(" + pushed("storage") + b"c" + storage.encode() + b"\n" + pushed(key) + pushed("cpu") + pushed(count) + b"tQ"
    )
    arguments = identifier + pushed(offset) + pushed(shape) + pushed(strides) + b"\x89N"
    return b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:  # type: ignore[arg-type]
        file.writestr("archive/data.pkl", pickled)
        for name, content in (records or {"data/0": FLOATS.tobytes()}).items():
            file.writestr(f"archive/{name}", content)
    return path


def test_a_tensor_is_a_map_of_the_file(tmp_path: Path) -> None:
    model = nibblecast.load(archive(tmp_path / "m.pt", tensor((2, 3), (3, 1))))
    np.testing.assert_array_equal(model["x"].numpy(), FLOATS.reshape(2, 3))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor((2, 3), (3, 1), 1), "reaches element 6 of a storage of 6"),
        (tensor((2, 4), (3, 1)), "reaches element 6"),
        (tensor((2, 3), (1 << 60, 1)), "reaches element"),
        (tensor((-2, 3), (3, 1)), "counts are needed"),
        (tensor((2, 3), (-3, 1)), "counts are needed"),
        (tensor((2, 3), (3,)), "do not fit"),
        (tensor((2, 3), (3, 1), -1), "do not fit"),
        (tensor((2, 3), (3, 1), count=1 << 40), "claims to hold"),
        (tensor((2, 3), (3, 1), key="../0"), "damaged"),
        (tensor((2, 3), (3, 1), key="9"), "no record"),
        (tensor((2, 3), (3, 1), storage="torch\nStrangeStorage"), "not supported"),
        (tensor((2, 3), (3, 1), storage="os\nsystem"), "would call os.system"),
    ],
)
def test_views_stay_inside_their_storage(pickled: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match=message):
        nibblecast.load(archive(tmp_path / "m.pt", pickled))


def test_a_view_that_repeats_its_storage_is_read_when_it_is_small(tmp_path: Path) -> None:
    model = nibblecast.load(archive(tmp_path / "m.pt", tensor((1000, 6), (0, 1))))
    np.testing.assert_array_equal(model["x"].numpy(), np.broadcast_to(FLOATS, (1000, 6)))


def test_a_bomb_of_strides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="repeats elements of its file: .*set NIBBLECAST_MAX_EXPANSION"):
        nibblecast.load(archive(tmp_path / "m.pt", tensor((1 << 20, 1 << 20), (0, 0))))


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", tensor((2, 3), (3, 1)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(Unsupported, match="compressed"):
        nibblecast.load(path)


@pytest.mark.parametrize(
    ("name", "is_read"),
    [("", False), ("/", True), ("data/1\0", True), ("data/0\0junk", False), ("..", False), ("x" * 60_000, False)],
    ids=["none", "a slash", "with a zero", "another's before a zero", "two dots", "long"],
)
def test_records_of_strange_names(name: str, is_read: bool, tmp_path: Path) -> None:
    """Whatever a record is called, the others are found, or the archive is refused for what it lacks."""
    path = archive(tmp_path / "m.pt", tensor((2, 3), (3, 1)), {"data/0": FLOATS.tobytes(), "data/?": b"x"})
    stand_in, now = b"archive/data/?", (b"archive/" if name.startswith("data") else b"") + name.encode()
    content, change = path.read_bytes(), len(now) - len(stand_in)
    local = content.rindex(stand_in, 0, content.index(b"PK\x01\x02"))
    listed, end = content.rindex(stand_in), content.rindex(b"PK\x05\x06")
    renamed = bytearray(
        content[: local - 4]
        + struct.pack("<H", len(now))
        + content[local - 2 : local]
        + now
        + content[local + len(stand_in) : listed - 18]
        + struct.pack("<H", len(now))
        + content[listed - 16 : listed]
        + now
        + content[listed + len(stand_in) :]
    )
    size, start = struct.unpack("<2L", content[end + 12 : end + 20])
    end += 2 * change
    renamed[end + 12 : end + 20] = struct.pack("<2L", size + change, start + change)
    path.write_bytes(renamed)
    if is_read:
        assert list(nibblecast.load(path)) == ["x"]
    else:
        with pytest.raises(CorruptFile) as raised:
            nibblecast.load(path)
        assert len(str(raised.value)) < 500


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.sampled_from([0, 0, 0, 1, 30]),
)
def test_any_damage_of_a_directory_is_read_or_refused_in_one_line(
    changes: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = archive(tmp_path_factory.getbasetemp() / "damaged.pt", tensor((2, 3), (3, 1)))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for at, byte in changes:
        content[directory + at % (len(content) - directory)] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        for each in nibblecast.load(path).values():
            each.numpy()
    except Error as error:
        assert "\n" not in str(error)


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    archive(path, tensor((2, 3), (3, 1)))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", b"\0" * 24)
    with pytest.raises(CorruptFile, match="two records of one name"):
        nibblecast.load(path)


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", tensor((2, 3), (3, 1)), {"data/0": FLOATS.tobytes(), "data/1": b"x"})
    content = bytearray(path.read_bytes())
    last = content.rindex(b"PK\x01\x02")
    content[last + 42 : last + 46] = struct.pack("<I", content.index(b"archive/data/0") - 30)
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="overlap|one name"):
        nibblecast.load(path)


def test_a_billion_laughs_end(tmp_path: Path) -> None:
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"]" + bytes([ord("q"), n + 1]) + b"(" + bytes([ord("h"), n]) * 2 * 5 + b"e" for n in range(60)
    )
    path = archive(tmp_path / "m.pt", laughs + b".")
    with pytest.raises(CorruptFile, match="without end"):
        nibblecast.load(path)


def test_a_list_that_holds_itself_ends(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="without end"):
        nibblecast.load(archive(tmp_path / "m.pt", b"\x80\x02]q\x00h\x00a."))


def test_a_deep_tuple_is_refused_as_a_key_and_as_a_value(tmp_path: Path) -> None:
    deep = b")" + b"\x85" * 200_000
    for pickled in (b"\x80\x02}" + deep + b"Ns.", b"\x80\x02" + deep + b"."):
        with pytest.raises(CorruptFile):
            nibblecast.load(archive(tmp_path / "m.pt", pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",  # a text of an exabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",  # an integer of 2 GiB
        b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        b"L" + b"9" * 100_000 + b"L\n.",
        b"Nr" + struct.pack("<I", (1 << 32) - 1) + b"j\0\0\0\0.",  # a memo slot far out
        b"\x80\x09N.",
        b"\x80\x02",
        b".",
        b"(.",
        b"\x82\x01.",
        b"\x97.",
    ],
)
def test_lengths_are_checked_before_anything_is_read(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(Error) as raised:
        nibblecast.load(archive(tmp_path / "m.pt", pickled))
    assert "\n" not in str(raised.value)


def test_tar_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 300)
    with pytest.raises(Unsupported, match="tar archive"):
        nibblecast.load(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", tensor((2, 3), (3, 1)), {"data/0": FLOATS.tobytes(), "byteorder": b"big"})
    with pytest.raises(Unsupported, match="byte order"):
        nibblecast.load(path)


def test_listing_takes_no_memory_for_the_tensors(tmp_path: Path) -> None:
    """The file is sparse: 2 GiB of zeros, most of which the disk does not hold."""
    path = tmp_path / "large.pt"
    count = 1 << 29
    archive(path, tensor((1 << 15, 1 << 14), (1 << 14, 1), count=count), {"data/1": b"", "version": b"3\n"})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    name = b"archive/data/0"
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, count * 4, count * 4, len(name), 0) + name
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, count * 4, count * 4, len(name), 0, 0, 0, 0, 0, directory
    )
    end = content.index(b"PK\x05\x06")
    start = directory + len(local) + count * 4
    with path.open("wb") as file:
        file.write(content[:directory] + local)
        file.seek(start)
        entries = content[directory:end] + entry + name
        file.write(entries + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 4, 4, len(entries), start, 0))
    limit = 600 << 20
    program = "import sys, nibblecast; print(nibblecast.load(sys.argv[1])['x'].nbytes)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.stdout.strip() == str(count * 4), done.stderr


def test_names_of_wrappers_are_left_out_only_where_all_have_them() -> None:
    array = np.zeros(1, np.float32)
    assert list(state_dict_of({"module.a": array, "module.b": array}, Limits(0)).leaves) == ["a", "b"]
    assert list(state_dict_of({"module.a": array, "b": array}, Limits(0)).leaves) == ["module.a", "b"]
    assert list(state_dict_of({"_orig_mod.a": array}, Limits(0)).leaves) == ["a"]
