"""Data as words, strings, and files that the compiler reads: the same values whatever they are spelled as."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from nibblecast.converters.errors import UsageError
from tests.formats.cheader.c_harness import (
    MODES,
    assert_same_values,
    compile_objects,
    model_of,
    plan_of,
    run,
    walked,
    write,
)
from tests.formats.cheader.c_zoo import ZOO, dtype_of, int8, odd_shapes, random_codes

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
TEXT_STYLES = ("words32", "words64", "string")
MEGABYTE = 1 << 20


def all_kinds():
    models = [ZOO[kind]() for kind in ("plain values", "odd shapes", "schemes")]
    return model_of(*(tensor for model in models for tensor in model.values()))


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("style", TEXT_STYLES)
@pytest.mark.parametrize("mode", ["gcc c99", "g++ c++17", "clang c99"])
def test_values(tmp_path, mode, style, layout):
    model = all_kinds()
    files = write(model, tmp_path / "weights.h", layout=layout, style=style)
    assert_same_values(walked(mode, files, "weights"), model)


@pytest.mark.parametrize("mode", MODES)
def test_values_of_incbin(tmp_path, mode):
    model = all_kinds()
    files = write(model, tmp_path / "weights.h", style="incbin")
    assert [file.name for file in files] == ["weights.h", "weights.c", "nibblecast.h", "weights.bin"]
    assert_same_values(walked(mode, files, "weights", f"-I{tmp_path}"), model)


@pytest.mark.parametrize("style", [*TEXT_STYLES, "incbin"])
def test_no_tensors(tmp_path, style):
    files = write(model_of(), tmp_path / "m.h", style=style)
    assert walked("gcc c99", files, "m", f"-I{tmp_path}") == []


EMBED_MODES = {
    "clang-19 c99": ["clang-19", "-std=c99"],
    "clang-19 c23": ["clang-19", "-std=c23"],
    "clang++-19 c++17": ["clang++-19", "-std=c++17"],
}


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("mode", EMBED_MODES)
def test_values_of_embed(tmp_path, monkeypatch, mode, layout):
    monkeypatch.setitem(MODES, mode, EMBED_MODES[mode])
    model = all_kinds()
    files = write(model, tmp_path / "weights.h", style="embed", layout=layout)
    assert_same_values(walked(mode, files, "weights"), model)


def test_embed_is_refused_by_compilers_without_it(tmp_path):
    write(model_of(int8("w", 3)), tmp_path / "m.h", style="embed")
    result = subprocess.run(["gcc", "-c", str(tmp_path / "m.c"), "-o", "/dev/null"], capture_output=True, text=True)
    if result.returncode:  # gcc 15 has it
        assert "style=incbin" in result.stderr


def test_incbin_elsewhere(tmp_path):
    weight = int8("w", 40)
    files = write(model_of(weight), tmp_path / "m.h", style="incbin")
    (tmp_path / "data").mkdir()
    files[-1].rename(tmp_path / "data" / "renamed")
    define = f'-Dm_BIN="{tmp_path}/data/renamed"'
    assert_same_values(walked("gcc c99", files, "m", define), model_of(weight))


def test_offsets_in_the_file_are_aligned(tmp_path):
    tensors = [int8(name, count) for name, count in (("a", 5), ("b", 16), ("c", 1))]
    *_, file = write(model_of(*tensors), tmp_path / "m.h", style="incbin")
    stored = file.read_bytes()
    assert len(stored) == 33
    for offset, tensor in zip((0, 16, 32), tensors, strict=True):
        assert stored[offset : offset + tensor.nbytes] == tensor.packed().tobytes()


def test_incbin_needs_a_source_file(tmp_path):
    with pytest.raises(UsageError, match=r"style=incbin.*layout=split"):
        plan_of(model_of(int8("w", 3)), tmp_path / "m.h", style="incbin", layout="header")


@pytest.mark.parametrize(("style", "size"), [("words32", 8), ("words64", 8), ("string", 6)])
def test_sizes(tmp_path, style, size):
    weight = random_codes("w", (3, 3), dtype_of("uint4"), RNG)
    files = write(model_of(weight), tmp_path / "m.h", style=style)
    program = tmp_path / "checks.c"
    program.write_text(
        f'#include "m.h"\n#if m_w_BYTES != 5 || m_FLASH_BYTES != {size}\n#error sizes\n#endif\n'
        f"extern char agree[(sizeof m_w_data == {size}) ? 1 : -1];\n"
    )
    compile_objects("gcc c99", [program])
    assert [file.suffix for file in files] == [".h", ".c", ".h"]


def test_getters_take_words(tmp_path):
    weight = random_codes("w", (21,), dtype_of("int4"), RNG)
    write(model_of(weight), tmp_path / "m.h", style="words64", layout="header")
    program = tmp_path / "main.c"
    program.write_text(
        '#include "m.h"\n#include <stdio.h>\nint main(void) { size_t i; for (i = 0u; i < m_w_COUNT; i++) {\n'
        '    printf(" %d", nibblecast_int4(m_w_data, i)); }\n    return 0; }\n'
    )
    for mode in ("gcc c99", "g++ c++17"):
        printed = run(mode, compile_objects(mode, [program])).split()
        assert [int(code) for code in printed] == weight.codes().tolist()


@pytest.mark.parametrize("style", ["bytes", *TEXT_STYLES])
def test_words_know_their_byte_order(tmp_path, style):
    write(model_of(int8("w", 30)), tmp_path / "m.h", style=style)
    big_endian = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"]
    command = ["gcc", "-std=c99", *big_endian, "-c", str(tmp_path / "m.c"), "-o", str(tmp_path / "m.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert ("style=bytes" in result.stderr) == style.startswith("words")
    assert (result.returncode != 0) == style.startswith("words")


def test_strings_know_the_limit_of_msvc(tmp_path):
    for count, refused in ((65534, False), (65535, True)):
        write(model_of(int8("w", count)), tmp_path / "m.h", style="string", layout="header")
        command = ["gcc", "-E", "-D_MSC_VER=1940", "-std=c99", str(tmp_path / "m.h")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert ("longest string" in result.stderr) == refused


@pytest.mark.parametrize("mode", ["gcc c99", "clang c99"])
@pytest.mark.parametrize("style", [*TEXT_STYLES, "incbin"])
def test_long_arrays_in_pieces(tmp_path, mode, style):
    tensors = [int8("a", 3 * MEGABYTE // 2 + 5), random_codes("b", (1023, 1025), dtype_of("int4"), RNG)]
    model = model_of(*tensors)
    files = write(model, tmp_path / "m.h", style=style)
    assert_same_values(walked(mode, files, "m", f"-I{tmp_path}"), model)


@pytest.mark.parametrize("style", [*TEXT_STYLES, "incbin", "embed"])
def test_same_model_same_bytes(tmp_path, style):
    contents = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files = write(odd_shapes(), tmp_path / folder / "m.h", style=style)
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert f"style={style}" in contents[0][0].decode()


def test_a_hint_for_much_data(tmp_path):
    small, large = int8("w", MEGABYTE), int8("w", MEGABYTE + 1)
    assert plan_of(model_of(small), tmp_path / "m.h").notes == ()
    (note,) = plan_of(model_of(large), tmp_path / "m.h").notes
    assert "style=words64" in note
    assert "style=incbin" in note
    assert plan_of(model_of(large), tmp_path / "m.h", style="words64").notes == ()
