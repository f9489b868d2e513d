"""Decoding in one pass of compiled code, if numba is installed (`nibblecast[fast]`) and there is much to decode.

It does the same operations in the same order as `decoding` does with NumPy, and gives the same bits. NumPy makes a pass
through the cache for each operation, numba one for all of them. Importing numba takes longer than converting a small
model, so it is used only when a process decodes much, or is about to. Until it is imported, NumPy decodes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, SUB_BYTE, UINT4, UINT8
from nibblecast.converters.errors import Notice, UsageError

if TYPE_CHECKING:  # imported when there is much to decode
    from threading import Thread

#: Up to this many elements NumPy decodes, because compiling would take longer. In the environment, "0" always uses
#: compiled code, "never" never does.
_WORTH = os.environ.get("NIBBLECAST_COMPILE_AFTER", str(1 << 27))
#: Shorter blocks, and fewer elements at once, are not worth the calls.
_SHORTEST_BLOCK = 8
_EXACT = 1 << 23

_KINDS: Mapping[np.dtype[Any], str] = MappingProxyType(
    {UINT4: "UNSIGNED4", INT4: "SIGNED4", UINT8: "UNSIGNED8", INT8: "SIGNED8"}
)
_OPERATIONS: Mapping[np.ufunc, str] = MappingProxyType(
    {np.subtract: "SUBTRACT", np.multiply: "MULTIPLY", np.add: "ADD"}
)
_ROUNDED: Mapping[np.dtype[Any] | None, str] = MappingProxyType(
    {None: "KEPT", FLOAT16: "FLOAT16", BFLOAT16: "BFLOAT16"}
)
_GIVEN: Mapping[np.dtype[Any], str] = MappingProxyType({FLOAT32: "KEPT", FLOAT16: "FLOAT16", BFLOAT16: "BFLOAT16"})
_decoded = _expected = 0  # elements

#: An operation, its parameter, which broadcasts to the view, and what its result is rounded to.
Operation = tuple[np.ufunc, NDArray[Any], np.dtype[Any] | None]


def decode(
    packed: NDArray[np.uint8],
    dtype: np.dtype[Any],
    table: NDArray[np.float32] | None,
    steps: Sequence[Operation],
    view_shape: tuple[int, ...],
    out: NDArray[Any],
) -> bool:
    """Writes the values of elements of `dtype` to `out`, shape (n,); they are looked up in `table` if there is one.
    Returns False, with nothing done, if compiled code does not apply."""
    loops = _kernels(out.size)
    if loops is None or (table is None and dtype not in _KINDS):
        return False
    blocks = _blocks(steps, view_shape)
    block = out.size // max(1, blocks)
    per_byte = 8 // SUB_BYTE[dtype][0] if dtype in SUB_BYTE else 1
    exact = all(step.dtype.kind == "f" or int(np.abs(step).max(initial=0)) < _EXACT for _, step, _ in steps)
    if not blocks or block < _SHORTEST_BLOCK or block % per_byte or not exact:
        return False
    parameters = np.empty((len(steps), blocks), np.float32)
    for row, (_, parameter, _) in zip(parameters, steps, strict=True):
        row[...] = np.repeat(parameter.reshape(-1), blocks // parameter.size)
    stored = loops.TABLE if table is not None else getattr(loops, _KINDS[dtype])
    looked_up = np.zeros(1, np.float32) if table is None else np.ascontiguousarray(table).reshape(-1)
    is_float32 = out.dtype == np.float32
    loops.decode(
        packed,
        stored,
        looked_up,
        per_byte,
        np.array([getattr(loops, _OPERATIONS[operation]) for operation, _, _ in steps], np.int64),
        parameters,
        np.array([getattr(loops, _ROUNDED[rounded]) for _, _, rounded in steps], np.int64),
        block,
        getattr(loops, _GIVEN[out.dtype]),
        out if is_float32 else np.empty(0, np.float32),
        np.empty(0, np.uint16) if is_float32 else out.view(np.uint16),
    )
    return True


def _blocks(steps: Sequence[Operation], view_shape: tuple[int, ...]) -> int:
    """The number of runs of equal length such that each operation has one parameter per run; 0 if there are no such
    runs in the order of the parameters."""
    most = 1
    for _, parameter, _ in steps:
        split = next((axis for axis, size in enumerate(parameter.shape) if size != view_shape[axis]), parameter.ndim)
        if any(size != 1 for size in parameter.shape[split:]):
            return 0
        most = max(most, prod(parameter.shape[:split]))
    return most


def expect(nbytes: int) -> None:
    """Announces that so many bytes are about to be written; decoded values may be a part of them."""
    global _expected
    _expected = nbytes // 4


def is_used() -> bool:
    """Whether compiled code decodes now; then other modules may import theirs too."""
    return _kernels(0) is not None


def _kernels(count: int) -> Any:
    """The compiled functions; None if they are not loaded (yet), or too little is decoded and expected."""
    global _decoded
    if _WORTH == "never":
        return None
    if not _WORTH.isdecimal():
        raise UsageError(f"NIBBLECAST_COMPILE_AFTER={_WORTH}: must be a number of elements, or never")
    _decoded += count
    if _WORTH != "0" and max(_decoded, _expected) <= int(_WORTH):
        return None
    loading, kernels = _loading()
    if _WORTH == "0":
        loading.join()
    return None if loading.is_alive() else kernels[0]


@cache
def _loading() -> tuple[Thread, list[Any]]:
    """A thread that imports the compiled functions while NumPy decodes, and the list that it puts them in."""
    from threading import Thread

    kernels: list[Any] = []
    loading = Thread(target=lambda: kernels.append(_imported()))
    loading.start()
    return loading, kernels


def _imported() -> Any:
    if not find_spec("numba"):
        return None
    try:
        return import_module("nibblecast.converters.arithmetic.compiled_kernels")
    except Exception as error:  # built for another NumPy, no folder for the cache, or any other failure of a compiler
        warnings.warn(f"numba is not used, and decoding takes longer: {error}", Notice, stacklevel=2)
        return None
