"""What compiling an array costs in each style of data, in time and in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

import nibblecast
from benchmarks.measure import Row, processes_by_turns
from nibblecast.converters.ir import Model, Tensor

TEXT_STYLES = ("words32", "words64", "string", "incbin")
COMPILERS = (
    ("gcc -O2", TEXT_STYLES),
    ("arm-none-eabi-gcc -ffreestanding -mcpu=cortex-m4 -Os", TEXT_STYLES),
    ("clang-19 -O2", (*TEXT_STYLES, "embed")),
)
_MIB = 4


def rows(folder: Path) -> list[Row]:
    """An array of 4 MiB in each style against the same array in bytes, by the same compiler."""
    data = np.random.default_rng(0).integers(0, 256, _MIB << 20, np.uint8)
    model = Model({"weights": Tensor.from_array("weights", data)})
    for style in ("bytes", *TEXT_STYLES, "embed"):
        nibblecast.save(model, folder / f"as_{style}.h", style=style)
    return [row for compiler, styles in COMPILERS for row in _compiled(folder, compiler, styles)]


def _compiled(folder: Path, compiler: str, styles: tuple[str, ...]) -> list[Row]:
    words = compiler.split()
    if shutil.which(words[0]) is None:
        return [Row(f"compile {_MIB} MiB: {compiler}", "not installed", "", "")]

    def command(style: str) -> list[str]:
        return [*words, f"-I{folder}", "-c", str(folder / f"as_{style}.c"), "-o", str(folder / "out.o")]

    measured = processes_by_turns([command(style) for style in ("bytes", *styles)], rounds=3)
    base, *figures = (f"{seconds:.2f} s, {peak / 1e6:.0f} MB" for seconds, peak in measured)
    found = []
    for style, ours, (seconds, peak) in zip(styles, figures, measured[1:], strict=True):
        what = f"compile {_MIB} MiB: {compiler}, style {style}, against bytes"
        ratio = f"{seconds / measured[0][0]:.2g}, memory {peak / measured[0][1]:.2f}"
        found.append(Row(what, ours, base, ratio))
    return found
