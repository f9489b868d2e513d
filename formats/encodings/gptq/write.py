"""GPTQ, the way back: weights of `formats.encodings.gptq` and the configuration that their libraries read.

Read in gptqmodel 7.7 and optimum 2.3, through which transformers 5.23 loads GPTQ: gptqmodel takes version 1, whose
stored zeros are one less, of symmetric models only; asymmetric ones are "gptq_v2". Both replace all linear layers of a
stack of blocks that the configuration does not except: optimum by `modules_in_block_to_quantize`, gptqmodel (and vLLM)
by the negative patterns of `dynamic`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import INT32, UINT32
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor
from nibblecast.converters.version import __version__
from nibblecast.formats.encodings.bytes.column_blocks import ColumnBlocks
from nibblecast.formats.encodings.bytes.rows import turned
from nibblecast.formats.encodings.gptq.read import ONES
from nibblecast.formats.encodings.module_names import HEADS, Modules, last_part, linear_module, stack_of
from nibblecast.formats.encodings.values.parameters import group_index
from nibblecast.formats.encodings.values.refit import computed, elementwise, integer_quantization
from nibblecast.formats.encodings.values.row_groups import GroupSizes, common_size, notes_on, row_groups, sizes_for
from nibblecast.formats.encodings.writable import Configuration, Encoded

#: The sizes that gptqmodel's kernels take (nn_modules/qlinear/torch.py).
_KERNEL_SIZES = frozenset((-1, 16, 32, 64, 128, 256, 512, 1024))


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """Of one weight what a model has one of. `is_symmetric`: every zero is the middle of the codes."""

    bits: int
    sizes: GroupSizes
    is_symmetric: bool
    is_act_order: bool
    zero_point: Tensor


def encode(weight: Tensor) -> Encoded:
    """The weight, of shape (O, I), with codes of 2, 4 or 8 bits, as qweight, qzeros (of version 1), scales and g_idx.

    Raises Unsupported for other codes, codebooks, offsets, zero points outside the codes, groups that do not lie along
    the inputs, sizes that fill no words, and what is no linear layer's weight.
    """
    module = linear_module(weight)
    rows = row_groups(weight)
    bits, (outputs, inputs) = rows.weight.bits, rows.weight.shape
    if outputs * bits % 32 or inputs * bits % 32:
        message = f"has shape {(outputs, inputs)}: GPTQ's words of {32 // bits} codes need multiples of that of both"
        raise Unsupported(message, tensor=weight.name)
    sizes, quantization = _grouped(weight.name, inputs, rows.quantization)
    kept = replace(rows.weight, quantization=quantization)
    stored = (
        _qweight(f"{module}.qweight", kept),
        _qzeros(f"{module}.qzeros", rows.zero_point, ONES[bits]),
        _scales(f"{module}.scales", quantization.scale),
        _g_idx(f"{module}.g_idx", inputs, quantization),
    )
    middle = 1 << bits - 1
    is_act_order = quantization.group_index is not None
    setting = _Setting(bits, sizes, rows.zeros == (middle, middle), is_act_order, rows.zero_point)
    return Encoded(kept, {tensor.name: tensor for tensor in stored}, setting, rows.losses)


def configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
    """GPTQ's part of config.json, which is in quantize_config.json, too; and the zeros of asymmetric models, as they
    are. Raises Unsupported where weights differ in bits or in group size."""
    settings: dict[str, _Setting] = {name: encoded.setting for name, encoded in weights.items()}
    size = common_size({name: setting.sizes for name, setting in settings.items()})
    is_symmetric = all(setting.is_symmetric for setting in settings.values())
    layout = "gptq" if is_symmetric else "gptq_v2"
    modules = Modules.of(weights, plain)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": _common_bits(settings),
        "group_size": size,
        "desc_act": any(setting.is_act_order for setting in settings.values()),
        "act_group_aware": False,
        "sym": is_symmetric,
        "true_sequential": True,
        "lm_head": any(last_part(module) in HEADS for module in modules.quantized),
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"nibblecast:{__version__}"]},
        **_excepted(modules),
    }
    quantizations = {name: integer_quantization(encoded.weight) for name, encoded in weights.items()}
    return Configuration(
        {"quantization_config": config},
        {"quantize_config.json": config},
        notes=(*notes_on(quantizations, size, _KERNEL_SIZES), *_notes(modules, is_symmetric)),
        stored={} if is_symmetric else {zeros.name: zeros for zeros in _zeros_of_version_2(weights)},
    )


def _grouped(name: str, inputs: int, quantization: Quantization) -> tuple[GroupSizes, Quantization]:
    """The group sizes that mean these groups, and the groups as they are read: without an index where that is the one
    of groups in order."""
    groups, block_shape, index = quantization.scale.shape[1], quantization.block_shape, quantization.group_index
    sizes = sizes_for(inputs, groups)
    if index is None:
        return sizes if sizes and sizes.is_row else GroupSizes(block_shape[1], block_shape[1]), quantization
    if index.axis != 1 or block_shape[0] != 1:
        message = (
            f"has a group index along axis {index.axis} of blocks of {block_shape}, where one along rows is needed"
        )
        raise Unsupported(message, tensor=name)
    if sizes is None:
        raise Unsupported(f"has {groups} groups for {inputs} inputs, which no group size gives", tensor=name)
    places = group_index(index.index, inputs, groups)
    size = int(np.argmax(places != 0)) if places.any() else inputs
    if size and -(-inputs // size) == groups and np.array_equal(places, np.arange(inputs) // size):
        in_order = replace(quantization, block_shape=(1, size), group_index=None)
        return sizes if sizes.is_row else GroupSizes(size, size), in_order
    kept = GroupIndex(1, elementwise(replace(index.index, name="group_index"), INT32, lambda stored: stored))
    return sizes, replace(quantization, block_shape=(1, sizes.smallest), group_index=kept)


def _qweight(key: str, weight: Tensor) -> Tensor:
    """The rows' words as columns."""
    outputs, words = weight.shape[0], weight.shape[1] * weight.bits // 32
    data = ColumnBlocks(Tensor(weight.name, (outputs, words), UINT32, weight.data), 1, outputs * 4, turned)
    return Tensor(key, (words, outputs), INT32, data)


def _qzeros(key: str, zero_point: Tensor, subtracted: int) -> Tensor:
    """The zero points of each group in words, of which `subtracted` is subtracted, modulo 2 ** 32."""
    (outputs, groups), bits = zero_point.shape, zero_point.bits

    def make() -> NDArray[Any]:
        zeros = np.ascontiguousarray(zero_point.codes().T)
        packed = zeros.reshape(-1) if bits == 8 else pack(zeros, bits)
        return (packed.view(UINT32) - np.uint32(subtracted)).view(INT32)

    return computed(key, (groups, outputs * bits // 32), INT32, make, zero_point.data)


def _scales(key: str, scale: Tensor) -> Tensor:
    outputs, groups = scale.shape
    return computed(key, (groups, outputs), scale.dtype, lambda: scale.numpy().T, scale.data)


def _g_idx(key: str, inputs: int, quantization: Quantization) -> Tensor:
    index, size = quantization.group_index, quantization.block_shape[1]
    if index is not None:
        return replace(index.index, name=key)
    return computed(key, (inputs,), INT32, lambda: np.arange(inputs) // size)


def _zeros_of_version_2(weights: Mapping[str, Encoded]) -> Iterator[Tensor]:
    for encoded in weights.values():
        key = next(key for key in encoded.stored if key.endswith(".qzeros"))
        yield _qzeros(key, encoded.setting.zero_point, 0)


def _common_bits(settings: Mapping[str, _Setting]) -> int:
    least = min(settings, key=lambda name: settings[name].bits)
    most = max(settings, key=lambda name: settings[name].bits)
    if settings[least].bits != settings[most].bits:
        raise Unsupported(
            f"has codes of {settings[most].bits} bits, but '{least}' of {settings[least].bits}: GPTQ has one width for "
            "a model; --quantize makes them alike",
            tensor=most,
        )
    return settings[most].bits


def _excepted(modules: Modules) -> dict[str, Any]:
    """What says that some linear layers of the blocks are plain; nothing where none seems to be."""
    within = modules.in_blocks()
    if not within.plain:
        return {}
    return {
        "modules_in_block_to_quantize": [within.names_of_quantized()],
        "dynamic": within.patterns_of_plain(),
    }


def _notes(modules: Modules, is_symmetric: bool) -> Iterator[str]:
    if not is_symmetric:
        yield (
            "zero points differ, so that the checkpoint format is 'gptq_v2': gptqmodel, and transformers with it, read "
            "it; auto-gptq does not"
        )
    stack = next((found for found in map(stack_of, modules.quantized) if found is not None), None)
    others = [module for module in modules.quantized if stack is None or stack_of(module) != stack]
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        yield f"transformers looks for GPTQ's weights in one stack of blocks only: not for '{others[0]}'{more}"
