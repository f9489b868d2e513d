"""float64 values as C literals: Python's `repr`, which is the shortest decimal that reads back as the same float64.

`repr` makes about half a million literals per second. The table look-ups of the other notations are faster, but float64
is rare in models for firmware, and megabytes of it do not fit there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nibblecast.formats.cheader.literals.floats import INFINITY, NAN

#: Characters of the longest literal and its comma: "-1.2345678901234567e-300,".
WIDTH = 25


def literals(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """ASCII of each value of shape (n,), right-aligned and with a comma: shape (n, WIDTH).

    C has no literals for NaN and the infinities: they become the macros NIBBLECAST_NAN and NIBBLECAST_INF.
    """
    text = "".join(f"{_literal(value):>{WIDTH - 1}}," for value in values.tolist())
    return np.frombuffer(text.encode("ascii"), np.uint8).reshape(-1, WIDTH)


def _literal(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return NAN.decode() if math.isnan(value) else f"{'-' if value < 0 else ''}{INFINITY.decode()}"
