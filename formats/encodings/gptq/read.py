"""GPTQ (gptqmodel 7.7, auto-gptq 0.7): `<module>.qweight`, `.qzeros`, `.scales` and, most often, `.g_idx`.

    qweight int32 (I * bits / 32, O)     word r, bits [bits * j, bits * (j + 1)): row r * (32 / bits) + j of the input
    qzeros  int32 (G, O * bits / 32)     likewise along the outputs
    scales  float (G, O)
    g_idx   int32 (I)                    the group of each row of the input

    weight[o, i] = scales[g_idx[i], o] * (code - zero), rounded once to the dtype of the scales

In `checkpoint_format` "gptq" (v1; also where there is none) the stored zero is one less: the writer subtracts 1 from
every field of the whole word, so that a zero of 0 borrows from its neighbour; adding it back with carry undoes that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import UNSIGNED, is_float
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor
from nibblecast.formats.encodings.bytes.rows import by_rows, columns_in_words, transposed, turned
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.values.parameters import group_index, value_dtype

METHODS = frozenset(("gptq", "auto-round", "intel/auto-round"))

#: A one in every field of a word: what version 1 has subtracted from words of zeros.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_OTHER_LAYOUTS = ("marlin", "bitblas", "exl2", "exllamav2")
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def claims(stored: WeightTensors) -> bool:
    """Whether the outputs run along the words of `qweight`, and not in them (as AWQ's do)."""
    qweight, scales = stored.get(".qweight"), stored.get(".scales")
    if qweight is None or scales is None or stored.get(".qzeros") is None:
        return False
    return len(qweight.shape) == len(scales.shape) == 2 and qweight.shape[1] == scales.shape[1]


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I). Raises Unsupported for other layouts under the same name, and for 3, 5, 6 and 7
    bits; CorruptFile where shapes, groups or configuration do not fit."""
    qweight, qzeros, scales = stored[".qweight"], stored[".qzeros"], stored[".scales"]
    layout = stored.setting("checkpoint_format", str, "gptq")
    if layout in _OTHER_LAYOUTS:
        raise Unsupported(f"is in the layout '{layout}' of GPTQ: save it in 'gptq' or 'gptq_v2' with gptqmodel")
    if layout not in ("gptq", "gptq_v2"):
        raise Unsupported(f"is in the layout '{layout}' of GPTQ, which is not supported")
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32 or not is_float(scales.dtype):
        raise CorruptFile(f"has qweight of {qweight.dtype}, qzeros of {qzeros.dtype} and scales of {scales.dtype}")
    groups, outputs = scales.shape
    bits = _bits(stored, qzeros, groups, outputs)
    inputs = qweight.shape[0] * 32 // bits
    dtype = UNSIGNED[bits]

    def codes(first: int, last: int) -> NDArray[Any]:
        return turned(qweight.numpy()[:, first:last])

    data = by_rows((outputs, inputs), dtype, codes, qweight.data, in_order=False)
    added = 0 if layout == "gptq_v2" else ONES[bits]
    zero_point = columns_in_words("zero_point", qzeros, outputs, dtype, added=added)
    scale = transposed("scale", scales, (outputs, groups))
    grouping = _grouping(stored, inputs, groups)
    quantization = Quantization(
        scale, (1, grouping.size), zero_point, group_index=grouping.index, value_dtype=value_dtype(scales.dtype)
    )
    tensor = Tensor(f"{stored.prefix}.weight", (outputs, inputs), dtype, data, quantization)
    return DecodedWeight(tensor, _PARTS)


def _bits(stored: WeightTensors, qzeros: Tensor, groups: int, outputs: int) -> int:
    """Bits of a code: what the width of the zeros says, and the configuration must, too."""
    words = qzeros.shape[1] if len(qzeros.shape) == 2 and qzeros.shape[0] == groups else 0
    bits = words * 32 // outputs if outputs else 0
    told = stored.setting("bits", int, bits)
    if bits != told:
        raise CorruptFile(f"has zeros of shape {qzeros.shape} for {outputs} outputs: {bits} bits, not {told}")
    if bits not in UNSIGNED or words * 32 != bits * outputs:
        raise Unsupported(f"has codes of {bits} bits: 2, 4 and 8 are read")
    return bits


@dataclass(frozen=True, slots=True, eq=False)
class _Grouping:
    """How many inputs share a scale, or which group each has."""

    size: int
    index: GroupIndex | None = None


def _grouping(stored: WeightTensors, inputs: int, groups: int) -> _Grouping:
    told = stored.setting("group_size", int, -1)
    g_idx = stored.get(".g_idx")
    size = told if told > 0 else max(1, inputs)
    if g_idx is None:
        if max(1, -(-inputs // size)) != groups:
            raise CorruptFile(f"has {groups} groups of scales for {inputs} inputs in groups of {size}")
        return _Grouping(min(size, max(1, inputs)))
    kept = replace(g_idx, name="group_index", shape=(g_idx.size,))
    index = group_index(kept, inputs, groups)
    for candidate in dict.fromkeys((size, max(1, -(-inputs // max(1, groups))))):
        if max(1, -(-inputs // candidate)) == groups and np.array_equal(index, np.arange(inputs) // candidate):
            return _Grouping(min(candidate, max(1, inputs)))
    return _Grouping(max(1, -(-inputs // max(1, groups))), GroupIndex(1, kept))
