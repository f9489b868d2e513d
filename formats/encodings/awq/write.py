"""AWQ's GEMM layout, the way back: weights of `formats.encodings.awq` and the configuration that is read with them.

transformers 5.23 (with gptqmodel 7.7) replaces every linear layer of a model by one of AWQ's, but for the one that
computes logits and what `modules_to_not_convert` names; gptqmodel on its own reads `dynamic` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import INT32, UINT4
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.awq.read import PER_WORD, PLACES
from nibblecast.formats.encodings.bytes.column_blocks import ColumnBlocks
from nibblecast.formats.encodings.bytes.rows import turned
from nibblecast.formats.encodings.module_names import HEADS, Modules, last_part, linear_module
from nibblecast.formats.encodings.values.refit import computed, integer_quantization
from nibblecast.formats.encodings.values.row_groups import GroupSizes, common_size, notes_on, row_groups
from nibblecast.formats.encodings.writable import Configuration, Encoded

#: The sizes that gptqmodel's kernels take (nn_modules/qlinear/torch_awq.py).
_KERNEL_SIZES = frozenset((-1, 16, 32, 64, 128))


def encode(weight: Tensor) -> Encoded:
    """The weight, of shape (O, I), with codes of 4 bits, as qweight, qzeros and scales.

    Raises Unsupported for other codes, codebooks, offsets, zero points outside 0 to 15, groups that are not equal or do
    not lie along the inputs, outputs that fill no words, and what is no linear layer's weight.
    """
    module = linear_module(weight)
    if last_part(module) in HEADS:
        message = "computes logits, by its name, and the libraries that read AWQ keep that layer plain"
        raise Unsupported(message, tensor=weight.name)
    rows = row_groups(weight)
    quantization, (outputs, inputs) = rows.quantization, rows.weight.shape
    size = quantization.block_shape[1]
    if rows.weight.dtype != UINT4:
        raise Unsupported(f"has codes of {weight.dtype}: AWQ's GEMM layout is of 4 bits", tensor=weight.name)
    if quantization.group_index is not None:
        raise Unsupported("has a group index, which AWQ has not", tensor=weight.name)
    if inputs % size or outputs % PER_WORD:
        message = f"has shape {(outputs, inputs)} and groups of {size}: AWQ needs equal groups, and words of 8 outputs"
        raise Unsupported(message, tensor=weight.name)
    scale = quantization.scale
    stored = (
        Tensor(f"{module}.qweight", (inputs, outputs // PER_WORD), INT32, _columns(rows.weight)),
        _qzeros(f"{module}.qzeros", rows.zero_point),
        computed(f"{module}.scales", scale.shape[::-1], scale.dtype, lambda: scale.numpy().T, scale.data),
    )
    sizes = GroupSizes(size, size, is_row=size == inputs)
    return Encoded(rows.weight, {tensor.name: tensor for tensor in stored}, sizes, rows.losses)


def configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
    """AWQ's part of config.json. Raises Unsupported where weights differ in group size."""
    size = common_size({name: encoded.setting for name, encoded in weights.items()})
    modules = Modules.of(weights, plain)
    config: dict[str, Any] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "modules_to_not_convert": modules.names_of_plain() or None,
        **({"dynamic": modules.patterns_of_plain()} if modules.plain else {}),
    }
    quantizations = {name: integer_quantization(encoded.weight) for name, encoded in weights.items()}
    return Configuration({"quantization_config": config}, notes=tuple(notes_on(quantizations, size, _KERNEL_SIZES)))


def _words(codes: NDArray[Any]) -> NDArray[np.int32]:
    """Codes of shape (outputs, k) in words of shape (k, outputs / 8)."""
    of_word = codes.reshape(-1, PER_WORD, codes.shape[1])
    words = np.zeros((of_word.shape[0], codes.shape[1]), np.uint32)
    for output, place in enumerate(PLACES):
        words |= of_word[:, output].astype(np.uint32) << np.uint32(4 * place)
    return turned(words).view(np.int32)


def _columns(weight: Tensor) -> ColumnBlocks:
    return ColumnBlocks(replace(weight, quantization=None), 1, weight.shape[0] // 2, _words)


def _qzeros(key: str, zero_point: Tensor) -> Tensor:
    outputs, groups = zero_point.shape
    make = lambda: _words(zero_point.codes())  # noqa: E731
    return computed(key, (groups, outputs // PER_WORD), INT32, make, zero_point.data)
