"""How floats become codes: the dtype, which elements share a scale, and how scales are chosen.

As text, in any order: `int4,block=32,asymmetric,mse` or `int8,per-channel` or `int4,axis=0,narrow,scale=float16`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from nibblecast.converters.arithmetic.dtypes import (
    FLOAT32,
    FLOAT_DTYPES,
    INT2,
    INT4,
    INT8,
    UINT2,
    UINT4,
    UINT8,
    bits_of,
    is_signed,
)
from nibblecast.converters.arithmetic.rounding import Codes
from nibblecast.converters.errors import UsageError

#: What floats can become, by name.
CODE_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {dtype.name: dtype for dtype in (INT2, UINT2, INT4, UINT4, INT8, UINT8)}
)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale for each position along `axis`; None: along the output channels of the operator that uses it."""

    axis: int | None = None

    def __str__(self) -> str:
        return "per-channel" if self.axis is None else f"axis={self.axis}"


@dataclass(frozen=True, slots=True)
class Blocked:
    """One scale for each `size` elements along `axis`; None: along the inputs of the operator that uses the weight."""

    size: int
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"block={self.size}: must be at least 1")

    def __str__(self) -> str:
        return f"block={self.size}" + ("" if self.axis is None else f",axis={self.axis}")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How floats become codes; docs/quantize.md gives the formulas.

    `narrow` leaves out the lowest code, so that the range is symmetric (-7..7 for int4) and no scale is negative.
    `scales` are chosen from the smallest and the largest value ("minmax") or by the least mean square error ("mse").
    `requantize` also takes tensors that are quantized already. `only` and `excepted` are shell patterns of the names of
    weights to quantize (all, if it is empty) and to leave unchanged. Raises UsageError for an impossible dtype.
    """

    dtype: np.dtype[Any]
    granularity: PerTensor | PerAxis | Blocked = PerAxis()
    symmetric: bool = True
    narrow: bool = False
    scales: Literal["minmax", "mse"] = "minmax"
    scale_dtype: np.dtype[Any] = FLOAT32
    requantize: bool = False
    only: tuple[str, ...] = ()
    excepted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in CODE_DTYPES.values():
            raise UsageError(f"cannot quantize to {self.dtype}: use {', '.join(CODE_DTYPES)}")
        if self.scale_dtype not in FLOAT_DTYPES.values():
            raise UsageError(f"cannot have scales of {self.scale_dtype}: use {', '.join(FLOAT_DTYPES)}")

    def __str__(self) -> str:
        words = [
            self.dtype.name,
            str(self.granularity),
            "symmetric" if self.symmetric else "asymmetric",
            *(["narrow"] if self.narrow else []),
            *(["mse"] if self.scales == "mse" else []),
            *([f"scale={self.scale_dtype}"] if self.scale_dtype != np.float32 else []),
            *(["requantize"] if self.requantize else []),
            *([f"only={'|'.join(self.only)}"] if self.only else []),
            *([f"except={'|'.join(self.excepted)}"] if self.excepted else []),
        ]
        return ",".join(words)

    def takes(self, name: str) -> bool:
        """Whether a weight of that name is to be quantized."""
        chosen = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self.excepted)

    @property
    def codes(self) -> Codes:
        """The part of the scheme that the arithmetic needs."""
        return Codes(
            self.lowest,
            self.middle,
            self.highest,
            self.symmetric,
            self.narrow,
            self.scales == "mse",
            self.scale_dtype,
        )

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype of unpacked codes, one byte each."""
        return INT8 if is_signed(self.dtype) else UINT8

    @property
    def middle(self) -> int:
        """The code of zero in symmetric schemes: 0 for signed codes, 8 for uint4."""
        return 0 if is_signed(self.dtype) else 1 << (bits_of(self.dtype) - 1)

    @property
    def lowest(self) -> int:
        """The lowest code in use."""
        return self.middle - (1 << (bits_of(self.dtype) - 1)) + self.narrow

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.middle + (1 << (bits_of(self.dtype) - 1)) - 1


_WORDS: Mapping[str, Callable[[Scheme], Scheme]] = MappingProxyType(
    {
        "per-tensor": lambda scheme: replace(scheme, granularity=PerTensor()),
        "per-channel": lambda scheme: replace(scheme, granularity=PerAxis()),
        "symmetric": lambda scheme: replace(scheme, symmetric=True),
        "asymmetric": lambda scheme: replace(scheme, symmetric=False),
        "full": lambda scheme: replace(scheme, narrow=False),
        "narrow": lambda scheme: replace(scheme, narrow=True),
        "minmax": lambda scheme: replace(scheme, scales="minmax"),
        "mse": lambda scheme: replace(scheme, scales="mse"),
        "requantize": lambda scheme: replace(scheme, requantize=True),
    }
)
_EXCLUSIVE = (
    ("per-tensor", "per-channel", "block"),
    ("per-tensor", "axis"),
    ("symmetric", "asymmetric"),
    ("full", "narrow"),
    ("minmax", "mse"),
)
_WITH_VALUE = ("block", "axis", "scale", "only", "except")
_MOST_DIGITS = 18
_POSSIBLE = (
    f"{', '.join(CODE_DTYPES)}; {', '.join(_WORDS)}, block=N, axis=N, scale={'|'.join(FLOAT_DTYPES)}, only=NAMES, "
    "except=NAMES"
)


def parse_scheme(text: str) -> Scheme:
    """The scheme that a text like "int4,block=32,asymmetric" describes. By default, scales are per channel, float32 and
    min-max, and unsigned codes are asymmetric. Raises UsageError, which says what is possible."""
    words = _words(text)
    dtypes = [word for word in words if word in CODE_DTYPES]
    if len(dtypes) != 1:
        raise _refused(text, f"name one of {', '.join(CODE_DTYPES)}")
    dtype = CODE_DTYPES[dtypes[0]]
    scheme = Scheme(dtype, symmetric=is_signed(dtype))
    for word in words:
        scheme = _WORDS.get(word, _unchanged)(scheme)
    scheme = replace(scheme, only=_patterns(words, "only"), excepted=_patterns(words, "except"))
    axis = _number(text, words, "axis")
    block = _number(text, words, "block")
    if block is not None:
        scheme = replace(scheme, granularity=Blocked(block, axis))
    elif axis is not None:
        scheme = replace(scheme, granularity=PerAxis(axis))
    if "scale" not in words:
        return scheme
    if words["scale"] not in FLOAT_DTYPES:
        raise _refused(text, f"scale={words['scale']}: use {', '.join(FLOAT_DTYPES)}")
    return replace(scheme, scale_dtype=FLOAT_DTYPES[words["scale"]])


def _words(text: str) -> dict[str, str]:
    """The words of a scheme, each with the text after its equals sign."""
    words: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.strip().partition("=")
        known = key in _WITH_VALUE if equals else key in _WORDS or key in CODE_DTYPES
        if not known:
            raise _refused(text, f"'{word.strip()}' is not one of {_POSSIBLE}")
        if key in words:
            raise _refused(text, f"'{key}' is given twice")
        words[key] = value
    for group in _EXCLUSIVE:
        both = [word for word in words if word in group]
        if len(both) > 1:
            raise _refused(text, f"'{both[0]}' and '{both[1]}' cannot be combined")
    return words


def _patterns(words: Mapping[str, str], key: str) -> tuple[str, ...]:
    return tuple(pattern for pattern in words.get(key, "").split("|") if pattern)


def _unchanged(scheme: Scheme) -> Scheme:
    return scheme


def _number(text: str, words: Mapping[str, str], key: str) -> int | None:
    if key not in words:
        return None
    digits = words[key].removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS):
        raise _refused(text, f"{key}={words[key]}: must be a whole number")
    return int(words[key])


def _refused(text: str, why: str) -> UsageError:
    return UsageError(f"quantize '{text}': {why}")
