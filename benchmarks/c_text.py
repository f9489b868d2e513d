"""How fast C is written, and how much memory that takes, in each style of data and for each kind of number."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import nibblecast
from benchmarks.measure import Row, processes_by_turns, seconds_and_peak
from nibblecast.converters.ir import Model, Quantization, Tensor

STYLES = ("bytes", "words32", "words64", "string", "incbin")
NUMBERS = ("int32", "int64", "float32", "float64")
_MIB = 1 << 20


def rows(folder: Path) -> list[Row]:
    """64 MiB of codes, and of numbers, against `xxd -i` of as many bytes, whole processes, in megabytes that are
    written in a second: text, and for incbin the .bin file."""
    if shutil.which("xxd") is None:
        return [Row("C text against `xxd -i`", "", "xxd is not installed", "")]
    (folder / "payload.bin").write_bytes(np.random.default_rng(0).bytes(64 * _MIB))
    _save_model(folder, 64 * _MIB)
    _save_numbers(folder, 64 * _MIB)
    xxd = ["xxd", "-i", str(folder / "payload.bin"), str(folder / "xxd.h")]
    conversions = [_conversion(folder, style) for style in STYLES]
    conversions += [_conversion(folder, "bytes", source=kind, target=kind) for kind in NUMBERS]
    *ours, (peer, _) = processes_by_turns([*conversions, xxd], rounds=5)
    peer_speed = (folder / "xxd.h").stat().st_size / peer / 1e6
    found = []
    for name, (seconds, _) in zip((*STYLES, *NUMBERS), ours, strict=True):
        speed = sum(file.stat().st_size for file in folder.glob(f"{name}.[hcb]*")) / seconds / 1e6
        wanted = "at least 4" if name == "bytes" else ""
        what = f"C text: 64 MiB of {f'codes, style {name}' if name in STYLES else name}, against `xxd -i`"
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
    nibblecast.save(Model({"weights": weights}), folder / "weights.safetensors")


def _save_numbers(folder: Path, nbytes: int) -> None:
    """One tensor of each kind that takes so many bytes: integers of all bits, floats as weights have them."""
    rng = np.random.default_rng(0)
    for kind in NUMBERS:
        dtype = np.dtype(kind)
        if dtype.kind == "i":
            numbers = np.frombuffer(rng.bytes(nbytes), dtype)
        else:
            numbers = rng.normal(0, 0.05, nbytes // dtype.itemsize).astype(dtype)
        nibblecast.save(Model({"weights": Tensor.from_array("weights", numbers)}), folder / f"{kind}.safetensors")


def _conversion(folder: Path, style: str, source: str = "weights", target: str = "") -> list[str]:
    model, header = folder / f"{source}.safetensors", folder / f"{target or style}.h"
    return [sys.executable, "-m", "nibblecast", "convert", str(model), str(header), "--opt", f"style={style}"]
