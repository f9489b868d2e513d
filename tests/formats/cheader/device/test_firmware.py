"""The snippets of docs/firmware.md: they are built as a reader would build them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.ir import Tensor
from tests.formats.cheader.c_harness import MODES, compile_objects, model_of, write
from tests.formats.cheader.c_zoo import weight
from tests.tools import need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "firmware.md").read_text("utf-8")
MODEL = ROOT / "fixtures" / "tflite" / "cnn_int8_full.tflite"

#: What the snippet uses of CMSIS-NN, with its names and types.
CMSIS_NN = """
#include <stdint.h>
typedef enum { ARM_CMSIS_NN_SUCCESS = 0 } arm_cmsis_nn_status;
typedef struct { void *buf; int32_t size; } cmsis_nn_context;
typedef struct { int32_t w; int32_t h; } cmsis_nn_tile;
typedef struct { int32_t n; int32_t h; int32_t w; int32_t c; } cmsis_nn_dims;
typedef struct { int32_t min; int32_t max; } cmsis_nn_activation;
typedef struct { int32_t *multiplier; int32_t *shift; } cmsis_nn_per_channel_quant_params;
typedef struct { int32_t multiplier; int32_t shift; } cmsis_nn_per_tensor_quant_params;
typedef struct { int32_t input_offset; int32_t output_offset; cmsis_nn_tile stride; cmsis_nn_tile padding;
    cmsis_nn_tile dilation; cmsis_nn_activation activation; } cmsis_nn_conv_params;
typedef struct { int32_t input_offset; int32_t filter_offset; int32_t output_offset;
    cmsis_nn_activation activation; } cmsis_nn_fc_params;
arm_cmsis_nn_status arm_convolve_wrapper_s4(const cmsis_nn_context *, const cmsis_nn_conv_params *,
    const cmsis_nn_per_channel_quant_params *, const cmsis_nn_dims *, const int8_t *, const cmsis_nn_dims *,
    const int8_t *, const cmsis_nn_dims *, const int32_t *, const cmsis_nn_dims *, int8_t *);
arm_cmsis_nn_status arm_fully_connected_s4(const cmsis_nn_context *, const cmsis_nn_fc_params *,
    const cmsis_nn_per_tensor_quant_params *, const cmsis_nn_dims *, const int8_t *, const cmsis_nn_dims *,
    const int8_t *, const cmsis_nn_dims *, const int32_t *, const cmsis_nn_dims *, int8_t *);
"""


def snippet(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("mode", [mode for mode in MODES if "++" not in mode])
def test_cmsis_nn(tmp_path, mode):
    bias = np.arange(4, dtype=np.int32)
    tensors = [
        replace(weight(), name="conv/kernel"),
        Tensor.from_array("conv/bias", bias),
        replace(weight("FULLY_CONNECTED", per_channel=False), name="dense/kernel"),
        Tensor.from_array("dense/bias", bias),
    ]
    assert tensors[0].dtype == tensors[2].dtype == ml_dtypes.int4
    write(model_of(*tensors), tmp_path / "weights.h", fixed_point=True)
    (tmp_path / "arm_nnfunctions.h").write_text(CMSIS_NN)
    (tmp_path / "layers.c").write_text(snippet("c"))
    compile_objects(mode, [tmp_path / "layers.c", tmp_path / "weights.c"], "-Wno-missing-prototypes")


@pytest.mark.parametrize(
    ("generator", "tool", "package"), [("Unix Makefiles", "make", "make"), ("Ninja", "ninja", "ninja-build")]
)
def test_cmake(tmp_path, generator, tool, package):
    need(["cmake", tool], f"cmake {package}")
    shutil.copy(MODEL, tmp_path / "model.tflite")
    (tmp_path / "CMakeLists.txt").write_text(snippet("cmake"))
    (tmp_path / "main.c").write_text(
        '#include "weights.h"\nint main(void) { return nibblecast_value(&weights_tensors[2], 3u) == 0.0f; }\n'
    )
    command = tmp_path / "nibblecast"
    command.write_text(f'#!/bin/sh\ncd "{ROOT}" && exec "{sys.executable}" -m nibblecast "$@"\n')
    command.chmod(0o755)
    build = tmp_path / "build"

    def cmake(*arguments):
        done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return "flash: " in done.stdout

    cmake("-G", generator, "-S", tmp_path, "-B", build, f"-DNIBBLECAST={command}")
    assert cmake("--build", build)
    subprocess.run([str(build / "firmware")], check=True)
    assert not cmake("--build", build)
    os.utime(tmp_path / "model.tflite", (5_000_000_000, 5_000_000_000))
    assert cmake("--build", build)


def test_make(tmp_path):
    shutil.copy(MODEL, tmp_path / "model.tflite")
    (tmp_path / "Makefile").write_text("all: weights.c nibblecast.h\n" + snippet("make"))
    command = ["make", f"NIBBLECAST=PYTHONPATH='{ROOT}' '{sys.executable}' -m nibblecast"]

    def made():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return "wrote weights.h" in done.stdout

    assert made()
    assert not made()
    os.utime(tmp_path / "model.tflite", (5_000_000_000, 5_000_000_000))
    assert made()


def test_arduino(tmp_path):
    need(["avr-g++"], "gcc-avr avr-libc")
    write(model_of(weight()), tmp_path / "weights.h", layout="header")
    board = "enum { OUTPUT, LOW, HIGH, LED_BUILTIN };\nvoid pinMode(int, int);\nvoid digitalWrite(int, int);\n"
    (tmp_path / "sketch.cpp").write_text(board + snippet("cpp"))
    flags = ["-mmcu=atmega328p", "-Os", "-Wall", "-Wextra", "-Werror"]
    command = ["avr-g++", *flags, "-c", "sketch.cpp", "-o", "sketch.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(["avr-objdump", "-t", tmp_path / "sketch.o"], capture_output=True, text=True, check=True)
    for array in ("data", "scale"):
        assert re.search(rf"\.progmem\.data\S*\s.*weights_w_{array}$", listed.stdout, re.MULTILINE), listed.stdout


def test_pages_that_the_page_names():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert links
    assert all((ROOT / "docs" / link).exists() for link in links)
