"""Many models: `batch` against a shell's loop over `convert`, and two workers against one."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.measure import Row, processes_by_turns

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tflite"
_MODELS = 10_000
_LOOPED = 30
_LARGER = 500
_LARGER_SHAPE = (1024, 1024)
_IN_MEMORY = Path("/dev/shm")
_PYTHON = f"'{sys.executable}' -m nibblecast"


def rows(folder: Path) -> list[Row]:
    """Whole processes; the loop has fewer models, and what one takes is compared. Files lie in memory where that is
    possible: what is left is what the program does."""
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY if _IN_MEMORY.is_dir() else folder) as place:
        return [*_small(Path(place)), *_larger(Path(place))]


def _small(folder: Path) -> list[Row]:
    sources = [path for path in sorted(FIXTURES.rglob("*.tflite")) if not path.name.startswith("external_")]
    models = folder / "models"
    models.mkdir()
    for number in range(_MODELS):
        shutil.copy(sources[number % len(sources)], models / f"{number:05}.tflite")
    loop = f"""for number in $(seq 0 {_LOOPED - 1}); do
        name=$(printf %05d $number)
        {_PYTHON} convert '{models}'/$name.tflite '{folder}'/loop/$name.safetensors || true
    done"""
    (folder / "loop").mkdir()
    looped, two, one = _speeds([loop, *_batches(models, "--to safetensors")], [_LOOPED, _MODELS, _MODELS])
    return [
        _row("batch: TFLite models of some KB, two workers, against a loop over convert", two, looped, "at least 5"),
        _row("batch: TFLite models of some KB, two workers, against one", two, one, "at least 1.7"),
    ]


def _larger(folder: Path) -> list[Row]:
    models = folder / "larger"
    models.mkdir()
    weight = np.random.default_rng(0).standard_normal(_LARGER_SHAPE, np.float32)
    save_file({"weight": weight}, models / "00000.safetensors")
    for number in range(1, _LARGER):
        (models / f"{number:05}.safetensors").hardlink_to(models / "00000.safetensors")
    commands = _batches(models, "--to safetensors --quantize int4,block=32 --verify")
    two, one = _speeds(commands, [_LARGER, _LARGER])
    return [_row("batch: models of 4 MB quantized and verified, two workers, against one", two, one, "at least 1.7")]


def _batches(models: Path, options: str) -> list[str]:
    """The commands for two workers and for one."""
    target = models.with_name("out")
    return [f"rm -rf '{target}'; {_PYTHON} batch '{models}' '{target}' {options} --jobs {n}; true" for n in (2, 1)]


def _speeds(commands: Sequence[str], counts: Sequence[int]) -> list[float]:
    """Models a minute of each command."""
    runs = processes_by_turns([["sh", "-c", command] for command in commands], rounds=3)
    return [60 * count / seconds for count, (seconds, _) in zip(counts, runs, strict=True)]


def _row(what: str, ours: float, peer: float, wanted: str) -> Row:
    return Row(what, f"{ours:.0f} models a minute", f"{peer:.0f} models a minute", f"{ours / peer:.2f}", wanted)
