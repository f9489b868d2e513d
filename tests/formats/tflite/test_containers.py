""".task and .litertlm files."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.storage import FileRange
from tests.formats.tflite.models import (
    FIXTURES,
    Load,
    fixture,
    serialize,
    table,
)

WEIGHTS = "external_buffer.weights.bin"


@pytest.mark.parametrize("name", ["container.litertlm", "container.task"])
def test_a_container_of_one_model_reads_as_the_model(name: str) -> None:
    loaded, plain = nibblecast.load(FIXTURES / name), nibblecast.load(FIXTURES / "mlp_int4_per_tensor.tflite")
    assert list(loaded) == list(plain)
    for each, expected in zip(loaded.values(), plain.values(), strict=True):
        assert np.array_equal(each.packed(), expected.packed())
        assert np.array_equal(each.dequantize(), expected.dequantize())


def test_data_of_a_container_lie_inside_its_section() -> None:
    path = FIXTURES / "container.litertlm"
    inside = fixture("mlp_int4_per_tensor.tflite")
    assert path.read_bytes()[16384 : 16384 + len(inside)] == inside
    for each in nibblecast.load(path).values():
        assert isinstance(each.data, FileRange)
        assert each.data.offset > 16384


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


ODD, FLOAT, OFFSET = (fixture(f"{name}.tflite") for name in ("mlp_int4_odd", "mlp_float32", "buffer_offset"))


def test_the_tensors_of_several_models_have_their_models_names_before_theirs(load: Load) -> None:
    loaded = load(zipped({"one": ODD, "note.txt": b"hello", "dir/two": OFFSET}), "models.task")
    expected = {}
    for prefix, name in (("one", "mlp_int4_odd"), ("dir/two", "buffer_offset")):
        own = nibblecast.load(FIXTURES / f"{name}.tflite")
        expected |= {f"{prefix}/{key}": each.dequantize() for key, each in own.items()}
    assert list(loaded) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(loaded[name].dequantize(), values)
        assert loaded[name].name == name
    assert loaded.metadata.operators["FULLY_CONNECTED"] == 4


def test_a_compressed_model_is_refused(load: Load) -> None:
    with pytest.raises(Unsupported, match=r"holds 'm\.tflite' compressed: unzip it"):
        load(zipped({"m.tflite": ODD}, zipfile.ZIP_DEFLATED), "m.task")


@pytest.mark.parametrize("members", [{}, {"note.txt": b"no model"}, {"short": b"TFL"}, {"empty": b""}])
def test_a_zip_without_a_model_is_refused(load: Load, members: dict[str, bytes]) -> None:
    content = zipped({"filler": b"12345678"} | members)
    with pytest.raises(Unsupported, match="is a container without a TFLite model"):
        load(content, "m.task")


@pytest.mark.parametrize("size", [4, 30, 31, 200, 2100, 2168])
def test_a_truncated_zip_is_refused(load: Load, size: int) -> None:
    with pytest.raises(CorruptFile, match="is a damaged ZIP archive"):
        load(fixture("container.task")[:size], "m.task")


def test_a_zip_whose_members_lie_elsewhere_is_refused(load: Load) -> None:
    content = bytearray(fixture("container.task"))
    entry = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, entry + 42, 8)  # the first member's local header
    with pytest.raises(CorruptFile, match="has no local header for its member 'TF_LITE_PREFILL_DECODE'"):
        load(bytes(content), "m.task")


def test_models_that_overlap_in_a_container_are_refused(load: Load) -> None:
    content = bytearray(zipped({"a": ODD, "b": ODD}))
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    struct.pack_into("<I", content, second + 42, 0)  # both members at the first one's place
    assert len(load(bytes(content), "two.task")) == 8  # no more than the file could hold
    three = bytearray(zipped({"a": ODD, "b": ODD, "c": b""}))
    entries = [place for place in range(len(three)) if three[place : place + 4] == b"PK\x01\x02"]
    for entry in entries:
        three[entry + 20 : entry + 28] = struct.pack("<II", len(ODD), len(ODD))
        struct.pack_into("<I", three, entry + 42, 0)
    with pytest.raises(CorruptFile, match="whose models overlap"):
        load(bytes(three), "three.task")


def litertlm(sections: Sequence[tuple[str, int, int, int]], payload: bytes, header_end: int | None = None) -> bytes:
    """A .litertlm container; sections are (model type, kind, begin, end), with places counted from the payload."""
    from nibblecast.formats.tflite import containers

    def header(base: int) -> bytes:
        objects = [
            table(
                containers._SectionObject,
                items=[
                    table(
                        containers._KeyValuePair,
                        key="model_type",
                        value_type=np.uint8(9),
                        string_value=table(containers._StringValue, value=model_type),
                    )
                ],
                begin_offset=np.uint64((base + begin) % 2**64),
                end_offset=np.uint64((base + end) % 2**64),
                data_type=np.int8(kind),
            )
            for model_type, kind, begin, end in sections
        ]
        metadata = table(containers._SectionMetadata, objects=objects)
        return serialize(table(containers._Header, section_metadata=metadata), b"    ")

    base = 32 + len(header(0))
    end = base if header_end is None else header_end
    return b"LITERTLM" + struct.pack("<IIIIQ", 1, 5, 0, 0, end) + header(base) + payload


MODEL, WEIGHTS_SECTION = 3, 7


def test_the_models_of_a_litertlm_are_named_by_their_types(load: Load) -> None:
    middle, end = len(ODD), len(ODD) + len(FLOAT)
    content = litertlm([("tf_lite_embedder", MODEL, 0, middle), ("", MODEL, middle, end)], ODD + FLOAT)
    loaded = load(content, "m.litertlm")
    assert {name.split("/")[0] for name in loaded} == {"tf_lite_embedder", "section1"}
    assert len(loaded) == 8


def test_a_section_of_weights_holds_its_models_external_buffers(load: Load) -> None:
    inner, weights = fixture("external_buffer.tflite"), fixture(WEIGHTS)
    end = len(inner) + len(weights)
    sections = [("t", MODEL, 0, len(inner)), ("t", WEIGHTS_SECTION, len(inner), end)]
    loaded = load(litertlm(sections, inner + weights), "m.litertlm")
    plain = nibblecast.load(FIXTURES / "mlp_int4_per_tensor.tflite")
    assert {name: each.dequantize().tolist() for name, each in loaded.items()} == {
        name: each.dequantize().tolist() for name, each in plain.items()
    }


def test_a_litertlm_without_a_model_is_refused(load: Load) -> None:
    with pytest.raises(Unsupported, match="is a container without a TFLite model"):
        load(litertlm([("t", 5, 0, 8)], bytes(8)), "m.litertlm")


@pytest.mark.parametrize(("begin", "end"), [(0, 10**6), (8, 0), (-(10**9), 8), (10**6, 10**6 + 8)])
def test_a_section_outside_the_file_is_refused(load: Load, begin: int, end: int) -> None:
    with pytest.raises(CorruptFile, match="lie outside the file"):
        load(litertlm([("t", MODEL, begin, end)], ODD), "m.litertlm")


def test_sections_that_overlap_are_refused(load: Load) -> None:
    with pytest.raises(CorruptFile, match="whose models overlap"):
        load(litertlm([("t", MODEL, 0, len(ODD))] * 3, ODD), "m.litertlm")


def test_a_name_of_a_section_without_end_is_refused(load: Load) -> None:
    sections = [("n" * 5000, MODEL, 0, len(ODD)), ("b", MODEL, len(ODD), 2 * len(ODD))]
    with pytest.raises(CorruptFile, match="a section with a name of more than 1024 characters"):
        load(litertlm(sections, ODD + ODD), "m.litertlm")


@pytest.mark.parametrize("end", [0, 32, 2**20, 2**64 - 1])
def test_an_impossible_end_of_the_litertlm_header_is_refused(load: Load, end: int) -> None:
    with pytest.raises(CorruptFile, match=f"has a .litertlm header that ends at byte {end} of"):
        load(litertlm([("t", MODEL, 0, len(ODD))], ODD, header_end=end), "m.litertlm")


@pytest.mark.parametrize("size", [8, 31, 33, 100, 16384, 16400])
def test_a_truncated_litertlm_is_refused(load: Load, size: int) -> None:
    with pytest.raises(CorruptFile, match=r"truncated|lie outside the file|damaged"):
        load(fixture("container.litertlm")[:size], "m.litertlm")
