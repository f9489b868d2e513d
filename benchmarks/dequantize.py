"""How fast codes become values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.measure import Row, by_turns
from nibblecast.converters.ir import Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor


def rows(folder: Path) -> list[Row]:
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

    found = []
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
        found.append(Row(name, *(f"{s:.1f} GB/s" for s in speeds), f"{speeds[0] / speeds[1]:.2f}", "at least 0.33"))
    return found
