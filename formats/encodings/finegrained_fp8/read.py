"""float8 weights with a scale for each block, as DeepSeek-V3 and transformers' FineGrainedFP8 (quant_method "fp8").

    X              float8 (..., O, I), or float4 codes: uint8 or int8 (..., O, I / 2), the first one in the low nibble
    X_scale_inv    float (..., ceil(O / rows), ceil(I / columns)), or exponents of two in uint8 or float8_e8m0fnu

    X[o, i] = scale_inv[o // rows, i // columns] * code

X is `<module>.weight`, or the name of fused experts. In spite of its name the scale multiplies: in float32, rounded to
the dtype of the scales (transformers 5.23, integrations/finegrained_fp8.py, Fp8Dequantize). The configuration has the
blocks as `weight_block_size`; where it has none they divide the weight; exponents may be of groups of 32 inputs beside
that. DeepSeek-V4 calls the scales `<module>.scale`, Mistral `<module>.qscale_weight` (quantizer_finegrained_fp8.py):
there the configuration must name the method.
"""

from __future__ import annotations

from dataclasses import replace

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT8_E8M0, INT8, UINT8
from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import Quantization, Tensor, grid_shape, per_tensor
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors, is_size
from nibblecast.formats.encodings.values.parameters import FLOATS, exponents, float_scales, value_dtype

#: ModelOpt's checkpoints keep weights of DeepSeek's that it did not quantize as they were.
METHODS = frozenset(("fp8", "modelopt", "modelopt_fp4", "modelopt_mixed"))

_FLOATS8 = frozenset((FLOAT8_E4M3, FLOAT8_E5M2))
_BYTES = frozenset((UINT8, INT8))
_EXPONENTS = frozenset((UINT8, FLOAT8_E8M0))
_MX_BLOCK = (1, 32)

#: What follows the prefix in the names of codes and scales.
_NAMES = (("", "_scale_inv"), (".weight", ".scale"), (".weight", ".qscale_weight"))


def claims(stored: WeightTensors) -> bool:
    """Whether there are codes of small floats with such a scale; by the other names of scales only where the
    configuration says so."""
    names = _names(stored)
    if names is None or (names != _NAMES[0] and stored.checkpoint.method not in METHODS):
        return False
    codes, scale = (stored[name].dtype for name in names)
    return codes in _FLOATS8 or codes == FLOAT4 or (codes in _BYTES and scale in _EXPONENTS)


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of shape (..., O, I). Raises CorruptFile where shapes, dtypes or the configuration do not fit."""
    names = _names(stored)
    if names is None:
        raise CorruptFile("has no codes beside its scales")
    codes, scale = stored[names[0]], stored[names[1]]
    if len(codes.shape) < 2:
        raise CorruptFile(f"has codes of shape {codes.shape}, where a matrix is needed")
    rounded_to = value_dtype(scale.dtype) if scale.dtype in FLOATS else None
    scale = exponents(scale) if scale.dtype in _EXPONENTS else float_scales(scale)
    if codes.dtype in _BYTES:
        codes = replace(codes, shape=(*codes.shape[:-1], codes.shape[-1] * 2), dtype=FLOAT4)
    blocks = _block_shape(stored, codes.shape, scale)
    scale = replace(scale, name="scale", shape=grid_shape(codes.shape, blocks))
    quantization = Quantization(scale, blocks, value_dtype=rounded_to)
    return DecodedWeight(replace(codes, name=stored.prefix + names[0], quantization=quantization), names)


def _names(stored: WeightTensors) -> tuple[str, str] | None:
    for names in _NAMES:
        found = [stored.get(name) for name in names]
        if all(tensor is not None and tensor.quantization is None for tensor in found):
            return names
    return None


def _block_shape(stored: WeightTensors, shape: tuple[int, ...], scale: Tensor) -> tuple[int, ...]:
    """What shares a scale: the tensor, where there is one only; else the blocks that the configuration tells or, for
    exponents, groups of 32 inputs; where it tells nothing, the blocks into which the scales divide the weight."""
    if scale.size == 1:
        return per_tensor(shape)
    told = stored.setting("weight_block_size", list, None)
    if told is not None and not (len(told) == 2 and all(is_size(size) and size > 0 for size in told)):
        raise CorruptFile(f"has weight_block_size {brief(told)} in its configuration, where two sizes are needed")
    possible = [_MX_BLOCK] if scale.dtype == FLOAT8_E8M0 else []
    if told is not None:
        possible.append((told[0], told[1]))
    elif len(scale.shape) == len(shape) and 0 not in scale.shape:
        rows, columns = (size // count for size, count in zip(shape[-2:], scale.shape[-2:], strict=True))
        if (rows * scale.shape[-2], columns * scale.shape[-1]) == shape[-2:]:
            possible.append((rows, columns))
    for rows, columns in possible:
        blocks = (*(1,) * (len(shape) - 2), max(1, min(rows, shape[-2])), max(1, min(columns, shape[-1])))
        if grid_shape(shape, blocks) == scale.shape:
            return blocks
    raise CorruptFile(
        f"has scales of shape {scale.shape} for the shape {shape}, but its configuration says weight_block_size {told}"
    )
