"""bitsandbytes' LLM.int8() (0.50): `<module>.weight`, `.SCB` and `.weight_format`.

weight           int8 (O, I)
SCB              float32 (O): the largest magnitude of each row
weight_format    0: the rows are in their order; others were for GPUs' kernels before 0.45

weight[o, i] = (weight[o, i] * SCB[o]) * float32(1 / 127), each operation rounded to float32
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Quantization, per_axis
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors

METHODS = frozenset(("bitsandbytes", "bitsandbytes_8bit"))

_FACTOR = float(np.float32(7.874015718698502e-3))
_PARTS = (".weight", ".SCB", ".weight_format")


def claims(stored: WeightTensors) -> bool:
    """Whether there is a weight beside the magnitudes."""
    return stored.get(".weight") is not None


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I), its codes int8. Raises CorruptFile where shapes, dtypes or the configuration do not
    fit, Unsupported for rows in another order."""
    weight, magnitudes, order = stored[".weight"], stored[".SCB"], stored.get(".weight_format")
    if weight.dtype != np.int8 or len(weight.shape) != 2:
        raise CorruptFile(f"has codes of {weight.dtype} and shape {weight.shape}: a matrix of int8 is needed")
    if magnitudes.dtype != np.float32 or magnitudes.size != weight.shape[0]:
        raise CorruptFile(f"has SCB of {magnitudes.size} {magnitudes.dtype} for {weight.shape[0]} rows")
    if order is not None and (order.size != 1 or order.numpy().item() != 0):
        raise Unsupported("is in the order of a GPU's kernel: save it again with bitsandbytes 0.45 or later")
    if stored.checkpoint.config and stored.setting("load_in_8bit", bool, True) is not True:
        raise CorruptFile("has load_in_8bit False in its configuration, but its tensors are LLM.int8()'s")
    scale = replace(magnitudes, name="scale", shape=(weight.shape[0], 1))
    quantization = Quantization(scale, per_axis(weight.shape, 0), factor=_FACTOR)
    return DecodedWeight(replace(weight, quantization=quantization), _PARTS)
