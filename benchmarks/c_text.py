"""How fast C is written, and how much memory that takes, in each style of data."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import converters
from benchmarks.measure import Row, processes_by_turns, seconds_and_peak
from converters.ir import Model, Quantization, Tensor

STYLES = ("bytes", "words32", "words64", "string", "incbin")
_MIB = 1 << 20


def rows(folder: Path) -> list[Row]:
    """64 MiB of codes against `xxd -i` of as many bytes, whole processes, in megabytes that are written in a second:
    text, and for incbin the .bin file."""
    if shutil.which("xxd") is None:
        return [Row("C text against `xxd -i`", "", "xxd is not installed", "")]
    (folder / "payload.bin").write_bytes(np.random.default_rng(0).bytes(64 * _MIB))
    _save_model(folder, 64 * _MIB)
    xxd = ["xxd", "-i", str(folder / "payload.bin"), str(folder / "xxd.h")]
    *ours, (peer, _) = processes_by_turns([*(_conversion(folder, style) for style in STYLES), xxd], rounds=5)
    peer_speed = (folder / "xxd.h").stat().st_size / peer / 1e6
    found = []
    for style, (seconds, _) in zip(STYLES, ours, strict=True):
        speed = sum(file.stat().st_size for file in folder.glob(f"{style}.*")) / seconds / 1e6
        wanted = "at least 4" if style == "bytes" else ""
        what = f"C text: 64 MiB of codes, style {style}, against `xxd -i`"
        found.append(Row(what, f"{speed:.0f} MB/s", f"{peer_speed:.0f} MB/s", f"{speed / peer_speed:.1f}", wanted))
    return [*found, _memory(folder)]


def _memory(folder: Path) -> Row:
    """What writing 512 MiB of codes takes, against what writing 1 MiB takes."""
    peaks = []
    for nbytes in (512 * _MIB, _MIB):
        _save_model(folder, nbytes)
        peaks.append(seconds_and_peak(_conversion(folder, "bytes"))[1])
    what = "C text: peak memory for 512 MiB of codes, against 1 MiB"
    return Row(what, *(f"{peak / 1e6:.0f} MB" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}", "at most 1.5")


def _save_model(folder: Path, nbytes: int) -> None:
    """One int4 tensor that takes so many bytes."""
    codes = Tensor.from_array("codes", np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8))
    shape = (2 * nbytes // 4096, 4096)
    quantization = Quantization(Tensor.from_array("scale", np.array([[0.5]], np.float32)), shape)
    weights = Tensor("weights", shape, np.dtype(ml_dtypes.int4), codes.data, quantization)
    converters.save(Model({"weights": weights}), folder / "weights.safetensors")


def _conversion(folder: Path, style: str) -> list[str]:
    source, target = folder / "weights.safetensors", folder / f"{style}.h"
    return [sys.executable, "-m", "converters", "convert", str(source), str(target), "--opt", f"style={style}"]
