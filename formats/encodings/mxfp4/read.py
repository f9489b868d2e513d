"""The experts of gpt-oss (transformers 5.23, integrations/mxfp4.py): `<name>_blocks` and `<name>_scales`.

    _blocks uint8 (E, O, I / 32, 16)    float4 codes, the first one of a byte in its low nibble
    _scales uint8 (E, O, I / 32)        exponents of two, plus 127

The weight is named `<name>`, and keeps the orientation of the file, (E, O, I); transformers transposes it.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np

from nibblecast.converters.arithmetic.dtypes import FLOAT4
from nibblecast.converters.errors import CorruptFile
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.values.parameters import exponents, small_floats

METHODS = frozenset(("mxfp4",))

_PARTS = ("_blocks", "_scales")
_BLOCK = 32


def claims(stored: WeightTensors) -> bool:
    """Whether there are blocks of 16 bytes, and scales."""
    blocks, scales = stored.get("_blocks"), stored.get("_scales")
    return (
        blocks is not None and scales is not None and blocks.dtype == np.uint8 and blocks.shape[-1:] == (_BLOCK // 2,)
    )


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (..., O, I). Raises CorruptFile where blocks and scales do not fit."""
    blocks, scales = stored["_blocks"], stored["_scales"]
    if len(blocks.shape) < 3 or scales.shape != blocks.shape[:-1]:
        raise CorruptFile(
            f"has _blocks of shape {blocks.shape} and _scales of {scales.shape}: (..., O, I / 32, 16) and "
            "(..., O, I / 32) are needed",
            tensor=stored.prefix,
        )
    packed = replace(blocks, shape=(*blocks.shape[:-2], prod(blocks.shape[-2:])))
    return DecodedWeight(small_floats(stored.prefix, FLOAT4, packed, exponents(scales), _BLOCK), _PARTS)
