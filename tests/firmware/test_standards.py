"""Generated C compiles without a warning as every standard of C and C++ since 1990 and 1998, for many processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copy

import pytest

from tests.firmware import models
from tests.firmware.targets import HERE, call
from tests.tools import need

pytestmark = [pytest.mark.firmware, pytest.mark.slow]

WARNINGS = (
    "-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wcast-qual -Wcast-align -Werror".split()
)
C_WARNINGS = [*WARNINGS, "-Wmissing-prototypes", "-Wstrict-prototypes"]
CPP_WARNINGS = [*WARNINGS, "-Wold-style-cast"]
GPP_WARNINGS = [*CPP_WARNINGS, "-Wuseless-cast"]

C = "c90 c99 c11 c17 c2x".split()
CPP = "c++98 c++11 c++14 c++17 c++20".split()
FREESTANDING_C = "c99 c17".split()
FREESTANDING_CPP = "c++11 c++20".split()

#: Command, its warnings, the standards, and the packages that it comes from.
COMPILERS = (
    ("gcc", C_WARNINGS, C, "gcc"),
    ("g++", GPP_WARNINGS, CPP, "g++"),
    ("clang", C_WARNINGS, C, "clang"),
    ("clang++", CPP_WARNINGS, CPP, "clang"),
    ("clang-19", C_WARNINGS, [*C, "c23"], "clang-19"),
    ("clang++-19", CPP_WARNINGS, [*CPP, "c++23"], "clang-19"),
    ("arm-none-eabi-gcc -ffreestanding", C_WARNINGS, FREESTANDING_C, "gcc-arm-none-eabi"),
    ("arm-none-eabi-g++ -ffreestanding", GPP_WARNINGS, FREESTANDING_CPP, "gcc-arm-none-eabi"),
    ("riscv64-unknown-elf-gcc -ffreestanding", C_WARNINGS, FREESTANDING_C, "gcc-riscv64-unknown-elf"),
    ("powerpc-linux-gnu-gcc", C_WARNINGS, FREESTANDING_C, "gcc-powerpc-linux-gnu libc6-dev-powerpc-cross"),
)
CASES = [
    pytest.param(command, warnings, standard, packages, id=f"{command.split()[0]} {standard}")
    for command, warnings, standards, packages in COMPILERS
    for standard in standards
]

#: The styles of data that any of them takes, and the commands that have #embed.
STYLES = "words32 words64 string incbin".split()
EMBEDDING = ("clang-19", "clang++-19")
HOSTED = [case for case in CASES if case.values[0] in ("gcc", "g++", "clang", "clang++", *EMBEDDING)]

#: Processors that only clang is asked about: other sizes of int and pointers, either order of bytes.
PROCESSORS = (
    "thumbv6m-none-eabi armeb-none-eabi aarch64-none-elf aarch64_be-none-elf riscv32-unknown-elf riscv64-unknown-elf "
    "msp430-none-elf mips-unknown-elf mipsel-unknown-elf powerpc-unknown-elf hexagon-unknown-elf i386-unknown-elf"
).split()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder for each layout, with a model of every type, and what uses it."""
    folders = {}
    for layout in ("split", "header"):
        folders[layout] = tmp_path_factory.mktemp(layout)
        models.write(models.model_of("types_zoo"), folders[layout], layout=layout)
        copy(HERE / "user.c", folders[layout])
    return folders


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize(("command", "warnings", "standard", "packages"), CASES)
def test_standard(generated, command, warnings, standard, packages, layout):
    words = command.split()
    need(words[:1], packages)
    language = ["-x", "c++"] if "++" in words[0] else []
    sources = sorted(path.name for path in generated[layout].glob("*.c"))
    call([*words, f"-std={standard}", "-O1", *warnings, *language, "-c", *sources], generated[layout])


@pytest.fixture(scope="module")
def in_styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of every type in each style, the source files called after these."""
    folder = tmp_path_factory.mktemp("styles")
    for style in (*STYLES, "embed"):
        models.write(models.model_of("types_zoo"), folder, style, style=style)
    return folder


@pytest.mark.parametrize(("command", "warnings", "standard", "packages"), HOSTED)
def test_standard_of_styles(in_styles, command, warnings, standard, packages):
    need([command], packages)
    language = ["-x", "c++"] if "++" in command else []
    sources = [f"{style}.c" for style in (*STYLES, *(["embed"] if command in EMBEDDING else ()))]
    call([command, f"-std={standard}", "-O1", *warnings, *language, "-c", *sources], in_styles)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_processor(generated, processor):
    need(["clang-19"], "clang-19")
    sources = sorted(path.name for path in generated["split"].glob("*.c"))
    words = ["clang-19", f"--target={processor}", "-std=c99", "-O1", "-ffreestanding"]
    call([*words, *C_WARNINGS, "-c", *sources], generated["split"])


@pytest.mark.parametrize("processor", ["atmega328p", "atmega2560"])
def test_avr_without_progmem(tmp_path, processor):
    """Small models may lie in RAM. `int` has 16 bits here."""
    need(["avr-gcc"], "gcc-avr avr-libc")
    models.write(models.model_of("cnn_int4_per_channel"), tmp_path)
    copy(HERE / "user.c", tmp_path)
    call(["avr-gcc", f"-mmcu={processor}", "-std=c99", "-Os", *C_WARNINGS, "-c", "weights.c", "user.c"], tmp_path)
