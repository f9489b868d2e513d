"""Many small models: `batch` against a shell's loop over `convert`, and two workers against one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.measure import Row, processes_by_turns

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tflite"
_MODELS = 3000
_LOOPED = 30


def rows(folder: Path) -> list[Row]:
    """TFLite models of some KB, whole processes; the loop has fewer of them, and what one takes is compared."""
    sources = [path for path in sorted(FIXTURES.rglob("*.tflite")) if not path.name.startswith("external_")]
    models = folder / "models"
    models.mkdir()
    for number in range(_MODELS):
        shutil.copy(sources[number % len(sources)], models / f"{number:05}.tflite")
    python = f"'{sys.executable}' -m converters"
    loop = f"""for number in $(seq 0 {_LOOPED - 1}); do
        name=$(printf %05d $number)
        {python} convert '{models}'/$name.tflite '{folder}'/loop/$name.safetensors || true
    done"""
    (folder / "loop").mkdir()
    batch = f"rm -rf '{folder}/out'; {python} batch '{models}' '{folder}/out' --to safetensors --jobs"
    commands = [["sh", "-c", command] for command in (loop, f"{batch} 2; true", f"{batch} 1; true")]
    (looped, _), (two, _), (one, _) = processes_by_turns(commands, rounds=3)
    speeds = [60 * count / seconds for count, seconds in ((_LOOPED, looped), (_MODELS, two), (_MODELS, one))]
    shown = [f"{speed:.0f} models a minute" for speed in speeds]
    return [
        Row(
            "batch: small models, two workers, against a loop over convert",
            shown[1],
            shown[0],
            f"{speeds[1] / speeds[0]:.1f}",
            "at least 5",
        ),
        Row(
            "batch: small models, two workers, against one",
            shown[1],
            shown[2],
            f"{speeds[1] / speeds[2]:.2f}",
            "at least 1.7",
        ),
    ]
