"""torchao's Int8DynActInt4WeightLinear, what its QAT flow converted to before 0.9.

`<module>.weight` int8 (O, I) has a code of 4 bits in each byte, `.scales` and `.zeros` are float32 (O, G); values are
(code - zero) * scale in float32.
"""

from __future__ import annotations

import numpy as np

from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.torchao.read import dynamic_activation_linear

METHODS = frozenset(("torchao",))

_PARTS = (".weight", ".scales", ".zeros")


def claims(stored: WeightTensors) -> bool:
    """Whether there are all three, the weight of int8."""
    weight, scales, zeros = (stored.get(suffix) for suffix in _PARTS)
    if weight is None or scales is None or zeros is None:
        return False
    return weight.dtype == np.int8 and is_float(scales.dtype) and len(weight.shape) == len(scales.shape) == 2


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I). Raises CorruptFile where scales do not fit it."""
    name = f"{stored.prefix}.weight"
    weight, scales, zeros = (stored[suffix] for suffix in _PARTS)
    return DecodedWeight(dynamic_activation_linear(name, weight, scales, zeros), _PARTS)
