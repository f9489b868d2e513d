"""The container: what the official library refuses is refused, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.safetensors.containers import entry, file_of
from tests.growth import assert_linear


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"\x02\0\0", CorruptFile, "begins with a length of 8"),
        (file_of(b"{}", length=100), CorruptFile, "claims a header of 100 bytes"),
        (file_of(b"{}", length=1 << 60), CorruptFile, "claims a header of"),
        (file_of(b"{]"), CorruptFile, "its header is not a JSON object"),
        (file_of(b'{"\xff":1}'), CorruptFile, "its header is not a JSON object"),
        (file_of(b'{"a":' * 100_000), CorruptFile, "its header is not a JSON object"),
        (file_of({"a": 1}), CorruptFile, "tensor 'a': its header entry is not an object"),
        (file_of({"__metadata__": {"a": 1}}), CorruptFile, "not an object of strings"),
        (file_of({"a": entry(last=9)}, bytes(9)), CorruptFile, r"has 9 bytes for shape \[2\] of F32, which takes 8"),
        (file_of({"a": entry(shape=[-2])}, bytes(8)), CorruptFile, "counts are needed"),
        (file_of({"a": entry(shape=[2.0])}, bytes(8)), CorruptFile, "counts are needed"),
        (file_of({"a": entry(first=-8, last=0)}, bytes(8)), CorruptFile, "counts are needed"),
        (file_of({"a": entry(shape=[1 << 30, 1 << 20])}, bytes(8)), CorruptFile, "which takes"),
        (file_of({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)), CorruptFile, "larger than any memory"),
        (file_of({"a": entry(shape=[10**310])}, bytes(8)), CorruptFile, "tensor 'a': shape .* larger than any memory"),
        (file_of({"a": entry(shape=[1] * 240)}, bytes(8)), Unsupported, "tensor 'a': has 240 dimensions"),
        (file_of({"a": entry(shape=[10**4000] * 300)}, bytes(8)), Unsupported, "tensor 'a': has 300 dimensions"),
        (file_of({"a": entry(last=9 * 10**4299)}, bytes(8)), CorruptFile, "has an integer of .* bits bytes for shape"),
        (
            file_of({"a": entry(first=10**4300 - 9, last=10**4300 - 1)}, bytes(8)),
            CorruptFile,
            "has its data at bytes an integer of",
        ),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), CorruptFile, "its header is not a JSON object"),
        (file_of({"a": entry()}, bytes(4)), CorruptFile, "outside the file|truncated"),
        (file_of({"a": entry()}, bytes(9)), CorruptFile, "it is truncated or has a tail"),
        (file_of({"a": entry(first=1, last=9)}, bytes(9)), CorruptFile, "holes and overlaps are refused"),
        (file_of({"a": entry(), "b": entry(first=4, last=12)}, bytes(12)), CorruptFile, "holes and overlaps"),
        (file_of(b'{"a":1,"a":2}'), CorruptFile, "the key 'a' is there twice"),
        (file_of({"a": entry("I4")}, bytes(8)), Unsupported, "of dtype 'I4', which is unknown"),
        (file_of({"a": entry("F6_E2M3", [2], 0, 2)}, bytes(2)), CorruptFile, "which takes 1.5"),
        (file_of({"a": entry("F4", [3], 0, 2)}, bytes(2)), CorruptFile, "which takes 1.5"),
        (file_of({"a": entry(["F32"])}, bytes(8)), Unsupported, "is of dtype"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_refused_in_one_line(content: bytes, error: type, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        nibblecast.load(path)
    assert "\n" not in str(raised.value)
    assert "bad.safetensors" in str(raised.value)


@settings(max_examples=300)
@given(data=st.data())
def test_what_the_official_library_refuses_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    entries = data.draw(
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]),
            st.builds(
                entry,
                st.sampled_from(["F32", "U8", "F4", "F6_E3M2", "BF16", "X"]),
                st.lists(st.integers(0, 4), max_size=2),
                st.integers(0, 12),
                st.integers(0, 16),
            ),
            max_size=3,
        )
    )
    content = file_of(entries, bytes(data.draw(st.integers(0, 16))))
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    try:
        safetensors.deserialize(content)
        official = True
    except safetensors.SafetensorError:
        official = False
    try:
        nibblecast.load(path)
        ours = True
    except Error:
        ours = False
    assert ours == official, entries


def test_plain_files_of_the_official_library(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array([True, False]),
        "half": np.linspace(0, 1, 5).astype(np.float16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.uint8),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "plain.safetensors", {"format": "np"})
    model = nibblecast.load(tmp_path / "plain.safetensors")
    assert set(model) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(model[name].numpy(), array, strict=True)
        assert model[name].quantization is None
    assert model.metadata.producer == "np"


def test_a_key_twice_is_found_in_time_in_proportion(tmp_path: Path) -> None:
    """Where it takes the longest: at the end."""

    def make(count: int) -> Callable[[], object]:
        keys = b",".join(b'"%d":1' % key for key in (*range(count), count - 1))
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(file_of(b"{" + keys + b"}"))

        def run() -> None:
            with pytest.raises(CorruptFile, match=f"the key '{count - 1}' is there twice"):
                nibblecast.load(path)

        return run

    assert_linear(make, 4000)


def test_opening_reads_the_header_only(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("F32", [1 << 30], 0, 1 << 32)}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # 4 GiB that take no space: reading them would show
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 32))
    tensor = nibblecast.load(path)["a"]
    assert tensor.shape == (1 << 30,)
    assert next(iter(tensor.parts(4096))).numpy().sum() == 0
