"""The whole source file as one array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nibblecast.converters.errors import UsageError
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.tflite.reader import TFLiteReader
from tests.formats.cheader.c_harness import assert_same_values, compile_objects, model_of, plan_of, run, walked, write

FIXTURE = Path(__file__).parents[3] / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
PROGRAM = """#include "m.h"
#include <stdio.h>
int main(void)
{
    size_t i;
    const char *start = NULL;
    const void *model = m_model;
    const char *first = NIBBLECAST_CAST(const char *, model);
    printf("%d ", NIBBLECAST_CAST(int, (first - start) % 16));
    for (i = 0u; i < m_MODEL_BYTES; i++) {
        uint8_t byte;
        nibblecast_read(&byte, m_model, i, 1u);
        printf("%02x", NIBBLECAST_CAST(unsigned int, byte));
    }
    return 0;
}
"""


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("mode", ["gcc c99", "g++ c++17"])
def test_only_the_file(tmp_path, mode, layout):
    files = write(TFLiteReader().read(FIXTURE), tmp_path / "m.h", model_array="only", layout=layout)
    assert printed(tmp_path, files, mode) == f"0 {FIXTURE.read_bytes().hex()}"
    assert "kernel" not in files[0].read_text().replace("kernels", "")


@pytest.mark.parametrize("style", ["words32", "words64", "string", "incbin"])
def test_styles(tmp_path, style):
    files = write(TFLiteReader().read(FIXTURE), tmp_path / "m.h", model_array="only", style=style)
    assert printed(tmp_path, files, "gcc c99") == f"0 {FIXTURE.read_bytes().hex()}"


@pytest.mark.parametrize("style", ["bytes", "incbin"])
def test_also_the_file(tmp_path, style):
    model = TFLiteReader().read(FIXTURE)
    files = write(model, tmp_path / "m.h", model_array="also", style=style)
    assert printed(tmp_path, files, "gcc c99") == f"0 {FIXTURE.read_bytes().hex()}"
    assert_same_values(walked("gcc c99", files, "m", f"-I{tmp_path}"), model)


def test_sizes_count_it(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(100))
    files = write(model_of(source=source), tmp_path / "m.h", model_array="only")
    text = files[0].read_text()
    assert "#define m_MODEL_BYTES 100u" in text
    assert "#define m_FLASH_BYTES 100u" in text
    assert "#define m_FLASH_BYTES_ALIGNED 112u" in text
    assert '"source.bin"' in text


def test_nothing_is_lost(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(100))
    half = Tensor.from_array("x" * 5000, np.zeros(3, np.float16))
    assert plan_of(model_of(half, source=source), tmp_path / "m.h", model_array="only").losses == ()


def test_tensors_named_like_it_get_out_of_its_way(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(100))
    tensors = [Tensor.from_array(name, np.zeros(3, np.int8)) for name in ("MODEL", "model", "mo/del")]
    model = model_of(*tensors, source=source)
    assert_same_values(walked("gcc c99", write(model, tmp_path / "m.h", model_array="also"), "m"), model)


def test_models_that_are_no_single_file(tmp_path):
    weight = Tensor.from_array("w", np.zeros(3, np.int8))
    with pytest.raises(UsageError, match="one file"):
        plan_of(model_of(weight), tmp_path / "m.h", model_array="only")
    with pytest.raises(UsageError, match="one file"):
        plan_of(model_of(weight, source=tmp_path), tmp_path / "m.h", model_array="also")
    for name in ("graph", "external.data"):
        (tmp_path / name).write_bytes(bytes(10))
    outside = Tensor("w", (3,), np.dtype(np.int8), MappedFile.open(tmp_path / "external.data").range(0, 3))
    with pytest.raises(UsageError, match=r"lies in external\.data"):
        plan_of(model_of(outside, source=tmp_path / "graph"), tmp_path / "m.h", model_array="also")


@pytest.mark.peers
@pytest.mark.parametrize("style", ["bytes", "words64", "string", "incbin"])
@pytest.mark.parametrize("source", ["int8", "int4"])
def test_tflite_micro_runs_it(tmp_path, source, style):
    """What the compiled array holds, in the interpreter of TFLite Micro, against the file itself in it."""
    from tests.formats.cheader import tflm_oracle

    rng = np.random.default_rng(0)
    path = FIXTURE.with_name("cnn_int8_full.tflite")
    data = rng.integers(-128, 128, (1, 8, 8, 3)).astype(np.int8)
    if source == "int4":
        case = tflm_oracle.random_case("CONV_2D", 4, rng, per_tensor=False)
        path, data = tmp_path / "conv.tflite", case.data
        path.write_bytes(tflm_oracle.model_bytes(case))
    files = write(TFLiteReader().read(path), tmp_path / "m.h", model_array="only", style=style)
    alignment, _, compiled = printed(tmp_path, files, "gcc c99").partition(" ")
    assert alignment == "0"
    of_array = tflm_oracle.run_in_tflm(bytes.fromhex(compiled), data)
    assert of_array.tobytes() == tflm_oracle.run_in_tflm(path.read_bytes(), data).tobytes()
    assert np.unique(of_array).size > 1


def printed(folder, files, mode):
    program = folder / "main.c"
    program.write_text(PROGRAM)
    sources = [program, *(file for file in files if file.suffix == ".c")]
    return run(mode, compile_objects(mode, sources, f"-I{folder}"))
