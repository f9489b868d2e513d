"""AWQ's GEMM layout (autoawq 0.2.9, modules/linear/gemm.py): `<module>.qweight`, `.qzeros`, `.scales`, of 4 bits.

    qweight int32 (I, O / 8)     word c, bits [4 * j, 4 * (j + 1)): output 8 * c + (0, 2, 4, 6, 1, 3, 5, 7)[j]
    qzeros  int32 (G, O / 8)     likewise
    scales  float (G, O)

    weight[o, i] = scales[i // group_size, o] * (code - zero), rounded once to the dtype of the scales

gptqmodel and auto-round write it too; autoawq's other layouts are for single kernels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nibblecast.converters.arithmetic.dtypes import UINT4
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.bytes.rows import columns_in_words, transposed
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.values.parameters import float_scales, group_size, value_dtype

METHODS = frozenset(("awq", "auto-round", "intel/auto-round"))

#: How many codes a word has.
PER_WORD = 8
#: Where in a word each of its outputs is.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: What the configuration calls layouts of this shape; "exllama" and "ipex" are rearranged when they are loaded.
_GEMM = frozenset(("gemm", "exllama", "exllamav2", "ipex"))
_OTHER_LAYOUTS = frozenset(("gemv", "gemv_fast", "marlin", "llm-awq"))
_PARTS = (".qweight", ".qzeros", ".scales")
_GEMM_NEEDED = "quantize the model with version 'GEMM'"


def claims(stored: WeightTensors) -> bool:
    """Whether the outputs lie in the words of `qweight`, or the configuration says AWQ."""
    qweight, scales = stored.get(".qweight"), stored.get(".scales")
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return False
    return stored.checkpoint.method == "awq" or _is_gemm(qweight, scales) or _other_layout(stored) != ""


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (O, I). Raises Unsupported for other layouts under the same name and for other than 4 bits;
    CorruptFile where shapes, groups or configuration do not fit."""
    qweight, scales = stored[".qweight"], float_scales(stored[".scales"])
    layout = _layout(stored) or _other_layout(stored) or "gemm"
    if layout in _OTHER_LAYOUTS:
        raise Unsupported(f"is in the layout '{layout}' of AWQ, for one GPU kernel: {_GEMM_NEEDED}")
    if layout not in _GEMM:
        raise Unsupported(f"is in the layout '{layout}' of AWQ, which is not supported: {_GEMM_NEEDED}")
    bits = stored.setting("bits", int, 4)
    if bits != 4:
        raise Unsupported(f"has codes of {bits} bits: AWQ's GEMM layout is of 4")
    qzeros = stored[".qzeros"]
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32:
        raise CorruptFile(f"has qweight of {qweight.dtype} and qzeros of {qzeros.dtype}, where int32 is needed")
    groups, outputs = scales.shape
    inputs = qweight.shape[0]
    if not _is_gemm(qweight, scales) or qzeros.shape != (groups, outputs // PER_WORD):
        raise CorruptFile(
            f"has qweight of shape {qweight.shape}, qzeros of {qzeros.shape} and scales of {scales.shape}: "
            "(I, O / 8), (G, O / 8) and (G, O) are needed"
        )
    size = group_size(stored.setting("group_size", int, 0), inputs, groups)
    quantization = Quantization(
        transposed("scale", scales, (outputs, groups)),
        (1, size),
        columns_in_words("zero_point", qzeros, outputs, UINT4, fields=PLACES),
        value_dtype=value_dtype(scales.dtype),
    )
    codes = columns_in_words(f"{stored.prefix}.weight", qweight, outputs, UINT4, fields=PLACES)
    return DecodedWeight(replace(codes, quantization=quantization), _PARTS)


def _is_gemm(qweight: Tensor, scales: Tensor) -> bool:
    return qweight.shape[1] * PER_WORD == scales.shape[1]


def _layout(stored: WeightTensors) -> str:
    """What the configuration calls the layout, in lower case; empty where it does not say. autoawq has it in `version`,
    gptqmodel in `checkpoint_format` or `format`."""
    if stored.checkpoint.method != "awq":
        return ""
    names = (stored.setting(key, str, "") for key in ("version", "checkpoint_format", "format"))
    return next((name.lower() for name in names if name), "")


def _other_layout(stored: WeightTensors) -> str:
    """The layout for one kernel that the tensors are in; empty where they are in none. Marlin's tiles have no zeros;
    gemv_fast has zeros that are floats, of words of 16 bits."""
    qweight, scales, qzeros = stored[".qweight"], stored[".scales"], stored.get(".qzeros")
    if qzeros is None:
        return "marlin" if qweight.shape[1] == scales.shape[1] * 2 else ""
    if qweight.dtype == np.int16:
        return "gemv_fast"
    in_words = qweight.shape[1] in (scales.shape[1], scales.shape[1] // PER_WORD)
    return "gemv" if qweight.shape[:1] == scales.shape[:1] == qzeros.shape[:1] and not in_words else ""
