"""C files that are broken, damaged or hostile: one line that says where, never a traceback, never a wrong number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.input.allowance import VARIABLE
from nibblecast.converters.ir import Model, Tensor
from nibblecast.formats.cheader.render import INTERFACE
from tests import zoo
from tests.formats.cheader.c_files import LAYOUTS, damaged, of_array, read, refused, rewritten, write_small
from tests.formats.cheader.c_harness import model_of, write
from tests.formats.cheader.c_zoo import schemes

pytestmark = pytest.mark.slow


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Model]:
    return write_small(tmp_path)


def swapped(old: str, new: str):
    return lambda text: text.replace(old, new)


def added(more: str):
    return lambda text: text + more


def up_to(place: str):
    return lambda text: text[: text.index(place)]


def in_w(change):
    return of_array("m_w_data", change)


def first(array: str, element: str):
    """Another first element in an array."""
    return of_array(array, lambda body: element + "," + body.split(",", 1)[1])


BROKEN_SOURCES = {
    "no table": (up_to("const nibblecast_tensor"), "not written by nibblecast, or not whole"),
    "cut in an array": (up_to("0x"), r"m\.c: line \d+: the elements of m_w_data do not end"),
    "cut in the table": (up_to('"int8",'), r"m\.c: line \d+: the elements of m_tensors do not end"),
    "an element less": (in_w(lambda body: body.partition(",")[2]), "119 elements, but 120 are needed"),
    "an element more": (in_w(lambda body: body + "0x00,\n"), "tensor 'w': .*121 elements, more than the 120"),
    "no hexadecimal": (in_w(lambda body: body[:-4] + "0xZ1,\n"), r"m\.c: tensor 'w': m_w_data holds '.*Z1'"),
    "no comma": (in_w(lambda body: body.replace(",", " ", 1)), "tensor 'w': m_w_data has no comma in"),
    "a sign": (first("m_uint8_data", "-1"), "m_uint8_data holds '-1', which is not an element of uint8"),
    "out of range": (first("m_int8_data", "200"), "m_int8_data holds '200'"),
    "an enormous float": (first("m_float32_data", "1e60"), "m_float32_data holds '1e60'"),
    "text": (first("m_float32_data", '"abc"'), "m_float32_data holds '\"abc\"'"),
    "a call": (first("m_w_data", "f(0x12)"), r"m_w_data holds 'f\(0x12\)'"),
    "braces": (in_w(lambda body: "{" + body + "}"), r"m_w_data holds '\{0x"),
    "nothing": (in_w(lambda body: "\n"), "m_w_data has 120 elements in 1 characters"),
    "an array twice": (added("const uint8_t m_w_data[1] = {0};"), "m_w_data is declared a second time"),
    "two tables": (added("const nibblecast_tensor n_tensors[1] = {{0}};"), "holds the tables m_tensors, n_tensors"),
    "no array": (swapped("        m_w_data,", "        m_x_data,"), "the table names the array m_x_data"),
    "another array": (swapped("        m_w_data,", "        m_w_scale,"), "tensor 'w': m_w_scale is of float"),
    "no data": (swapped("        m_w_data,", "        NULL,"), "tensor 'w': has no data"),
    "no name": (swapped('        "w",', "        0,"), "whose name is not a string"),
    "odd escape": (swapped('        "w",', '        "\\q",'), "escape that is none of C's"),
    "a member less": (swapped("m_w_COUNT,", ""), "less than the 18 members"),
    "a member more": (swapped("m_w_RANK,", "m_w_RANK, 1,"), "more than the 18 members"),
    "an unknown member": (swapped('        "w",', '        .size = "w",'), "more than the 18 members"),
    "nothing between commas": (swapped("m_w_COUNT,", ","), "nothing between two commas"),
    "two values": (swapped("m_w_COUNT,", "m_w_COUNT + 1,"), "whose count is not a number"),
    "no braces": (swapped('    {\n        "w",', '        "w",'), "not an entry in braces"),
    "other count": (swapped("m_w_COUNT,", "239,"), r"tensor 'w': has shape \(6, 40\), but its count is 239"),
    "other rank": (swapped("m_w_RANK,", "3,"), "tensor 'w': has rank 3, but its shape m_w_shape has 2"),
    "huge rank": (swapped("m_w_RANK,", "1000000,"), "tensor 'w': has rank 1000000"),
    "other shape": (swapped("= {6u, 40u}", "= {6u, 41u}"), "tensor 'w': .*m_w_data has 120 elements .*123"),
    "huge shape": (swapped("= {6u, 40u}", "= {600000u, 40000000000u}"), "m_w_data has .*, but 12000"),
    "larger shape": (swapped("= {6u, 40u}", "= {60000000000u, 40000000000u}"), "tensor 'w': .*larger than any memory"),
    "rank of all axes": (swapped("m_w_RANK,", "33,"), "tensor 'w': has rank 33"),
    "no blocks": (swapped("= {1u, 20u}", "= {1u, 0u}"), "tensor 'w': .*at least one"),
    "other grid": (swapped("= {6u, 2u}", "= {6u, 1u}"), r"tensor 'w': scale of shape \(6, 1\)"),
    "granularity": (swapped("m_w_GRANULARITY", "NIBBLECAST_PER_AXIS"), "PER_AXIS, but its blocks are BLOCKWISE"),
    "undefined": (swapped("m_w_BITS", "m_w_BYTE"), "m_w_BYTE is not a number"),
    "table length": (swapped("m_tensors[9]", "m_tensors[8]"), "m_tensors is declared otherwise than in m.c"),
    "open comment": (added("/* and so on"), "a comment is not closed"),
    "open string": (added('const char x[] = "and so on'), "a string is not closed"),
    "open bracket": (added("const char x["), "a bracket is not closed"),
    "empty": (lambda text: "", "not written by nibblecast"),
}


@pytest.mark.parametrize(("change", "pattern"), BROKEN_SOURCES.values(), ids=BROKEN_SOURCES)
def test_broken_sources(written, change, pattern: str) -> None:
    refused(rewritten(written[0], change), CorruptFile, pattern)


BROKEN_HEADERS = {
    "macro": (swapped("m_w_BYTES 120u", "m_w_BYTES 121u"), "m_w_BYTES is 121, but the table says 120"),
    "count": (swapped("TENSOR_COUNT 9u", "TENSOR_COUNT 8u"), "m_TENSOR_COUNT is 8, but the table says 9"),
    "declaration": (swapped("m_w_data[120]", "m_w_data[12]"), "m_w_data is .*: the two files are not of one run"),
    "two values": (added("#define m_w_BITS 8u\n"), "m_w_BITS is not a number, nor a macro that is defined once"),
    "circle": (swapped("m_w_RANK 2u", "m_w_RANK m_w_RANK"), "m_w_RANK is not a number"),
    "another's": (lambda text: "#ifndef X\nint main(void) { return x[3]; }\n", "not written by nibblecast"),
    "binary": (lambda text: "".join(map(chr, range(256))) * 10, r"m\.h"),
    "empty": (lambda text: "", "not written by nibblecast"),
}
OTHER_HEADERS = {
    "interface": (swapped("INTERFACE != ", "INTERFACE != 9"), rf"INTERFACE 9{INTERFACE}; {INTERFACE} is what"),
    "no interface": (swapped("NIBBLECAST_INTERFACE", "X"), "is for NIBBLECAST_INTERFACE None"),
    "kind": (swapped("m_w_KIND NIBBLECAST_SIGNED", "m_w_KIND 99"), "tensor 'w': is of kind 99 with 4 bits"),
}


@pytest.mark.parametrize(("change", "pattern"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_broken_headers(written, change, pattern: str) -> None:
    header = written[0]
    header.write_text(change(header.read_text()), "latin-1")
    refused(header, CorruptFile, pattern)


@pytest.mark.parametrize(("change", "pattern"), OTHER_HEADERS.values(), ids=OTHER_HEADERS)
def test_headers_of_another_version(written, change, pattern: str) -> None:
    header = written[0]
    header.write_text(change(header.read_text()))
    refused(header, Unsupported, pattern)


def test_without_its_source(written) -> None:
    header = written[0]
    header.with_suffix(".c").unlink()
    refused(header, CorruptFile, r"m\.h: its arrays are in m\.c, which is not beside it: copy both files")


def test_elements_that_are_not_in_the_text(written) -> None:
    header, _ = written
    source = header.with_suffix(".c").read_text()
    embedded = of_array("m_w_data", lambda body: '\n#if X\n#embed "m.bin"\n#endif\n')(source)
    header.with_suffix(".c").write_text(embedded)
    refused(header, Unsupported, r'm\.c: .*m_w_data depend on the preprocessor \(#embed "m\.bin"\): .*write it anew')
    without = re.sub(r"NIBBLECAST_BEFORE[^;{]*m_w_data.*?\};", '__asm__(".incbin \\"m.bin\\"");', source, flags=re.S)
    header.with_suffix(".c").write_text(without)
    refused(header, Unsupported, r"m\.c: tensor 'w': the elements of m_w_data are not in m\.c: .*write it anew")


def test_what_indices_may_be(tmp_path: Path) -> None:
    model = zoo.schemes()
    write(model, tmp_path / "m.h")
    source = (tmp_path / "m.c").read_text()
    changed = of_array("m_group_index_group_index", lambda body: body.replace("0x0002", "0x0003", 1))(source)
    (tmp_path / "m.c").write_text(changed)
    refused(tmp_path / "m.h", CorruptFile, r"tensor 'group index': \w+ holds 3; below 3 is needed")
    write(model_of(Tensor.from_array("b", np.array([True, False]))), tmp_path / "m.h")
    rewritten(tmp_path / "m.h", lambda text: text.replace("0x01", "0x02"))
    refused(tmp_path / "m.h", CorruptFile, r"tensor 'b': m_b_data holds 2; below 2 is needed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_text_is_an_error_or_a_model(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(0)
    tensors = [tensor for tensor in schemes().values() if "group index" in tensor.name or "codebook" in tensor.name]
    files = write(model_of(*tensors, *list(zoo.plain().values())[:6]), tmp_path / "w.h", layout=layout)[:2]
    whole = [file.read_bytes() for file in files]
    # not the comments and the functions at the beginning, which say little
    fails = 0
    for case in range(250):
        for file, text in zip(files, whole, strict=True):
            start = text.index(b"#include") if layout == "split" else text.index(b"TENSOR_COUNT ")
            hit = layout == "header" or (case % 2 == 0) == (file.suffix == ".c")
            file.write_bytes(text[:start] + damaged(text[start:], rng) if hit else text)
        try:
            for tensor in read(tmp_path / "w.h").values():
                tensor.dequantize()
        except Error as error:
            fails += 1
            assert str(error)
    assert fails > 100


@pytest.mark.parametrize(
    "text",
    [
        b"/*" * 200_000,
        b'"' * 200_001,
        b"const uint8_t a[" * 50_000,
        b"const uint8_t a[1] = {" * 50_000,
        b"const nibblecast_tensor a_tensors[1] = {" + b"{" * 400_000,
        b"#define a " + b"(" * 400_000 + b"\n",
        b"\\\n" * 200_000,
        b"#" + b"\\" * 400_000,
        b"a " * 400_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_deep_and_long_text_takes_no_long_time(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "w.h").write_bytes(text)
    with pytest.raises(CorruptFile):
        read(tmp_path / "w.h")


def test_text_that_many_rows_read_counts_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of small tensors, all of one large array: each would read all of its text."""
    write(model_of(Tensor.from_array("w", np.zeros(1 << 16, np.uint8))), tmp_path / "m.h")
    source = tmp_path / "m.c"
    text = source.read_text()
    start, stop = text.index("    {", text.index("m_tensors[")), text.rindex("};")
    rows = text[start:stop].rstrip()
    source.write_text(text[:start] + ",\n".join([rows.rstrip(",")] * 20) + "\n" + text[stop:])
    header = tmp_path / "m.h"
    for file in (header, source):
        text = file.read_text().replace("m_tensors[1]", "m_tensors[20]")
        file.write_text(text.replace("m_TENSOR_COUNT 1", "m_TENSOR_COUNT 20"))
    assert len(read(header)) == 20
    monkeypatch.setenv(VARIABLE, "1M")
    with pytest.raises(Unsupported, match="tensor 'w:.': repeats or expands what the file holds"):
        read(header)
