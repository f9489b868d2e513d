"""Options of arrays: alignment, sections, tail padding, C90, the longest array; and values that none of them takes."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import ExitCode, RefusedLoss, UsageError
from nibblecast.converters.interfaces import Size
from nibblecast.converters.ir import Quantization, Tensor, per_axis
from nibblecast.converters.options import describe, parse
from nibblecast.formats.cheader.options import CHeaderOptions
from tests.formats.cheader.c_files import LAYOUTS, assert_read_back
from tests.formats.cheader.c_harness import (
    C_WARNINGS,
    MODES,
    WARNINGS,
    assert_same_values,
    compile_objects,
    model_of,
    plan_of,
    run,
    walked,
    write,
)
from tests.formats.cheader.c_zoo import (
    ZOO,
    dtype_of,
    int8,
    plain_values,
    quantized_integers,
    random_codes,
    schemes,
    weight,
)
from tests.tools import need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "fixtures" / "tflite"
RNG = np.random.default_rng(0)


ODD_BYTES = model_of(*(int8(name, 3) for name in "abcdefgh"), Tensor.from_array("wide", np.arange(3, dtype=np.int64)))


def symbols(objects):
    """Section and address of each symbol."""
    listed = subprocess.run(["objdump", "-tC", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) .{7} (\S+)\s+[0-9a-f]+ (?:\.hidden )?(\S+)$", listed, re.MULTILINE)
    return {name: (section, int(address, 16)) for address, section, name in found}


# alignment


@pytest.mark.parametrize("align", [1, 4, 64, 4096])
@pytest.mark.parametrize("mode", ["gcc c99", "g++ c++17", "clang c11"])
def test_alignment(tmp_path, mode, align):
    assert_same_values(walked(mode, write(ODD_BYTES, tmp_path / "m.h", align=align), "m"), ODD_BYTES)
    found = symbols(compile_objects(mode, [tmp_path / "m.c"]))
    addresses = sorted(found[f"m_{name}_data"][1] for name in "abcdefgh")
    assert {b - a for a, b in pairwise(addresses)} == {max(3, align)}
    assert found["m_wide_data"][1] % max(8, align) == 0


def test_models_of_different_alignments(tmp_path):
    write(ODD_BYTES, tmp_path / "one.h", align=64)
    write(ODD_BYTES, tmp_path / "two.h", align=4)
    program = tmp_path / "main.c"
    program.write_text(
        '#include "one.h"\n#include "two.h"\n#include <stdio.h>\n'
        'int main(void) { printf("%d %d", one_ALIGN, two_ALIGN); return 0; }\n'
    )
    sources = [program, tmp_path / "one.c", tmp_path / "two.c"]
    assert run("gcc c99", compile_objects("gcc c99", sources)) == "64 4"
    assert run("gcc c99", compile_objects("gcc c99", sources, "-DNIBBLECAST_ALIGN=32")) == "32 32"


def test_flash_and_offsets_follow_the_alignment(tmp_path):
    for align, total in ((4, 8 * 4), (32, 8 * 32)):
        plan = plan_of(model_of(*(int8(name, 3) for name in "abcdefgh")), tmp_path / "m.h", align=align)
        assert plan.shards[0].document.flash.total.aligned == total
    *_, file = write(ODD_BYTES, tmp_path / "m.h", align=32, style="incbin")
    stored, first = file.read_bytes(), (tmp_path / "m.h").read_text()
    assert len(stored) == 7 * 32 + 3
    assert stored[3:32] == bytes(29)
    assert "data begin at multiples of 32" in first


@pytest.mark.parametrize("align", [0, -4, 3, 24, 8192, 1 << 80])
def test_impossible_alignments(tmp_path, align):
    with pytest.raises(UsageError, match=rf"^align={align}: a power of two from 1 to 4096 is needed"):
        plan_of(model_of(), tmp_path / "m.h", align=align)


# sections


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_section(tmp_path, mode, layout):
    model = schemes()
    files = write(model, tmp_path / "m.h", section=".qspi_rodata", layout=layout, tail_padding=True)
    assert_same_values(walked(mode, files, "m"), model)
    found = symbols(tmp_path.glob("*.o"))
    arrays = {name: section for name, (section, _) in found.items() if re.search(r"m_.*_(data|scale|codebook)$", name)}
    assert len(arrays) > 20
    assert set(arrays.values()) == {".qspi_rodata"}
    assert found["m_tensors"][0] != ".qspi_rodata"


@pytest.mark.parametrize("style", ["words32", "string", "incbin"])
def test_section_of_other_styles(tmp_path, style):
    model = model_of(int8("v", 30), weight())
    files = write(model, tmp_path / "m.h", section=".far$1", style=style)
    assert_same_values(walked("gcc c99", files, "m", f"-I{tmp_path}"), model)
    found = symbols([tmp_path / "m.gcc.c99.o"])
    assert {found[f"m_{name}"][0] for name in ("v_data", "w_data", "w_scale")} == {".far$1"}


def test_a_section_of_one_model_is_overridden(tmp_path):
    write(model_of(int8("w", 3)), tmp_path / "one.h", section=".one")
    write(model_of(int8("w", 3)), tmp_path / "two.h")
    everywhere = '-DNIBBLECAST_AFTER=__attribute__((section(".all")))'
    only_one = ["-Done_BEFORE=", '-Done_AFTER=__attribute__((section(".other")))']
    for flags, expected in (([], ".one"), ([everywhere], ".one"), (only_one, ".other")):
        found = symbols(compile_objects("gcc c99", [tmp_path / "one.c", tmp_path / "two.c"], *flags))
        assert found["one_w_data"][0] == expected
        assert (found["two_w_data"][0] == ".all") == (flags == [everywhere])


OTHER_COMPILERS = {
    "__IAR_SYSTEMS_ICC__": '#pragma location = ".qspi" #pragma data_alignment = 16',
    "_MSC_VER": '__pragma(section(".qspi", read)) __declspec(allocate(".qspi")) __declspec(align(16))',
}


@pytest.mark.parametrize("compiler", OTHER_COMPILERS)
def test_words_of_other_compilers(tmp_path, compiler):
    """What their preprocessors would make of it; the compilers are not here."""
    write(model_of(int8("w", 3)), tmp_path / "m.h", section=".qspi", layout="header")
    command = ["gcc", "-E", "-P", "-std=c99", "-U__GNUC__", "-D__extension__=", f"-D{compiler}=1900", "m.h"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (words,) = re.findall(r"\}\s*([^{}]*static const int8_t m_w_data\[3\][^{}]*) = \{", text.replace("\n", " "))
    assert " ".join(words.partition("static const")[0].split()) == OTHER_COMPILERS[compiler]


@pytest.mark.parametrize("section", ['a"b', "a b", "a,b", "1a", "a\\", "a\n", "ä", "a*/", "x" * 200, "-a", "a)", "$a"])
def test_impossible_sections(tmp_path, section):
    with pytest.raises(UsageError, match="letters, digits"):
        plan_of(model_of(), tmp_path / "m.h", section=section)


# tail padding


@pytest.mark.parametrize("style", ["bytes", "words32", "words64", "string", "incbin"])
def test_tail_padding(tmp_path, style):
    model = quantized_integers()
    files = write(model, tmp_path / "m.h", tail_padding=True, style=style)
    assert_same_values(walked("gcc c99", files, "m", f"-I{tmp_path}"), model)
    declared = re.findall(r"FAR (\w+) m_\w+\[(\d+)\]", (tmp_path / "m.h").read_text())
    sizes = {"float": 4, "int8_t": 1, "uint8_t": 1}
    sizes |= {f"{sign}int{bits}_t": bits // 8 for sign in ("", "u") for bits in (16, 32, 64)}
    nul = int(style == "string")
    assert {int(length) * sizes[name] % 16 for name, length in declared} <= {0, nul}
    if style != "incbin":
        assert_read_back(tmp_path / "m.h", model)


def test_tail_padding_of_multipliers(tmp_path):
    kernel = weight(shape=(5, 3, 3, 6))
    bias = Tensor.from_array("bias", np.arange(1, 6, dtype=np.int32))
    write(model_of(kernel, bias), tmp_path / "m.h", tail_padding=True, fixed_point=True)
    header, source = (tmp_path / "m.h").read_text(), (tmp_path / "m.c").read_text()
    for array in ("w_multiplier", "w_shift", "bias_data"):
        assert f"int32_t m_{array}[8]" in header
    assert "#define m_w_MULTIPLIER_COUNT 5u" in header
    assert "#define m_bias_COUNT 5u\n#define m_bias_BYTES 20u" in header
    body = re.search(r"m_bias_data\[8\] NIBBLECAST_AFTER = \{(.*?)\};", source, re.S)[1]
    assert [int(literal) for literal in body.split(",")[:-1]] == [1, 2, 3, 4, 5, 0, 0, 0]


def test_no_padding_where_nothing_is_missing(tmp_path):
    model = model_of(int8("w", 32), Tensor.from_array("none", np.zeros(0, np.int8)))
    write(model, tmp_path / "m.h", tail_padding=True)
    assert "m_w_data[32]" in (tmp_path / "m.h").read_text()
    assert "m_none_data[1]" in (tmp_path / "m.h").read_text()


@pytest.mark.parametrize(
    ("name", "bias", "c_type"), [("cnn_int8_full", np.int32, "int32_t"), ("mlp_int16x8", np.int64, "int64_t")]
)
def test_biases_of_integer_kernels(tmp_path, name, bias, c_type):
    model = nibblecast.load(FIXTURES / f"{name}.tflite")
    biases = [tensor for tensor in model.values() if tensor.dtype == bias and len(tensor.shape) == 1]
    assert biases
    nibblecast.convert(FIXTURES / f"{name}.tflite", tmp_path / "m.h", fixed_point=True)
    header = (tmp_path / "m.h").read_text()
    for tensor in biases:
        base = re.search(rf'/\* "{re.escape(tensor.name)}".*?#define (\w+)_KIND', header, re.S)[1]
        assert f"{c_type} {base}_data[{tensor.size}]" in header


# C90


def messages_of_c90(folder, source):
    """What a compiler whose `long` has 32 bits says about C90."""
    need(["arm-none-eabi-gcc"], "gcc-arm-none-eabi")
    command = ["arm-none-eabi-gcc", "-ffreestanding", "-std=c90", *WARNINGS, *C_WARNINGS, "-I.", "-c", source]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr


def wide_and_long():
    named = int8("n" * 4000, 3)
    integers = [tensor for tensor in plain_values().values() if tensor.dtype.itemsize == 8]
    return model_of(*integers, named, *quantized_integers().values())


@pytest.mark.parametrize("style", ["bytes", "words32", "incbin"])
def test_c90(tmp_path, style):
    write(wide_and_long(), tmp_path / "m.h", std="c90", style=style)
    assert messages_of_c90(tmp_path, "m.c") == ""


def test_c99_is_no_c90(tmp_path):
    for tensor, warning in (
        (int8("n" * 4000, 3), "string length '4000' is greater than"),
        (wide_and_long()["int64"], "long-long"),
    ):
        write(model_of(tensor), tmp_path / "m.h")
        assert warning in messages_of_c90(tmp_path, "m.c")


@pytest.mark.parametrize("mode", MODES)
def test_values_of_c90(tmp_path, mode):
    model = model_of(*plain_values().values(), *quantized_integers().values())
    assert_same_values(walked(mode, write(model, tmp_path / "m.h", std="c90", layout="header"), "m"), model)


@pytest.mark.parametrize("tail_padding", [False, True])
@pytest.mark.parametrize("kind", ZOO)
def test_c90_is_read_back(tmp_path, kind, tail_padding):
    model = ZOO[kind]()
    write(model, tmp_path / "m.h", std="c90", tail_padding=tail_padding)
    assert_read_back(tmp_path / "m.h", model)


def test_names_that_c90_cuts(tmp_path):
    plan = plan_of(model_of(int8("n" * 509, 3), int8("n" * 510, 3)), tmp_path / "m.h", std="c90")
    assert [(loss.tensor, loss.kind) for loss in plan.losses] == [("n" * 510, "dropped")]


@pytest.mark.parametrize("style", ["words64", "string", "embed"])
def test_styles_beyond_c90(tmp_path, style):
    with pytest.raises(UsageError, match=rf"style={style} is not for std=c90, .*: choose words32"):
        plan_of(model_of(), tmp_path / "m.h", std="c90", style=style)


# the longest array


def test_longest_array(tmp_path):
    model = model_of(int8("fits", 32767), int8("layer/kernel", 32768))
    with pytest.raises(
        RefusedLoss, match=r"its data would be an array of 32768 bytes, and max-array is 32767.*--skip"
    ) as caught:
        plan_of(model, tmp_path / "m.h", max_array=Size(32767))
    assert caught.value.tensor == "layer/kernel"
    assert caught.value.exit_code == ExitCode.REFUSED_LOSS
    plan_of(model, tmp_path / "m.h", max_array=Size(32768))


def test_longest_array_of_parameters(tmp_path):
    scale = Tensor.from_array("scale", np.ones((100, 1), np.float32))
    tensor = Tensor.from_array("w", np.zeros((100, 2), ml_dtypes.int4), Quantization(scale, per_axis((100, 2), 0)))
    with pytest.raises(RefusedLoss, match=r"its scale would be an array of 400 bytes"):
        plan_of(model_of(tensor), tmp_path / "m.h", max_array=Size(399))


def test_longest_array_counts_what_options_add(tmp_path):
    tensor = random_codes("w", (100, 3), dtype_of("int4"), RNG)
    for options, nbytes in (
        ({}, 150),
        ({"packing": "rows"}, 200),
        ({"packing": "unpacked"}, 300),
        ({"tail_padding": True}, 160),
    ):
        plan_of(model_of(tensor), tmp_path / "m.h", max_array=Size(nbytes), **options)
        with pytest.raises(RefusedLoss, match=f"array of {nbytes} bytes"):
            plan_of(model_of(tensor), tmp_path / "m.h", max_array=Size(nbytes - 1), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_avr_says_which_array_is_too_long(tmp_path, layout):
    need(["avr-gcc"], "gcc-avr avr-libc")
    for count in (32767, 32768):
        write(model_of(int8("w", count)), tmp_path / "m.h", layout=layout)
        (tmp_path / "main.c").write_text('#include "m.h"\n')
        command = ["avr-gcc", "-mmcu=atmega2560", "-std=c99", "-fsyntax-only", "main.c"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == (count == 32767), done.stderr
        assert ("m_w_data has 32768 bytes, and avr-gcc takes 32767 in an array" in done.stderr) == (count == 32768)
    write(model_of(int8("w", 32768)), tmp_path / "m.h", layout=layout)
    subprocess.run(["gcc", "-fsyntax-only", "main.c"], cwd=tmp_path, check=True)


# all of them


def test_options_that_differ_are_named_in_the_output(tmp_path):
    options = {
        "packing": "rows",
        "nibble_order": "high",
        "tail_padding": True,
        "align": 8,
        "section": ".x",
        "std": "c90",
    }
    write(model_of(int8("w", 3)), tmp_path / "m.h", max_array=Size(99), **options)
    named = "packing=rows, nibble-order=high, tail-padding=true, align=8, section=.x, std=c90, max-array=99"
    assert f"Options: layout=split, prefix=m, {named}\n" in (tmp_path / "m.h").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_of_them_together(tmp_path, layout):
    options = {
        "packing": "rows",
        "nibble_order": "high",
        "tail_padding": True,
        "align": 128,
        "section": ".x",
        "std": "c90",
    }
    model = model_of(*(tensor for kind in ("schemes", "plain values") for tensor in ZOO[kind]().values()))
    files = write(model, tmp_path / "m.h", layout=layout, style="words32", **options)
    assert_same_values(walked("gcc c99", files, "m"), model)
    assert_read_back(tmp_path / "m.h", model)


HOSTILE = {
    "align": ["x", "", "1.5", "1e3"],
    "packing": ["", "DENSE", "unpacked,rows"],
    "nibble-order": ["big", "low-first"],
    "tail-padding": ["16", "maybe"],
    "std": ["c89", "gnu99"],
    "max-array": ["-1", "many", "32k7"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in HOSTILE.items() for value in values])
def test_hostile_values(name, value):
    with pytest.raises(UsageError, match=name):
        parse(CHeaderOptions, {name: value}, "cheader")


def test_every_option_has_a_line_of_help():
    assert all(option.help and len(option.help) < 160 for option in describe(CHeaderOptions))


def test_the_page_lists_every_option():
    page = (ROOT / "docs" / "c.md").read_text("utf-8")
    table = page.partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)=", table, re.MULTILINE)
    assert rows == [option.name for option in describe(CHeaderOptions)]
