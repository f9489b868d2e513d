"""Writes a model as C, compiles it as users' projects do, runs it, and reads what it printed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.interfaces import Plan
from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.formats.cheader.writer import CHeaderOptions, CHeaderWriter
from tests import zoo
from tests.tools import need

WARNINGS = (
    "-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wcast-qual -Wcast-align -Werror".split()
)
C_WARNINGS = ["-Wmissing-prototypes", "-Wstrict-prototypes"]
CPP_WARNINGS = ["-Wold-style-cast"]

MODES = {
    "gcc c99": ["gcc", "-std=c99", *C_WARNINGS],
    "gcc c11": ["gcc", "-std=c11", *C_WARNINGS],
    "g++ c++17": ["g++", "-std=c++17", "-Wuseless-cast", *CPP_WARNINGS],
    "clang c99": ["clang", "-std=c99", *C_WARNINGS],
    "clang c11": ["clang", "-std=c11", *C_WARNINGS],
    "clang++ c++17": ["clang++", "-std=c++17", *CPP_WARNINGS],
}
#: The packages of commands that are not called like theirs.
PACKAGES = {"clang++": "clang", "clang++-19": "clang-19"}
WALK = Path(__file__).parent / "walk.c"


def model_of(*tensors: Tensor, **metadata: Any) -> Model:
    return Model({tensor.name: tensor for tensor in tensors}, Metadata(**metadata))


def plan_of(model: Model, target: Path, **options: Any) -> Plan:
    return CHeaderWriter().plan(model, target, CHeaderOptions(**options))


def write(model: Model, target: Path, **options: Any) -> list[Path]:
    """The files written, that of the payload last; each must have the planned size."""
    plan = zoo.write(CHeaderWriter(), model, target, CHeaderOptions(**options))
    assert all(file.nbytes is not None for file in plan.files)
    return sorted((file.path for file in plan.files), key=lambda path: path.suffix == ".bin")


def compile_objects(mode: str, sources: Sequence[Path], *flags: str) -> list[Path]:
    """Object files beside the sources, without a warning."""
    command = MODES[mode]
    need(command[:1], PACKAGES.get(command[0], command[0]))
    objects = []
    for source in sources:
        objects.append(source.with_suffix(f".{mode.replace(' ', '.')}.o"))
        language = ["-x", "c++"] if "++" in command[0] else []
        arguments = [*command, *WARNINGS, *flags, *language, "-c", str(source), "-o", str(objects[-1])]
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]
    return objects


def run(mode: str, objects: Sequence[Path], *flags: str) -> str:
    """What the program of these objects prints."""
    program = objects[0].with_suffix(".exe")
    subprocess.run([MODES[mode][0], *flags, *map(str, objects), "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def walked(mode: str, files: Sequence[Path], prefix: str, *flags: str) -> list[tuple[str, NDArray[np.float32]]]:
    """Every tensor's name and values, as the generated table and getters give them."""
    folder = files[0].parent
    program = Path(shutil.copy(WALK, folder / f"walk_{prefix}.c"))
    defines = [
        f'-DWEIGHTS="{files[0].name}"',
        f"-DTENSORS={prefix}_tensors",
        f"-DTENSOR_COUNT={prefix}_TENSOR_COUNT",
    ]
    objects = compile_objects(mode, [program], *defines, *flags)
    objects += compile_objects(mode, [file for file in files if file.suffix == ".c"], *flags)
    tensors = []
    for line in run(mode, objects, *flags).split("\n")[:-1]:
        name, *values = line.split(" ")
        bits = np.array([int(value, 16) for value in values], np.uint32)
        tensors.append((bytes.fromhex(name).decode("utf-8", "surrogatepass"), bits.view(np.float32)))
    return tensors


def assert_same_values(tensors: Sequence[tuple[str, NDArray[np.float32]]], model: Model) -> None:
    """Bit for bit, save that one NaN is as good as another and that a C string ends at a NUL. Tensors that are only
    parameters of others have no place in C."""
    weights = [tensor for tensor in model.values() if tensor.parameter_of not in model]
    assert [name for name, _ in tensors] == [tensor.name.partition("\0")[0] for tensor in weights]
    for (name, values), tensor in zip(tensors, weights, strict=True):
        with np.errstate(all="ignore"):  # random scales overflow
            expected = tensor.dequantize(np.float32).reshape(-1)
        different = (values.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(values) & np.isnan(expected))
        assert not different.any(), f"{name}: {values[different][:4]} for {expected[different][:4]}"
