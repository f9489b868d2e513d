"""The files: their names, their interface, what they say of themselves, and what is refused."""

from __future__ import annotations

import hashlib
import io
import platform
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.converters.interfaces import Plan, Writer
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, per_axis, per_tensor
from nibblecast.converters.storage import Computed, MappedFile
from nibblecast.formats.cheader.identifiers import MAX_IDENTIFIER
from nibblecast.formats.cheader.writer import CHeaderWriter
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
from tests.formats.cheader.c_zoo import (
    HOSTILE_NAMES,
    dtype_of,
    floats,
    integers,
    plain_values,
    quantized_integers,
    random_codes,
    schemes,
)

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)


def int4(name="w", shape=(3, 5), **options):
    quantized = {"scale": floats((3, 1), RNG), "block_shape": (1, 5)} | options
    return random_codes(name, shape, dtype_of("int4"), RNG, **quantized)


def identifiers_in(text):
    return re.findall(r"\b[A-Za-z_]\w*", re.sub(r'/\*.*?\*/|"(\\.|[^"\\])*"', " ", text, flags=re.DOTALL))


def test_it_is_a_writer(tmp_path):
    writer: Writer = CHeaderWriter()
    plan: Plan = writer.plan(model_of(int4()), tmp_path / "weights.h", writer.options())
    assert [file.path.name for file in plan.files] == ["weights.h", "weights.c", "nibblecast.h"]
    source, header = (io.BytesIO() for _ in plan.shards)
    for shard, stream in reversed(list(zip(plan.shards, (header, source), strict=True))):  # none needs the other
        shard.write(stream, lambda _: None)
        assert len(stream.getvalue()) == shard.file.nbytes


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("mode", MODES)
def test_hostile_names(tmp_path, mode, layout):
    model = model_of(*(int4(name) for name in HOSTILE_NAMES))
    files = write(model, tmp_path / "static-[x].2.h" if layout == "header" else tmp_path / "if (0).h", layout=layout)
    prefix = "static_x_2" if layout == "header" else "if_0"
    assert_same_values(walked(mode, files, prefix), model)
    for file in files:
        text = file.read_bytes()
        assert not set(text) - set(b"\n" + bytes(range(32, 127)))
        ours = [name for name in identifiers_in(text.decode()) if name.startswith(prefix)]
        assert all(len(name) <= MAX_IDENTIFIER and "__" not in name for name in ours)


@pytest.mark.parametrize("mode", MODES)
def test_header_in_two_units_one_of_which_does_not_use_it(tmp_path, mode):
    write(model_of(int4()), tmp_path / "one.h")
    write(model_of(int4("v")), tmp_path / "two.h", layout="header")
    unused = tmp_path / "unused.c"
    unused.write_text('#include "two.h"\n#include "one.h"\n#include "two.h"\nextern int unused;\nint unused = 1;\n')
    main = tmp_path / "main.c"
    main.write_text(
        '#include "one.h"\n#include "two.h"\n#include <stdio.h>\n'
        'int main(void) { printf("%d", nibblecast_int4(two_v_data, 3) + nibblecast_int4(one_w_data, 3)); return 0; }\n'
    )
    objects = compile_objects(mode, [unused, main, tmp_path / "one.c"])
    assert re.fullmatch(r"-?\d+", run(mode, objects))


@pytest.mark.parametrize("mode", ["gcc c99", "g++ c++17"])
def test_macros(tmp_path, mode):
    shape = (3, 4, 7)
    parameters = {"scale": floats((1, 4, 1), RNG), "block_shape": per_axis(shape, 1)}
    per_channel = random_codes("w", shape, dtype_of("int4"), RNG, **parameters, zero_point=integers((1, 4, 1), RNG))
    codebook = random_codes(
        "c", (4, 6), dtype_of("uint2"), RNG, scale=floats((2, 2), RNG), block_shape=(2, 3), codebook=floats((4,), RNG)
    )
    bias = Tensor.from_array("b", np.array(1.5, np.float32))
    files = write(model_of(per_channel, codebook, bias), tmp_path / "m.h")
    expected = {
        "m_TENSOR_COUNT": 3,
        "m_FLASH_BYTES": 42 + 16 + 16 + 6 + 16 + 16 + 4,
        "m_FLASH_BYTES_ALIGNED": 48 + 16 + 16 + 16 + 16 + 16 + 16,
        "m_w_KIND": "NIBBLECAST_SIGNED", "m_w_BITS": 4, "m_w_SIGNED": 1, "m_w_RANK": 3,
        "m_w_DIM0": 3, "m_w_DIM1": 4, "m_w_DIM2": 7, "m_w_COUNT": 84, "m_w_BYTES": 42,
        "m_w_GRANULARITY": "NIBBLECAST_PER_AXIS", "m_w_AXIS": 1, "m_w_BLOCK0": 3, "m_w_BLOCK1": 1, "m_w_BLOCK2": 7,
        "m_w_SCALE_COUNT": 4, "m_w_ZERO_POINT_COUNT": 4, "m_w_OFFSET_COUNT": 0, "m_w_CODEBOOK_COUNT": 0,
        "m_c_KIND": "NIBBLECAST_CODEBOOK", "m_c_BITS": 2, "m_c_SIGNED": 0, "m_c_CODEBOOK_COUNT": 4,
        "m_c_GRANULARITY": "NIBBLECAST_BLOCKWISE", "m_c_BLOCK0": 2, "m_c_BLOCK1": 3, "m_c_SCALE_COUNT": 4,
        "m_b_KIND": "NIBBLECAST_FLOAT32", "m_b_RANK": 0, "m_b_COUNT": 1, "m_b_BYTES": 4, "m_b_SCALE_COUNT": 0,
        "m_b_GRANULARITY": "NIBBLECAST_NOT_QUANTIZED",
    }  # fmt: skip
    checks = [f"#if {name} != {value}\n#error {name}\n#endif" for name, value in expected.items()]
    checks += [f"#ifdef {name}\n#error {name}\n#endif" for name in ("m_c_AXIS", "m_b_AXIS", "m_b_BLOCK0")]
    sizes = "sizeof m_w_data == m_w_BYTES && sizeof m_c_codebook == 4u * m_c_CODEBOOK_COUNT"
    checks += [f"extern char sizes_agree[({sizes}) ? 1 : -1];", "extern char counted[m_w_COUNT];"]
    program = tmp_path / "checks.c"
    program.write_text("\n".join([f'#include "{files[0].name}"', *checks, ""]))
    compile_objects(mode, [program])


def test_getters(tmp_path):
    tensors = [random_codes(dtype, (13,), dtype_of(dtype), RNG) for dtype in ("int4", "uint4", "int2", "uint2")]
    write(model_of(*tensors), tmp_path / "m.h", layout="header")
    calls = "".join(f'printf(" %d", nibblecast_{t.name}(m_{t.name}_data, i)); ' for t in tensors)
    program = tmp_path / "main.c"
    program.write_text(
        '#include "m.h"\n#include <stdio.h>\n'
        f"int main(void) {{ size_t i; for (i = 0u; i < 13u; i++) {{ {calls} }} return 0; }}\n"
    )
    printed = np.array(run("gcc c99", compile_objects("gcc c99", [program])).split(), int).reshape(13, 4)
    assert np.array_equal(printed.T, [tensor.codes() for tensor in tensors])


X87 = [["-O2", "-std=gnu11", "-mfpmath=387"]] if platform.machine() == "x86_64" else []
FLAGS = [
    ["-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    ["-O3", "-std=gnu11", "-ffp-contract=fast", "-march=native"],
    ["-Os", "-std=c90", "-Wno-long-long"],
    ["-O1", "-DNIBBLECAST_ALIGN=4", '-DNIBBLECAST_AFTER=__attribute__((section(".weights")))'],
    *X87,
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[1])
@pytest.mark.parametrize("kind", [quantized_integers, schemes, plain_values])
def test_values_do_not_depend_on_flags(tmp_path, kind, flags):
    model = kind()
    assert_same_values(walked("gcc c11", write(model, tmp_path / "weights.h"), "weights", *flags), model)


def test_bytes_are_read_by_the_macro(tmp_path):
    model = schemes()
    files = write(model, tmp_path / "weights.h")
    reader = tmp_path / "reader.h"
    reader.write_text("static int reads;\n#define NIBBLECAST_READ_U8(p) (reads++, *(p))\n")
    compile_objects(
        "gcc c11", [files[1]], "-include", str(reader), "-Wno-unused-variable", "-Wno-unused-but-set-variable"
    )
    tensors = walked("gcc c11", files, "weights", "-include", str(reader), "-Wno-unused-variable")
    assert_same_values(tensors, model)


@pytest.mark.parametrize("layout", ["split", "header"])
def test_same_model_same_bytes(tmp_path, layout):
    contents = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files = write(quantized_integers(), tmp_path / folder / "weights.h", layout=layout)
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_provenance(tmp_path):
    source = tmp_path / "mödel*/.tflite"
    source.parent.mkdir()
    source.write_bytes(b"content")
    header, code, _ = write(model_of(int4(), source=source), tmp_path / "weights.h", prefix="net")
    for file in (header, code):
        text = file.read_text("ascii")
        assert hashlib.sha256(b"content").hexdigest() in text
        assert '".tflite"' in text
        assert "Options: layout=split, prefix=net" in text
        assert str(tmp_path) not in text


def test_source_that_went_away(tmp_path):
    source = tmp_path / "model.tflite"
    source.write_bytes(b"content")
    plan = plan_of(model_of(int4(), source=source), tmp_path / "weights.h", layout="header")
    source.unlink()
    with pytest.raises(CorruptFile, match="cannot be read"):
        plan.shards[0].write(io.BytesIO(), lambda _: None)


def test_parameters_are_no_weights_of_their_own(tmp_path):
    scale = Tensor("w_scale", (3, 1), np.dtype(np.float32), floats((3, 1), RNG).data, parameter_of="w")
    orphan = Tensor("v_scale", (3, 1), np.dtype(np.float32), floats((3, 1), RNG).data, parameter_of="v")
    model = model_of(scale, int4(scale=scale), orphan)
    tensors = walked("gcc c99", write(model, tmp_path / "m.h"), "m")
    assert [name for name, _ in tensors] == ["w", "v_scale"]
    assert_same_values(tensors, model)


def test_losses(tmp_path):
    half = int4("half", scale=floats((3, 1), RNG, np.float16))
    double = int4("double", offset=floats((3, 1), RNG, np.float64))
    integer = int4("integer", zero_point=integers((3, 1), RNG, np.int64))
    long = int4("x" * 5000)
    plan = plan_of(model_of(half, double, integer, long), tmp_path / "m.h")
    assert [(loss.tensor, loss.kind) for loss in plan.losses] == [
        ("half", "widened"),
        ("double", "rounded"),
        (long.name, "dropped"),
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nibblecast.h", {}, "all models share"),
        ("NibbleCast.H", {"layout": "header"}, "all models share"),
        ("weights.c", {}, "name the header"),
        ("wéights.h", {}, "#include"),
        ("weights.h", {"prefix": "1st"}, "prefix=1st"),
    ],
)
def test_refused_targets(tmp_path, name, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        plan_of(model_of(int4()), tmp_path / name, **options)


def test_refused_tensors(tmp_path):
    with pytest.raises(Unsupported, match=r"waves.*complex64.*--skip"):
        plan_of(model_of(Tensor.from_array("waves", np.zeros(2, np.complex64))), tmp_path / "m.h")
    index = GroupIndex(1, Tensor.from_array("index", np.zeros(5, np.int32)))
    many = int4("many", scale=floats((3, 65537), RNG), block_shape=(1, 1), group_index=index)
    with pytest.raises(Unsupported, match=r"many.*65537 groups.*--skip"):
        plan_of(model_of(many), tmp_path / "m.h")
    far = int4("far", zero_point=Tensor.from_array("zp", np.full((3, 1), 2**31, np.int64)))
    with pytest.raises(Unsupported, match=r"far.*2147483648"):
        write(model_of(far), tmp_path / "m.h")
    outside = GroupIndex(1, Tensor.from_array("index", np.array([0, 1, 2, 0, -1], np.int32)))
    wrong = int4("wrong", scale=floats((3, 3), RNG), block_shape=(1, 1), group_index=outside)
    with pytest.raises(CorruptFile, match=r"wrong.*-1.*3 groups"):
        write(model_of(wrong), tmp_path / "m.h")


def test_no_payload_is_read_for_a_plan(tmp_path):
    def compute(start, stop):
        raise AssertionError("read")

    scale = Tensor("scale", (1,), np.dtype(np.float32), Computed(4, compute))
    quantization = Quantization(scale, per_tensor((1 << 40,)))
    tensor = Tensor("w", (1 << 40,), np.dtype(ml_dtypes.int4), Computed(1 << 39, compute), quantization)
    assert plan_of(model_of(tensor), tmp_path / "m.h").files[1].nbytes > 1 << 41


def test_memory_stays_bounded(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(1 << 24))
    mapped = MappedFile.open(blob)
    parameters = {"scale": Tensor("scale", (4096, 256), np.dtype(np.float32), mapped.range(0, 1 << 22))}
    quantization = Quantization(**parameters, block_shape=(1, 32))
    model = model_of(Tensor("w", (4096, 8192), np.dtype(ml_dtypes.int4), mapped.range(0, 1 << 24), quantization))
    tracemalloc.start()
    write(model, tmp_path / "m.h")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("flags", [[], ["-DNIBBLECAST_ALIGN=64"]])
@pytest.mark.parametrize("mode", MODES)
def test_data_are_aligned(tmp_path, mode, flags):
    tensors = [int4(name) for name in "abcdefgh"]
    write(model_of(*tensors), tmp_path / "m.h")
    program = tmp_path / "main.c"
    program.write_text(
        '#include "m.h"\n#include <stdio.h>\n'
        "int main(void) { size_t n; for (n = 0u; n < m_TENSOR_COUNT; n++) {\n"
        "    const char *data = NIBBLECAST_CAST(const char *, m_tensors[n].data);\n"
        "    const char *start = NULL;\n"
        '    printf("%d ", NIBBLECAST_CAST(int, (data - start) % m_ALIGN)); }\n'
        "    return 0; }\n"
    )
    objects = compile_objects(mode, [program, tmp_path / "m.c"], *flags)
    assert set(run(mode, objects).split()) == {"0"}
