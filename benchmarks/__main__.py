"""`python -m benchmarks`: runs everything, prints the table and puts it into benchmarks/README.md."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import converters
from benchmarks import quantize
from benchmarks.measure import Row, by_turns, command, table
from converters.ir import Model, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "fixtures/tflite/cnn_int4_per_channel.tflite"
README = Path(__file__).parent / "README.md"


def start_up(folder: Path) -> list[Row]:
    """A whole conversion of a small model against importing NumPy, process for process."""
    rows = []
    for suffix, wanted in ((".h", "at most 2.5"), (".safetensors", ""), (".onnx", "")):
        convert = [sys.executable, "-m", "converters", "convert", str(MODEL), str(folder / f"w{suffix}")]
        ours, peer = by_turns(command(convert), command([sys.executable, "-c", "import numpy"]), rounds=15)
        what = f"start-up: convert a 3 KB .tflite to {suffix}, against `python -c 'import numpy'`"
        rows.append(Row(what, f"{ours * 1e3:.0f} ms", f"{peer * 1e3:.0f} ms", f"{ours / peer:.2f}", wanted))
    return rows


def c_text(folder: Path) -> list[Row]:
    """C text of packed codes against `xxd -i` of as many bytes, both whole processes, in megabytes of text a second;
    both wait until it is on the disk."""
    if shutil.which("xxd") is None:
        return [Row("C text against `xxd -i`", "", "xxd is not installed", "", "at least 4")]
    nbytes = 1 << 26
    payload = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    (folder / "payload.bin").write_bytes(payload.tobytes())
    bytes_of = Tensor.from_array("weights", payload)
    scale = Tensor.from_array("scale", np.array([0.5], np.float32))
    quantization = Quantization(scale, (2 * nbytes,))
    packed = Tensor("weights", (2 * nbytes,), np.dtype(ml_dtypes.int4), bytes_of.data, quantization)
    converters.save(Model({"weights": packed}), folder / "weights.safetensors")
    convert = [sys.executable, "-m", "converters", "convert", str(folder / "weights.safetensors"), str(folder / "w.h")]
    xxd = ["sh", "-c", f"xxd -i {folder}/payload.bin {folder}/xxd.h && sync {folder}/xxd.h"]
    ours, peer = by_turns(command(convert), command(xxd), rounds=5)
    sizes = [(folder / name).stat().st_size for name in ("w.c", "xxd.h")]
    speeds = [size / seconds / 1e6 for size, seconds in zip(sizes, (ours, peer), strict=True)]
    what = "C text: 64 MiB of codes to a .c file, against `xxd -i` and `sync`"
    return [Row(what, *(f"{s:.0f} MB/s" for s in speeds), f"{speeds[0] / speeds[1]:.1f}", "at least 4")]


def dequantize() -> list[Row]:
    """Codes to a new array of float32 in one thread, against copying as many float32 values to a new array."""
    shape = (4096, 8192)
    rng = np.random.default_rng(0)
    source = rng.random(shape, np.float32)

    def tensor(dtype: Any, block_shape: tuple[int, ...], zero_point: bool = False) -> Tensor:
        grid = grid_shape(shape, block_shape)
        codes = rng.integers(0, 2, shape, np.int8).astype(dtype)
        zeros = Tensor.from_array("z", rng.integers(-8, 8, grid, np.int8)) if zero_point else None
        quantization = Quantization(Tensor.from_array("s", rng.random(grid, np.float32)), block_shape, zeros)
        return Tensor.from_array("w", codes, quantization)

    rows = []
    for what, weight in (
        ("int4 per tensor", tensor(ml_dtypes.int4, per_tensor(shape))),
        ("int4 per channel", tensor(ml_dtypes.int4, per_axis(shape, 0))),
        ("int4 in blocks of 128", tensor(ml_dtypes.int4, blocked(shape, 1, 128))),
        ("int4 in blocks of 32", tensor(ml_dtypes.int4, blocked(shape, 1, 32))),
        ("int4 in blocks of 32, zero points", tensor(ml_dtypes.int4, blocked(shape, 1, 32), zero_point=True)),
        ("int2 per channel", tensor(ml_dtypes.int2, per_axis(shape, 0))),
        ("int8 per channel", tensor(np.int8, per_axis(shape, 0))),
    ):
        ours, peer = by_turns(lambda weight=weight: weight.dequantize(np.float32), source.copy, 9)  # type: ignore[misc]
        speeds = [source.nbytes / seconds / 1e9 for seconds in (ours, peer)]
        name = f"dequantize {what} to float32, against copying an array"
        rows.append(Row(name, *(f"{s:.1f} GB/s" for s in speeds), f"{speeds[0] / speeds[1]:.2f}", "at least 0.33"))
    return rows


def main() -> None:
    """Runs all benchmarks."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [*start_up(folder), *c_text(folder), *dequantize(), *quantize.rows(folder)]
    text = table(rows)
    print(text)
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    machine = f"{system}, Python {platform.python_version()}, NumPy {np.__version__}"
    result = f"<!-- results -->\n{text}\n\nMeasured on {machine}.\n<!-- end -->"
    README.write_text(re.sub(r"<!-- results -->.*<!-- end -->", lambda _: result, README.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
