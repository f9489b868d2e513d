"""C files read back: what the writer made, what people make of it, and what is broken."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, VerificationFailed
from nibblecast.converters.interfaces import Reader
from nibblecast.converters.ir import Model, Quantization, Tensor
from nibblecast.converters.storage import InMemory
from nibblecast.formats.cheader.reader import CHeaderReader
from nibblecast.formats.cheader.reading.elements import lines_of
from nibblecast.formats.cheader.reading.source import CONSTANTS
from nibblecast.formats.cheader.reading.table import MEMBERS
from nibblecast.formats.cheader.render import runtime_header
from nibblecast.formats.tflite.reader import TFLiteReader
from tests.formats.cheader.c_files import (
    FIXTURES,
    INT4,
    LAYOUTS,
    assert_read_back,
    of_array,
    read,
    rewritten,
    write_small,
)
from tests.formats.cheader.c_harness import model_of, write
from tests.formats.cheader.c_zoo import HOSTILE_NAMES, ZOO, dtype_of, random_codes, schemes

pytestmark = pytest.mark.slow


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Model]:
    return write_small(tmp_path)


def test_it_is_a_reader(written) -> None:
    reader: Reader = CHeaderReader()
    model = reader.read(written[0])
    assert (model.metadata.format, model.metadata.source) == ("cheader", written[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ZOO, ids=str)
def test_the_zoo(tmp_path: Path, kind: str, layout: str) -> None:
    model = ZOO[kind]()
    write(model, tmp_path / "weights.h", layout=layout)
    assert_read_back(tmp_path / "weights.h", model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_names(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(0)
    model = model_of(*(random_codes(name, (3, 5), dtype_of("int4"), rng) for name in HOSTILE_NAMES))
    write(model, tmp_path / "w.h", layout=layout)
    assert_read_back(tmp_path / "w.h", model)


def test_names_that_c_cut_stay_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long = "ä" * 3000
    write(model_of(*(random_codes(long + end, (3,), dtype_of("int4"), rng) for end in "ab")), tmp_path / "w.h")
    assert list(read(tmp_path / "w.h")) == ["ä" * 2047, "ä" * 2047 + ":1"]


@pytest.mark.parametrize("source", sorted(FIXTURES.glob("*.tflite")), ids=lambda path: path.stem)
def test_every_tflite_fixture_verifies(tmp_path: Path, source: Path) -> None:
    complex_ones = [name for name, tensor in TFLiteReader().read(source).items() if tensor.dtype.kind == "c"]
    skip = [re.sub(r"([*?[])", r"[\1]", name) for name in complex_ones]
    done = nibblecast.convert(source, tmp_path / "w.h", skip=skip, verify=True)
    assert done.verified[tmp_path / "w.h"].equal


def test_on_to_other_formats(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", verify=True)
    nibblecast.convert(tmp_path / "w.h", tmp_path / "w.onnx", tmp_path / "w.safetensors", tmp_path / "v.h", verify=True)
    for name in ("w.onnx", "w.safetensors", "v.h"):
        assert nibblecast.verify(INT4, tmp_path / name).equal
    arrays = [re.findall(r"= \{(.*?)\};", (tmp_path / name).read_text(), re.S) for name in ("w.c", "v.c")]
    assert arrays[0][:-1] != []
    assert [text for text in arrays[0] if "0x" in text] == [text for text in arrays[1] if "0x" in text]


def test_neither_output_may_be_the_input(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.c").symlink_to(tmp_path / "w.c")
    for target in (tmp_path / "w.h", tmp_path / "other" / "w.h"):
        with pytest.raises(nibblecast.Error, match="is both the input and an output"):
            nibblecast.convert(tmp_path / "w.h", target)


def test_every_float_comes_back(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    bits[:4000] %= 1 << 23  # subnormal ones
    bits = bits[np.isfinite(bits.view(np.float32))]
    model = model_of(
        Tensor.from_array("w", bits.view(np.float32)), Tensor.from_array("d", bits[:7000].astype(np.float64) / 3)
    )
    write(model, tmp_path / "w.h")
    again = read(tmp_path / "w.h")
    for name, tensor in model.items():
        assert again[name].packed().tobytes() == tensor.packed().tobytes()


@pytest.mark.parametrize("dtype", ["int4", "uint8", "int8", "int16", "uint32", "int32", "int64", "uint64", "float32"])
def test_any_part_alone(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensor = random_codes("w", (70, 501), dtype_of(dtype), rng)
    if dtype == "float32":
        tensor = Tensor.from_array("w", rng.normal(size=(70, 501)).astype(np.float32))
    write(model_of(tensor), tmp_path / "w.h")
    data, wanted = read(tmp_path / "w.h")["w"].data, tensor.packed()
    for start, stop in [
        (0, 1),
        (0, 0),
        (3, 17),
        (wanted.size - 1, wanted.size),
        *rng.integers(0, wanted.size, (50, 2)),
    ]:
        assert np.array_equal(data.read(int(start), int(stop)), wanted[start:stop])
    parts = [part.packed() for part in read(tmp_path / "w.h")["w"].parts(1000)]
    assert np.array_equal(np.concatenate(parts), wanted)


# reformatted


def without_blanks(body: str) -> str:
    return re.sub(r"\s", "", body)


REFORMATTED = {
    "other line ends": lambda text: text.replace("\n", "\r\n"),
    "no indents": lambda text: re.sub(r"(?m)^ +", "", text),
    "blanks after commas": lambda text: text.replace(",", " ,  "),
    "one element a line": lambda text: text.replace(",", ",\n        "),
    "one line": lambda text: re.sub(r"(?<=[,{])\s*\n\s*(?![^\n]*#)", " ", text),
    "no last comma": lambda text: re.sub(r",\s*\};", "\n};", text),
    "capitals": lambda text: re.sub(r"\b0x[0-9a-f]+u?", lambda m: m[0].upper(), text),
    "decimals": lambda text: re.sub(r"\b0x([0-9a-f]+)(u?)", lambda m: f"{int(m[1], 16)}{m[2]}", text),
    "octals": lambda text: re.sub(r"\b0x([0-9a-f]+)(u?)", lambda m: f"0{int(m[1], 16):o}{m[2]}", text),
    "suffixes": lambda text: re.sub(r"\b0x[0-9a-f]+\b", lambda m: f"{m[0]}UL", text),
    "comments": lambda text: re.sub(r"(?<=,)$", " /* } ; \" */ // '{", text, flags=re.M),
    "comments of one array": of_array("m_w_data", lambda body: body.replace(",\n", ", // */ 0x00, };\n", 1)),
    "comment in a line": of_array("m_w_data", lambda body: body.replace("0x", "/**/0x", 3)),
    "float suffixes": lambda text: re.sub(r"(e[+-]\d\d)f\b", r"\1F", text),
    "hexadecimal floats": of_array(
        "m_float32_data",
        lambda body: ", ".join(float(x[:-1]).hex() + "f" for x in without_blanks(body)[:-1].split(",")),
    ),
    "no lengths": lambda text: re.sub(r"_data\[\d+\]", "_data[]", text),
    "lengths as macros": lambda text: text.replace("m_uint8_data[41]", "m_uint8_data[m_uint8_BYTES]"),
    "words of 32 bits": lambda text: as_words(text, "m_w", 4),
    "words of 64 bits": lambda text: as_words(text, "m_w", 8),
    "words with padding": lambda text: as_words(text, "m_uint8", 4),
    "padding": lambda text: re.sub(
        r"m_uint8_data\[41\]([^{]*\{)(.*?)\};", r"m_uint8_data[44]\1\2 0,0,0\n};", text, flags=re.S
    ),
    "a string": lambda text: as_string(text, "m_w", lambda data: "".join(f"\\{byte:03o}" for byte in data)),
    "a string in lines": lambda text: as_string(
        text, "m_uint8", lambda data: "".join(f'\\x{byte:x}"\n    /* ; */ "' for byte in data)
    ),
    "a string with short escapes": lambda text: as_string(text, "m_uint8", escaped),
    "members by name": lambda text: re.sub(
        r'    \{\n        "w",(.*?)\n    \},',
        lambda m: (
            "{"
            + ", ".join(f".{k} = {v.strip()}" for k, v in zip(MEMBERS, ['"w"', *m[1].split(",")], strict=True))
            + "},"
        ),
        text,
        flags=re.S,
    ),
    "a name in parts": lambda text: text.replace('        "float32",', '        "fl" /* at */ "\\157\\x61"\n"t32",'),
}


def declared_length(header: Path) -> None:
    """Takes the declarations out of the header, which say other lengths."""
    text = header.read_text()
    header.write_text(re.sub(r"extern const [^;]*_data\[[^;]*;\n", "", text))


def bytes_of(text: str, base: str) -> bytes:
    body = re.search(rf"{base}_data\[\w+\][^{{]*\{{(.*?)\}};", text, re.S)
    return bytes(int(literal, 16) for literal in without_blanks(body[1]).strip(",").split(","))


def as_words(text: str, base: str, size: int) -> str:
    data = bytes_of(text, base)
    words = np.frombuffer(data + bytes(-len(data) % size), f"<u{size}")
    lines = "".join(f"    0x{word:0{2 * size}x}u,\n" for word in words.tolist())
    pattern = rf"uint8_t {base}_data\[\w+\]([^{{]*)\{{.*?\}};"
    return re.sub(pattern, rf"uint{8 * size}_t {base}_data[{words.size}]\1{{\n{lines}}};", text, count=1, flags=re.S)


def as_string(text: str, base: str, escape) -> str:
    pattern = rf"({base}_data\[\w+\][^{{]*)\{{.*?\}};"
    literal = f'"{escape(bytes_of(text, base))}"'
    return re.sub(pattern, lambda m: m[1] + literal + ";", text, count=1, flags=re.S)


def escaped(data: bytes) -> str:
    return "".join(
        {10: "\\n", 34: '\\"', 63: "\\?", 92: "\\\\"}.get(b) or (chr(b) if b > 64 else f"\\{b:03o}") for b in data
    )


@pytest.mark.parametrize("change", REFORMATTED.values(), ids=REFORMATTED)
def test_reformatted(written, change) -> None:
    header, model = written
    rewritten(header, change)
    declared_length(header)
    assert_read_back(header, model)


def test_reformatted_headers(written) -> None:
    header, model = written
    text = (
        header.read_text()
        .replace("u\n", "UL /* as it is */\n")
        .replace("#define ", "#  define\t")
        .replace("\n", "\r\n")
    )
    header.write_text(text)
    assert_read_back(header, model)


def test_single_headers_reformatted(tmp_path: Path) -> None:
    model = schemes()
    write(model, tmp_path / "w.h", layout="header")
    text = (tmp_path / "w.h").read_text()
    (tmp_path / "w.h").write_text(re.sub(r"(?m)(?<=,)$", " // one", text).replace("    ", "\t").replace("\n", "\r\n"))
    assert_read_back(tmp_path / "w.h", model)


def test_the_lines_of_the_writer_take_the_fast_path(written) -> None:
    header, _ = written
    for tensor in read(header).values():
        assert lines_of(tensor.data.array).count == tensor.data.length


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("count", [1, 19, 20, 21, 40, 41])
def test_lines_of_octal_escapes_take_the_fast_path(tmp_path: Path, count: int, ending: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, count, np.uint8)
    write(model_of(Tensor.from_array("w", data)), tmp_path / "m.h")
    declared_length(tmp_path / "m.h")
    lines = ["".join(f"\\{byte:03o}" for byte in data[start : start + 20]) for start in range(0, count, 20)]
    text = "".join(f'    "{line}"{ending}' for line in lines)
    text = text.replace("\\", r"\\")
    change = rf"m_w_data[{count + 1}]\1= {ending}{text};"  # with room for the NUL
    pattern = r"m_w_data\[\d+\]([^=]*)= \{[^}]*\};"
    rewritten(tmp_path / "m.h", lambda whole: re.sub(pattern, change, whole, count=1))
    data_again = read(tmp_path / "m.h")["w"].data
    assert data_again.lines is not None
    assert data_again.lines.count == count
    for start in range(0, count, 7):
        assert np.array_equal(data_again.read(start, min(count, start + 9)), data[start : start + 9])
    rewritten(tmp_path / "m.h", lambda whole: whole.replace('    "\\', '    "\\4', 1))
    with pytest.raises(CorruptFile, match="tensor 'w': m_w_data has an escape"):
        read(tmp_path / "m.h")["w"].packed()


# edited


def test_an_edited_digit_is_shown(tmp_path: Path) -> None:
    nibblecast.convert(INT4, tmp_path / "w.h", verify=True)
    rewritten(tmp_path / "w.h", lambda text: text.replace("0x97,0xf1,", "0x97,0xe1,"))
    comparison = nibblecast.verify(INT4, tmp_path / "w.h")
    assert [str(difference) for difference in comparison.differences] == [
        "cnn_1/depthwise_1/depthwise: codes differ: (0, 0, 0, 3) -1 against -2"
    ]
    rewritten(tmp_path / "w.h", lambda text: text.replace("0x97,0xe1,", "0x97,0xf1,"))
    rewritten(tmp_path / "w.h", lambda text: text.replace("7.256724e-02f", "7.256725e-02f"))
    (difference,) = nibblecast.verify(INT4, tmp_path / "w.h").differences
    assert (difference.kind, difference.count) == ("scale", 1)


def test_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nibblecast", *map(str, arguments)], capture_output=True, text=True
        )

    done = run("convert", INT4, tmp_path / "w.h", "--verify")
    assert f"verified {tmp_path / 'w.h'}: 7 tensors, 471 elements, 3 of the tensors code for code" in done.stdout
    assert run("verify", INT4, tmp_path / "w.h").stdout.startswith("equal: 7 tensors")
    rewritten(tmp_path / "w.h", lambda text: text.replace("0x97,0xf1,", "0x97,0xe1,"))
    done = run("verify", INT4, tmp_path / "w.h")
    assert done.returncode == 6
    assert "-1 against -2" in done.stdout
    rewritten(tmp_path / "w.h", lambda text: text.replace("0x97,0xe1,", "0x97,0xg1,"))
    done = run("verify", INT4, tmp_path / "w.h")
    assert done.returncode == 3
    assert re.fullmatch(
        r"nibblecast: .*w\.c: tensor 'cnn_1/depthwise_1/depthwise': w_\w+_data holds '0xg1'.*\n", done.stderr
    )


def test_what_the_writer_gets_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecast.formats.cheader import arrays

    monkeypatch.setattr(arrays, "_stored", lambda dtype, part: part.packed().view(dtype) ^ 1)
    with pytest.raises(VerificationFailed, match="is not written, because reading it back gave something else"):
        nibblecast.convert(FIXTURES / "mlp_int4_per_tensor.tflite", tmp_path / "w.h", only=["*MatMul*"], verify=True)


# what it costs


def test_only_what_is_asked_for_is_held(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = InMemory(rng.integers(0, 256, 1 << 22, dtype=np.uint8))
    scale = Tensor.from_array("scale", rng.normal(0, 1, (2048, 128)).astype(np.float32))
    quantization = Quantization(scale, (1, 32))
    tensor = Tensor("w", (2048, 4096), np.dtype(ml_dtypes.int4), codes, quantization)
    write(model_of(tensor, replace(tensor, name="v")), tmp_path / "m.h")
    tracemalloc.start()
    model = read(tmp_path / "m.h")
    _, opened = tracemalloc.get_traced_memory()
    for one in model.values():
        for part in one.parts(1 << 18):
            part.packed()
            part.quantization.scale.packed()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 1 << 20
    assert peak < 8 << 20


# what it shares with the templates


def test_members_are_those_of_the_runtime_header() -> None:
    struct = re.search(r"typedef struct nibblecast_tensor \{(.*?)\}", runtime_header(), re.S)
    members = re.sub(r"/\*.*?\*/", "", struct[1])
    assert tuple(re.findall(r"(\w+);", members)) == MEMBERS


def test_constants_are_those_of_the_runtime_header() -> None:
    above_the_table = runtime_header().partition("typedef struct")[0]
    defined = re.findall(
        r"^#define (NIBBLECAST_\w+) (\d+)u? +/\*|^#define (NIBBLECAST_FLOAT\w+) (\d+)$", above_the_table, re.M
    )
    numbers = {a or c: int(b or d) for a, b, c, d in defined}
    assert {name.decode(): number for name, number in CONSTANTS.items()} == numbers


@pytest.mark.parametrize("style", ["bytes", "words32", "words64", "string"])
def test_truth_values_in_words(tmp_path: Path, style: str) -> None:
    """Each must be 0 or 1, which is no limit for the word that it lies in."""
    write(model_of(Tensor.from_array("w", np.arange(13) % 3 == 1)), tmp_path / "m.h", style=style)
    assert read(tmp_path / "m.h")["w"].numpy().tolist() == (np.arange(13) % 3 == 1).tolist()


def test_no_truth_values_in_words(tmp_path: Path) -> None:
    write(model_of(Tensor.from_array("w", np.ones(8, np.bool_))), tmp_path / "m.h", style="words64")
    rewritten(tmp_path / "m.h", lambda text: text.replace("0x0101010101010101u", "0x0101010201010101u"))
    with pytest.raises(CorruptFile, match="m_w_data holds 2; below 2 is needed"):
        read(tmp_path / "m.h")["w"].packed()
