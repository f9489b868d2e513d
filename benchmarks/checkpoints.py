"""Checkpoints of language models: kernels against the libraries' own, and whole conversions against copying the output.

NIBBLECAST_BENCHMARK_GB is the size of each output (4), and NIBBLECAST_BENCHMARK_LARGE_GB that of the one whose peak
memory is compared with that of half a gigabyte (the same; 8 is worth asking for).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np

from benchmarks import checkpoint_files as files
from benchmarks.checkpoint_peers import PEERS
from benchmarks.measure import Row, by_turns, seconds_and_peak
from nibblecast.converters.arithmetic import compiled
from nibblecast.converters.ir import Tensor
from nibblecast.converters.machine import keep_freed_memory
from nibblecast.converters.output.streaming import pieces_of
from nibblecast.converters.storage import InMemory
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint
from nibblecast.formats.gguf.blocks import BLOCK_TYPES, BlockData

#: What conversions write.
TARGET = "out"

_GIGABYTES = float(os.environ.get("NIBBLECAST_BENCHMARK_GB", "4"))
_LARGE_GIGABYTES = float(os.environ.get("NIBBLECAST_BENCHMARK_LARGE_GB", _GIGABYTES))
_SMALL_GIGABYTES = 0.5
_ROUNDS = 3
_WEIGHTS = 4
_ELEMENTS = files.OUTPUTS * files.INPUTS
_PIECE_BYTES = 1 << 23
_ITEM_BYTES = {"": 0.5, "float32": 4, "bfloat16": 2, "float16": 2}

#: ggml's types: the number, and where float16 numbers are in a block.
_GGUF = {"Q4_0": (2, (0,)), "Q8_0": (8, (0,)), "Q4_K": (12, (0, 2)), "Q6_K": (14, (208,))}
_LAYERS: dict[str, Callable[[], files.Layer]] = {
    "GPTQ": files.gptq,
    "AWQ": files.awq,
    "compressed-tensors": files.compressed_tensors,
    "NF4": lambda: files.nf4("bfloat16"),
    "NF4 of float16": lambda: files.nf4("float16"),
    "MLX": files.mlx,
}
_KERNELS = (
    ("GPTQ", "float16"),
    ("AWQ", "float16"),
    ("compressed-tensors", "bfloat16"),
    ("NF4", "bfloat16"),
    ("MLX", "bfloat16"),
    *((kind, "float32") for kind in _GGUF),
)
_CONVERSIONS = (
    ("GPTQ", "", "at most 1.5"),
    ("GPTQ", "float16", "at most 2"),
    ("GPTQ", "bfloat16", "at most 1.5"),
    ("compressed-tensors", "bfloat16", "at most 1.5"),
    ("compressed-tensors", "float16", "at most 2"),
    ("NF4", "bfloat16", "at most 1.5"),
    ("NF4 of float16", "float16", "at most 2"),
    ("Q4_0", "float32", "at most 1.5"),
    ("Q4_K", "float32", "at most 1.5"),
)


def rows(folder: Path) -> list[Row]:
    return [*_kernels(), *_conversions(folder), *_memory(folder)]


def _kernels() -> list[Row]:
    keep_freed_memory()  # as the command line does
    compiled.expect(1 << 40)
    while find_spec("numba") and not compiled.is_used():
        time.sleep(0.1)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # PyTorch's threads would wait by keeping the processors busy
    found = []
    for kind, dtype in _KERNELS:
        values = _weight(kind).dequantized(getattr(ml_dtypes, dtype, None) or dtype)
        what = f"decode {kind}, {files.OUTPUTS} x {files.INPUTS}, to {dtype}"
        name, peer = PEERS[kind](_stored(kind))
        if peer is None:
            found.append(Row(what, "", f"pip install {name}", ""))
            continue
        seconds = by_turns(lambda values=values: _exhaust(values), lambda peer=peer: _repeat(peer), 7)  # type: ignore[misc]
        speeds = [_WEIGHTS * values.nbytes / each / 1e9 for each in seconds]
        shown = (f"{speed:.2f} GB/s" for speed in speeds)
        found.append(Row(f"{what}, against {name}", *shown, f"{speeds[0] / speeds[1]:.1f}", "at least 3"))
    return found


def _stored(kind: str) -> files.Layer | np.ndarray:
    if kind not in _GGUF:
        return _LAYERS[kind]()
    number, scales = _GGUF[kind]
    return files.gguf_blocks(BLOCK_TYPES[number].elements, BLOCK_TYPES[number].nbytes, scales)


def _weight(kind: str) -> Tensor:
    stored = _stored(kind)
    if isinstance(stored, np.ndarray):
        type_ = BLOCK_TYPES[_GGUF[kind][0]]
        shape = (files.OUTPUTS, files.INPUTS)
        return type_.tensor(BlockData("w", shape, type_.elements, type_.nbytes, InMemory(stored.reshape(-1))))
    tensors = {f"m{suffix}": Tensor.from_array(f"m{suffix}", array) for suffix, array in stored.parts.items()}
    return decode_checkpoint(Checkpoint(tensors, stored.config))[0]["m.weight"]


def _exhaust(values: Tensor) -> None:
    """What a conversion does with weights that are in memory, one after the other."""
    for _ in pieces_of([values] * _WEIGHTS, _PIECE_BYTES):
        pass


def _repeat(peer: Callable[[], object]) -> None:
    for _ in range(_WEIGHTS):
        peer()


def _conversions(folder: Path) -> list[Row]:
    """Whole processes; both wait until the output is on the disk, and what was there before is removed first."""
    found = []
    target, copy = folder / TARGET, folder / "copy"
    copying = ["sh", "-c", f"cp -r '{target}' '{copy}' && sync '{copy}'/*"]
    for kind, dtype, wanted in _CONVERSIONS:
        source, command = _conversion(folder, kind, dtype, _GIGABYTES)
        runs: list[tuple[tuple[float, int], tuple[float, int]]] = []
        for _ in range(_ROUNDS):
            _remove(target)
            ours = seconds_and_peak(command)
            _remove(copy)
            runs.append((ours, seconds_and_peak(copying)))
        ours_seconds, peak = (median(run[0][i] for run in runs) for i in (0, 1))
        theirs = median(run[1][0] for run in runs)
        what = f"convert {kind} to {dtype or 'its codes, packed'}, {_GIGABYTES:g} GB, against copying the output"
        figure = f"{ours_seconds:.2f} s, {peak / 1e6:.0f} MB"
        found.append(Row(what, figure, f"{theirs:.2f} s", f"{ours_seconds / theirs:.2f}", wanted))
        _remove(source, target, copy)
    return found


def _memory(folder: Path) -> list[Row]:
    found = []
    for kind, dtype in (("GPTQ", "bfloat16"), ("NF4 of float16", "float16"), ("Q4_K", "float32")):
        peaks = []
        for gigabytes in (_LARGE_GIGABYTES, _SMALL_GIGABYTES):
            source, command = _conversion(folder, kind, dtype, gigabytes)
            # numba takes 100 MB: both have it
            peaks.append(seconds_and_peak(["env", "NIBBLECAST_COMPILE_AFTER=0", *command])[1])
            _remove(source, folder / TARGET)
        what = f"peak memory, {kind} to {dtype}: {_LARGE_GIGABYTES:g} GB against {_SMALL_GIGABYTES:g} GB"
        shown = (f"{peak / 1e6:.0f} MB" for peak in peaks)
        found.append(Row(what, *shown, f"{peaks[0] / peaks[1]:.2f}", "at most 1.25"))
    return found


def _conversion(folder: Path, kind: str, dtype: str, gigabytes: float) -> tuple[Path, list[str]]:
    """A source whose conversion gives that much, and the command."""
    count = max(1, round(gigabytes * 1e9 / (_ELEMENTS * _ITEM_BYTES[dtype])))
    stored = _stored(kind)
    if isinstance(stored, np.ndarray):
        source = files.write_gguf(folder / "model.gguf", _GGUF[kind][0], stored, count)
    else:
        source = files.write_checkpoint(folder / "model", stored, count)
    command = [sys.executable, "-m", "nibblecast", "convert", str(source), str(folder / TARGET)]
    command += ["--to", "safetensors"]
    return source, [*command, "--dequantize", dtype] if dtype else command


def _remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
