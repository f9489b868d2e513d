"""C whose data lie in a .bin file, read back: whole, damaged, and hostile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported, UsageError
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.reading.payload import StoredData
from nibblecast.formats.tflite.reader import TFLiteReader
from tests.formats.cheader.c_files import FIXTURES, INT4, assert_read_back, damaged, read, refused, write_small
from tests.formats.cheader.c_harness import model_of, plan_of, write
from tests.formats.cheader.c_zoo import dtype_of, random_codes

pytestmark = pytest.mark.slow

STYLES = ("incbin", "embed")
#: Styles and the layouts that they have, and the file of the text that says where elements lie.
LAYOUTS = (("incbin", "split", "m.c"), ("embed", "split", "m.c"), ("embed", "header", "m.h"))


@pytest.fixture(params=LAYOUTS, ids=" ".join)
def written(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The file that names m.bin; the header is m.h, and its first tensor 'w' of int4."""
    style, layout, source = request.param
    write_small(tmp_path, style=style, layout=layout)
    return tmp_path / source


@pytest.mark.parametrize("source", sorted(FIXTURES.glob("*.tflite")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("style", "layout", "_"), LAYOUTS)
def test_every_tflite_fixture_verifies(tmp_path: Path, source: Path, style: str, layout: str, _: str) -> None:
    complex_ones = [name for name, tensor in TFLiteReader().read(source).items() if tensor.dtype.kind == "c"]
    skip = [re.sub(r"([*?[])", r"[\1]", name) for name in complex_ones]
    done = nibblecast.convert(source, tmp_path / "w.h", skip=skip, verify=True, style=style, layout=layout)
    assert done.verified[tmp_path / "w.h"].equal


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "options", [{"packing": "rows"}, {"packing": "unpacked"}, {"nibble_order": "high"}, {"tail_padding": True}], ids=str
)
def test_packings(tmp_path: Path, style: str, options: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    dtypes = ("int2", "uint4", "int4", "int8")
    model = model_of(*(random_codes(name, (3, 70, 13), dtype_of(name), rng) for name in dtypes))
    write(model, tmp_path / "m.h", style=style, **options)
    assert_read_back(tmp_path / "m.h", model)


def test_small_models(written: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _, model = write_small(tmp_path / "other")
    assert_read_back(tmp_path / "m.h", model)


@pytest.mark.parametrize("style", STYLES)
def test_bytes_are_mapped_where_they_lie(tmp_path: Path, style: str) -> None:
    weight = random_codes("w", (7, 33), dtype_of("int4"), np.random.default_rng(0))
    write(model_of(Tensor.from_array("a", np.arange(5, dtype=np.uint8)), weight), tmp_path / "m.h", style=style)
    data = read(tmp_path / "m.h")["w"].data
    assert isinstance(data, StoredData)
    assert (data.file.path, data.offset, data.nbytes) == (tmp_path / "m.bin", 16, weight.nbytes)
    assert np.shares_memory(data.read(0, 5), data.file.view)


@pytest.mark.parametrize("style", STYLES)
def test_on_to_other_formats(tmp_path: Path, style: str) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", style=style)
    nibblecast.convert(tmp_path / "w.h", tmp_path / "w.onnx", tmp_path / "w.safetensors", tmp_path / "v.h", verify=True)
    for name in ("w.onnx", "w.safetensors", "v.h"):
        assert nibblecast.verify(INT4, tmp_path / name).equal


def test_an_edited_byte_is_shown(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", style="incbin")
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    (difference,) = nibblecast.verify(INT4, tmp_path / "w.h").differences
    assert (difference.kind, difference.count) == ("codes", 1)


@pytest.mark.parametrize("style", STYLES)
def test_the_payload_may_be_no_output(tmp_path: Path, style: str) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", style=style)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(Error, match="is both the input and an output"):
        nibblecast.convert(tmp_path / "w.h", tmp_path / "other" / "w.h", style=style)


def test_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nibblecast", *map(str, arguments)], capture_output=True, text=True
        )

    done = run("convert", INT4, tmp_path / "w.h", "--opt", "style=incbin", "--verify")
    assert f"verified {tmp_path / 'w.h'}: 7 tensors, 471 elements, 3 of the tensors code for code" in done.stdout
    (tmp_path / "w.bin").unlink()
    done = run("verify", INT4, tmp_path / "w.h")
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(
        r"nibblecast: .*w\.bin: tensor '.*': does not exist; the elements of \w+ lie in it: copy it beside w\.c\n",
        done.stderr,
    )


# reformatted


REFORMATTED = {
    "blanks": lambda text: re.sub(r"(?<=[(,)])|(?=[(,)])", "  ", text),
    "comments": lambda text: re.sub(r'(limit|"m_w_data",)', r"\1 /* ) */", text),
    "other line ends": lambda text: text.replace("\n", "\r\n"),
    "the file's name itself": lambda text: re.sub(r"(?<=[ ,])m_BIN(?=[ ,])(?! \")", '"m.bin"', text),
    "the file by another macro": lambda text: text.replace('m_BIN "m.bin"', 'm_BIN (FILE)\n#define FILE "m.bin"'),
    "the clang line only": lambda text: re.sub(r"#if defined\(__clang__\)\n(#embed.*\n)#else\n.*\n#endif", r"\1", text),
    "lengths left out": lambda text: re.sub(r"(int8_t \w+)\[\d+\]", r"\1[]", text),
}


@pytest.mark.parametrize("change", REFORMATTED.values(), ids=REFORMATTED)
def test_reformatted(written: Path, tmp_path: Path, change) -> None:
    (tmp_path / "other").mkdir()
    _, model = write_small(tmp_path / "other")
    for path in {written, tmp_path / "m.h"}:
        path.write_bytes(change(path.read_text()).encode())
    assert_read_back(tmp_path / "m.h", model)


# damaged and hostile


def rename(location: str):
    return lambda text: text.replace('m_BIN "m.bin"', f'm_BIN "{location}"')


#: What may be said of the file; the pattern of the error.
LOCATIONS = {
    "/etc/passwd": r"m\.[ch]: tensor 'w': refers to '/etc/passwd': it must be the path of a file inside its folder",
    "../m.bin": "refers to '../m.bin': it must be the path of a file inside",
    "a/../../m.bin": "the path of a file inside",
    "..\\\\m.bin": "the path of a file inside",
    "C:\\\\m.bin": "the path of a file inside",
    "//host/m.bin": "the path of a file inside",
    "": "the path of a file inside",
    ".": "the path of a file inside",
    "m\\0.bin": "the path of a file inside",
    "n.bin": "n.bin: tensor 'w': does not exist; the elements of m_w_data lie in it: copy it beside",
    "folder": "folder: tensor 'w': cannot be read: Is a directory; the elements of m_w_data",
    "a/b/m.bin": "does not exist",
    "x" * 5000: "x: tensor 'w': cannot be read",
    "\\xff\\xfe": "does not exist",
    "link.bin": "link.bin: tensor 'w': is a link out of the folder",
    "linked/m.bin": "m.bin: tensor 'w': is a link out of the folder",
    "loop.bin": "cannot be found|does not exist|cannot be read",
}


@pytest.mark.parametrize(("location", "pattern"), LOCATIONS.items(), ids=[name[:20] for name in LOCATIONS])
def test_only_files_of_the_folder_are_read(written: Path, tmp_path_factory, location: str, pattern: str) -> None:
    folder = written.parent
    outside = tmp_path_factory.mktemp("outside")
    (outside / "m.bin").write_bytes((folder / "m.bin").read_bytes())
    (folder / "folder").mkdir()
    (folder / "link.bin").symlink_to(outside / "m.bin")
    (folder / "linked").symlink_to(outside)
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    written.write_text(rename(location)(written.read_text()))
    refused(folder / "m.h", CorruptFile, pattern)


def test_files_in_the_folder_may_be_links_and_lie_deeper(written: Path) -> None:
    folder = written.parent
    (folder / "data").mkdir()
    (folder / "m.bin").rename(folder / "data" / "0.bin")
    (folder / "data" / "m.bin").symlink_to("0.bin")
    written.write_text(rename("data/m.bin")(written.read_text()))
    assert read(folder / "m.h")["w"].codes().shape == (6, 40)


def test_truncated_payload(written: Path) -> None:
    payload = written.parent / "m.bin"
    whole = payload.read_bytes()
    for nbytes in (len(whole) - 1, 100, 0):
        payload.write_bytes(whole[:nbytes])
        refused(written.parent / "m.h", CorruptFile, r"m\.bin: tensor '\w+': data at bytes .*: it is truncated")
    payload.unlink()
    refused(written.parent / "m.h", CorruptFile, r"m\.bin: tensor 'w': does not exist")
    payload.mkdir()
    refused(written.parent / "m.h", CorruptFile, r"m\.bin: tensor 'w': cannot be read: Is a directory")


#: The place of 'w' is 120 bytes at 0; N and O stand for the number in the text, incbin's and embed's.
DAMAGED = {
    "longer": (("limit(120)", "limit(121)"), ('"0", "120"', '"0", "121"'), "has 121 bytes of a file and is declared"),
    "shorter": (("limit(120)", "limit(119)"), ('"0", "120"', '"0", "119"'), "119 bytes .*but 120 are needed"),
    "far": (("offset(0)", "offset(99999)"), ('"0", "120"', '"99999", "120"'), "lie outside the file"),
    "huge": (("offset(0)", f"offset({1 << 63})"), ('"0", "120"', f'"{1 << 63}", "120"'), "lie outside the file"),
    "negative": (("offset(0)", "offset(-1)"), ('"0", "120"', '"-1", "120"'), "-1 is not a number|preprocessor"),
    "no number": (("limit(120)", "limit(m_BIN)"), ('"0", "120"', '"0", "m_BIN"'), "m_BIN is not a number"),
    "no file": (("#embed m_BIN", "#embed m_BYTES"), ("m_BIN, ", "m_BYTES, "), "m_BYTES is not a string"),
    "a number": (("#embed m_BIN", "#embed 12"), ("m_BIN, ", "12, "), "12 is not a string"),
}


@pytest.mark.parametrize(("embed", "incbin", "pattern"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_places(written: Path, embed: tuple[str, str], incbin: tuple[str, str], pattern: str) -> None:
    text = written.read_text()
    old, new = embed if "#embed" in text else incbin
    assert old in text
    written.write_text(text.replace(old, new))
    refused(written.parent / "m.h", Error, pattern)


EMBEDS = {
    "of two files": lambda text: text.replace("#embed m_BIN", '#embed "n.bin"', 1),
    "of two places": lambda text: text.replace("clang::offset(0)", "clang::offset(16)", 1),
    "with more": lambda text: text.replace("clang::offset(0)", "clang::offset(0) suffix(,)"),
    "and elements": lambda text: text.replace("#endif\n};", "#endif\n0\n};", 1),
    "and a directive": lambda text: text.replace("#endif\n};", "#endif\n#undef x\n};", 1),
    "of all": lambda text: text.replace("limit(120) ", ""),
    "without a file": lambda text: text.replace("#embed m_BIN", "#embed"),
    "nowhere": lambda text: re.sub(r"#embed.*\n", "", text),
}


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("change", EMBEDS.values(), ids=EMBEDS)
def test_what_the_preprocessor_would_choose(tmp_path: Path, change, layout: str) -> None:
    write_small(tmp_path, style="embed", layout=layout)
    path = tmp_path / ("m.c" if layout == "split" else "m.h")
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    refused(tmp_path / "m.h", Unsupported, r"m_w_data depend on the preprocessor \(#\w+.*\): .*write it anew")


INCBINS = {
    "twice": (lambda text: text + 'NIBBLECAST_INCBIN("m_w_data", m_BIN, "0", "1", 1)', "is read from a file a second"),
    "written out too": (
        lambda text: text + "const uint8_t m_w_data[120] = {0};",
        "m_w_data is read from a file, and written out as well",
    ),
    "cut": (lambda text: text + "NIBBLECAST_INCBIN(", "NIBBLECAST_INCBIN takes an array"),
    "cut earlier": (lambda text: text + "NIBBLECAST_INCBIN", "NIBBLECAST_INCBIN takes an array"),
    "a number less": (lambda text: text.replace('"0", "120"', '"0"'), "NIBBLECAST_INCBIN takes an array"),
    "others": (lambda text: text.replace('INCBIN("m_w_data', 'INCBIN("m_v_data'), "m_w_data are not in m.c"),
}


@pytest.mark.parametrize(("change", "pattern"), INCBINS.values(), ids=INCBINS)
def test_what_the_assembler_would_read(tmp_path: Path, change, pattern: str) -> None:
    write_small(tmp_path, style="incbin")
    text = (tmp_path / "m.c").read_text()
    assert change(text) != text
    (tmp_path / "m.c").write_text(change(text))
    refused(tmp_path / "m.h", Error, pattern)


def test_wide_elements_are_no_bytes_of_a_file(tmp_path: Path) -> None:
    write(model_of(Tensor.from_array("w", np.zeros(4, np.uint8))), tmp_path / "m.h", style="incbin")
    for name in ("m.h", "m.c"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("uint8_t m_w_data[4]", "uint32_t m_w_data[1]"))
    refused(tmp_path / "m.h", CorruptFile, "m_w_data is of uint32_t, but its bytes lie in a file")


@pytest.mark.parametrize("style", STYLES)
def test_what_bytes_may_be(tmp_path: Path, style: str) -> None:
    write(model_of(Tensor.from_array("b", np.array([True, False]))), tmp_path / "m.h", style=style)
    (tmp_path / "m.bin").write_bytes(b"\1\2")
    refused(tmp_path / "m.h", CorruptFile, r"m\.bin: tensor 'b': m_b_data holds 2; below 2 is needed")
    write(model_of(Tensor.from_array("b", np.zeros(3, np.int8))), tmp_path / "m.h", style=style, tail_padding=True)
    (tmp_path / "m.bin").write_bytes(b"\1\1\1\1" + bytes(12))
    refused(tmp_path / "m.h", CorruptFile, r"m\.bin: tensor 'b': m_b_data holds more than the 3 elements")


@pytest.mark.parametrize(
    "line",
    [
        "#embed " + "a" * 200_000,
        "#embed" + " " * 200_000 + "x",
        "#embed m_BIN limit(" + "1" * 200_000 + ")",
        "#embed m_BIN limit(1)" + " clang::" * 50_000,
        "#embed m_BIN limit(1) offset(1)\n" * 20_000,
    ],
    ids=lambda line: repr(line[:25]),
)
def test_long_directives_take_no_long_time(tmp_path: Path, line: str) -> None:
    write_small(tmp_path, style="embed")
    text = (tmp_path / "m.c").read_text()
    (tmp_path / "m.c").write_text(re.sub(r"(?m)^#embed.*", line, text, count=1))
    refused(tmp_path / "m.h", Error, "")


def test_damaged_text_is_an_error_or_a_model(written: Path) -> None:
    """What is damaged are the lines that say where data lie, those around them, and the macro of the file."""
    rng = np.random.default_rng(0)
    text = written.read_bytes()
    start = text.index(b'm_BIN "m.bin"')
    stop = text.index(b"m_w_scale", start)
    fails = 0
    for _ in range(150):
        written.write_bytes(text[:start] + damaged(text[start:stop], rng) + text[stop:])
        try:
            for tensor in read(written.parent / "m.h").values():
                tensor.dequantize()
        except Error as error:
            fails += 1
            assert "\n" not in str(error)
    assert fails > 10


# the model file as an array


@pytest.mark.parametrize("style", ["bytes", "string", *STYLES])
def test_a_model_file_is_read_from_the_original(tmp_path: Path, style: str) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", model_array="only", style=style)
    refused(tmp_path / "w.h", Unsupported, r"w\.c: holds a model file as the array w_model, and no tensors: read that")


@pytest.mark.parametrize("style", ["bytes", *STYLES])
def test_tensors_beside_a_model_file(tmp_path: Path, style: str) -> None:
    done = nibblecast.convert(INT4, tmp_path / "w.h", model_array="also", style=style, verify=True)
    assert done.verified[tmp_path / "w.h"].equal


@pytest.mark.parametrize(("style", "layout"), [("incbin", "split"), ("embed", "split"), ("embed", "header")])
def test_names_that_compilers_look_for(tmp_path: Path, style: str, layout: str) -> None:
    model = model_of(Tensor.from_array("w", np.zeros(4, np.uint8)))
    for name in ("é.h", 'a"b.h', "a\\b.h"):
        with pytest.raises(UsageError, match="letters of ASCII are needed$"):
            plan_of(model, tmp_path / name, style=style, layout=layout)
