"""Codes packed otherwise than densely: the bytes, the values that C gives, and what is read back."""

from __future__ import annotations

import itertools
import re
import subprocess

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.arithmetic.dtypes import SUB_BYTE
from nibblecast.converters.errors import CorruptFile, Unsupported, UsageError
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.cheader.options import CHeaderOptions
from nibblecast.formats.cheader.packings import DENSE, PACKINGS
from tests.formats.cheader.c_files import INT4, LAYOUTS, assert_read_back, of_array, read, rewritten
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
from tests.formats.cheader.c_zoo import ZOO, dtype_of, odd_shapes, random_codes, schemes

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
CHOICES = {
    "unpacked": {"packing": "unpacked"},
    "high first": {"nibble_order": "high"},
    "rows": {"packing": "rows"},
    "rows, high first": {"packing": "rows", "nibble_order": "high"},
}
packings = pytest.mark.parametrize("packing", CHOICES)


def narrow():
    """Everything with codes of 2 and 4 bits that the zoos have, with tensors of other kinds among it."""
    models = [odd_shapes(), schemes(), ZOO["plain values"](), ZOO["quantized integers"]()]
    tensors = [tensor for model in models for tensor in model.values() if tensor.dtype in SUB_BYTE]
    return model_of(*tensors, random_codes("int8", (3, 5), dtype_of("int8"), RNG))


@packings
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["gcc c99", "g++ c++17", "clang c99"])
def test_values(tmp_path, mode, layout, packing):
    model = narrow()
    files = write(model, tmp_path / "weights.h", layout=layout, **CHOICES[packing])
    assert_same_values(walked(mode, files, "weights"), model)


@packings
@pytest.mark.parametrize("style", ["words32", "words64", "string", "incbin"])
def test_values_in_other_styles(tmp_path, style, packing):
    model = narrow()
    files = write(model, tmp_path / "weights.h", style=style, tail_padding=True, **CHOICES[packing])
    assert_same_values(walked("gcc c99", files, "weights", f"-I{tmp_path}"), model)


@packings
@pytest.mark.parametrize("tail_padding", [False, True])
@pytest.mark.parametrize("style", ["bytes", "words32", "words64", "string"])
def test_read_back(tmp_path, style, tail_padding, packing):
    model = narrow()
    write(model, tmp_path / "weights.h", style=style, tail_padding=tail_padding, **CHOICES[packing])
    assert_read_back(tmp_path / "weights.h", model)


@packings
def test_a_model_verifies(tmp_path, packing):
    options = CHOICES[packing] | {"fixed_point": True, "tail_padding": True}
    assert nibblecast.convert(INT4, tmp_path / "w.h", verify=True, **options).verified[tmp_path / "w.h"].equal


@settings(max_examples=150)
@given(
    number=st.sampled_from(list(PACKINGS)),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(list(SUB_BYTE)),
    style=st.sampled_from(["bytes", "words64", "string"]),
    tail_padding=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_round_trip(tmp_path_factory, number, shape, dtype, style, tail_padding, seed):
    packing, rng = PACKINGS[number], np.random.default_rng(seed)
    tensor = random_codes("w", shape, dtype, rng)
    header = tmp_path_factory.mktemp("w") / "w.h"
    options = {"packing": "unpacked" if packing.unpacked else "rows" if packing.rows_padded else "dense"}
    options |= {"nibble_order": "high" if packing.high_first else "low"}
    write(model_of(tensor), header, style=style, tail_padding=tail_padding, **options)
    again = assert_read_back(header, model_of(tensor))["w"]
    start, stop = sorted(int(edge) for edge in rng.integers(0, tensor.nbytes + 1, 2))
    assert np.array_equal(again.data.read(start, stop), tensor.packed()[start:stop])


CODES = np.array([[1, 2, 3], [-4, 5, -6]], np.int8)  # as 4 bits: 1 2 3 c 5 a
BYTES = {
    "unpacked": (ml_dtypes.int4, [1, 2, 3, -4, 5, -6]),
    "high first": (ml_dtypes.int4, [0x12, 0x3C, 0x5A]),
    "rows": (ml_dtypes.int4, [0x21, 0x03, 0x5C, 0x0A]),
    "rows, high first": (ml_dtypes.int4, [0x12, 0x30, 0xC5, 0xA0]),
}
TWO_BITS = {
    "unpacked": [1, -2, -1, 0, 1, -2],
    "high first": [0b01101100, 0b01100000],
    "rows": [0b00111001, 0b00100100],
    "rows, high first": [0b01101100, 0b00011000],
}


def written_bytes(folder, tensor, **options):
    write(model_of(tensor), folder / "w.h", **options)
    body = re.search(r"w_w_data\[\d+\] NIBBLECAST_AFTER = \{(.*?)\};", (folder / "w.c").read_text(), re.S)[1]
    return [int(literal, 0) for literal in body.replace("\n", "").split(",")[:-1]]


@packings
def test_bytes(tmp_path, packing):
    dtype, expected = BYTES[packing]
    assert written_bytes(tmp_path, Tensor.from_array("w", CODES.astype(dtype)), **CHOICES[packing]) == expected
    two = np.array([[1, -2, -1], [0, 1, -2]], np.int8).astype(ml_dtypes.int2)
    assert written_bytes(tmp_path, Tensor.from_array("w", two), **CHOICES[packing]) == TWO_BITS[packing]


def test_types_and_macros(tmp_path):
    tensors = [random_codes(name, (3, 5), dtype_of(name), RNG) for name in ("int4", "uint2", "float4_e2m1fn", "int8")]
    write(model_of(*tensors), tmp_path / "m.h", packing="unpacked")
    header = (tmp_path / "m.h").read_text()
    for name, c_type in (("int4", "int8_t"), ("uint2", "uint8_t"), ("float4_e2m1fn", "uint8_t")):
        assert f"NIBBLECAST_FAR {c_type} m_{name}_data[15]" in header
        assert f"#define m_{name}_BYTES 15u\n#define m_{name}_PACKING NIBBLECAST_UNPACKED\n" in header
    assert "#define m_int4_BITS 4u" in header
    assert "#define m_int8_PACKING NIBBLECAST_DENSE" in header
    write(model_of(*tensors), tmp_path / "m.h", packing="rows", nibble_order="high")
    header = (tmp_path / "m.h").read_text()
    assert "#define m_int4_BYTES 9u\n#define m_int4_PACKING NIBBLECAST_ROWS_PADDED_HIGH_FIRST\n" in header


@pytest.mark.parametrize("mode", MODES)
def test_getters(tmp_path, mode):
    tensors = [random_codes(name, (5, 7), dtype_of(name), RNG) for name in ("int4", "uint4", "int2", "uint2")]
    write(model_of(*tensors), tmp_path / "high.h", nibble_order="high")
    write(model_of(*tensors), tmp_path / "rows.h", nibble_order="high", packing="rows")
    program = tmp_path / "main.c"
    prints = "".join(
        f'        printf(" %d", nibblecast_{t.name}_high_first(high_{t.name}_data, i));\n'
        f'        printf(" %d", nibblecast_{t.name}(rows_{t.name}_data, nibblecast_place(&rows_tensors[{n}], i)));\n'
        for n, t in enumerate(tensors)
    )
    program.write_text(
        '#include "high.h"\n#include "rows.h"\n#include <stdio.h>\nint main(void) {\n    size_t i;\n'
        f"    for (i = 0u; i < 35u; i++) {{\n{prints}    }}\n    return 0;\n}}\n"
    )
    sources = [program, tmp_path / "high.c", tmp_path / "rows.c"]
    printed = np.array(run(mode, compile_objects(mode, sources)).split(), int).reshape(35, 4, 2)
    for n, tensor in enumerate(tensors):
        for column in (0, 1):
            assert np.array_equal(printed[:, n, column], tensor.codes().reshape(-1))


def test_dense_only_programs_are_told_of_other_packings(tmp_path):
    tensor = random_codes("w", (3, 5), dtype_of("int4"), RNG)
    dense, packed = (tmp_path / "dense.h", tmp_path / "packed.h")
    files = write(model_of(tensor), dense)
    assert_same_values(walked("gcc c99", files, "dense", "-DNIBBLECAST_DENSE_ONLY"), model_of(tensor))
    write(model_of(tensor), packed, packing="unpacked")
    command = ["gcc", "-c", "-DNIBBLECAST_DENSE_ONLY", str(packed.with_suffix(".c")), "-o", str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode
    assert "leave out NIBBLECAST_DENSE_ONLY" in result.stderr


def test_int8_may_be_dense_only(tmp_path):
    model = model_of(random_codes("w", (3, 5), dtype_of("int8"), RNG))
    files = write(model, tmp_path / "m.h", nibble_order="high")
    assert_same_values(walked("gcc c99", files, "m", "-DNIBBLECAST_DENSE_ONLY"), model)


@pytest.mark.parametrize("shape", [(1, 3_000_001), (3, 1_000_001), (1001, 2999), (3_000_001,)])
@pytest.mark.parametrize("dtype", ["int4", "uint2"])
@packings
def test_large_tensors_in_parts(tmp_path, packing, dtype, shape):
    tensor = random_codes("w", shape, dtype_of(dtype), RNG)
    *_, file = write(model_of(tensor), tmp_path / "w.h", style="incbin", **CHOICES[packing])
    chosen = CHeaderOptions(**CHOICES[packing]).arrangement().packing
    codes, bits = tensor.codes().reshape(-1, shape[-1]), tensor.bits
    stored = MappedFile.open(file).view
    assert stored.size == chosen.nbytes(shape, bits)
    if chosen.unpacked:
        assert np.array_equal(stored.view(tensor.codes().dtype), codes.reshape(-1))
        return
    order = range(0, 8, bits)[::-1] if chosen.high_first else range(0, 8, bits)
    spread = np.stack([stored >> shift & (1 << bits) - 1 for shift in order], axis=1).reshape(-1)
    wanted = (codes & (1 << bits) - 1).astype(np.uint8)
    rows = (
        spread.reshape(len(codes), -1)[:, : shape[-1]]
        if chosen.rows_padded
        else spread[: codes.size].reshape(codes.shape)
    )
    assert np.array_equal(rows, wanted)


@packings
def test_any_part_alone(tmp_path, packing):
    tensor = random_codes("w", (71, 501), dtype_of("int4"), RNG)
    write(model_of(tensor), tmp_path / "w.h", **CHOICES[packing])
    data, wanted = read(tmp_path / "w.h")["w"].data, tensor.packed()
    edges = [(0, 0), (0, 1), (3, 17), (wanted.size - 1, wanted.size), (0, wanted.size + 9)]
    for start, stop in itertools.chain(edges, RNG.integers(0, wanted.size, (50, 2)).tolist()):
        assert np.array_equal(data.read(start, stop), wanted[start:stop])


def damaged(tmp_path, change, **options):
    tensor = random_codes("w", (3, 5), dtype_of("int4"), RNG)
    write(model_of(tensor), tmp_path / "m.h", **options)
    return rewritten(tmp_path / "m.h", change)


def test_a_code_that_is_too_large(tmp_path):
    body = "    " + "   8," * 15 + "\n"
    header = damaged(tmp_path, of_array("m_w_data", lambda _: body), packing="unpacked")
    with pytest.raises(CorruptFile, match=r"tensor 'w': m_w_data holds 8, which is not a code of 4 bits"):
        read(header)["w"].packed()


@pytest.mark.parametrize("order", ["low", "high"])
def test_something_between_rows(tmp_path, order):
    change = of_array("m_w_data", lambda body: body.replace(body.strip()[10:14], "0xff"))
    header = damaged(tmp_path, change, packing="rows", nibble_order=order)
    with pytest.raises(CorruptFile, match=r"tensor 'w': m_w_data holds something behind the end of a row"):
        read(header)["w"].packed()


@pytest.mark.parametrize(
    ("macro", "kind", "message"),
    [
        ("9", Unsupported, "is of packing 9, which is unknown"),
        ("3", Unsupported, "is of packing 3, which is unknown"),
        ("NIBBLECAST_UNPACKED", CorruptFile, "m_w_data has .* elements"),
        ("NIBBLECAST_ROWS_PADDED", CorruptFile, "m_w_data has .* elements"),
        ("NIBBLECAST_HIGH_FIRST", CorruptFile, "m_w_PACKING is 0, but the table says 2"),
    ],
)
def test_another_packing_than_that_of_the_array(tmp_path, macro, kind, message):
    header = damaged(tmp_path, lambda text: text.replace("m_w_PACKING", macro))
    with pytest.raises(kind, match=rf"tensor 'w': .*{message}"):
        read(header)


def test_a_packing_of_whole_bytes(tmp_path):
    write(model_of(random_codes("w", (3, 5), dtype_of("int8"), RNG)), tmp_path / "m.h")
    header = rewritten(tmp_path / "m.h", lambda text: text.replace("m_w_PACKING", "NIBBLECAST_HIGH_FIRST"))
    with pytest.raises(CorruptFile, match="is of packing HIGH_FIRST, but has elements of 8 bits"):
        read(header)


def test_no_order_of_single_codes(tmp_path):
    with pytest.raises(UsageError, match=r"packing=unpacked .*nibble-order=high"):
        plan_of(model_of(), tmp_path / "m.h", packing="unpacked", nibble_order="high")


def test_dense_is_the_default():
    assert CHeaderOptions().arrangement().packing == DENSE
