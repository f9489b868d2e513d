"""ModelOpt's fused experts (0.47, torch/export/unified_export_hf.py): `<name>` and `<name>_weight_scale`.

    NVFP4    codes uint8, two float4 in a byte, first in the low nibble;
             _weight_scale float8 for 16 of them, multiplied by _weight_scale_2
             (E, I / 2, O) and (E, I / 16, O): Llama 4 and gpt-oss, whose weights are (E, I, O)
             (E, O, I / 2) and (E, O, I / 16): others, by Megatron's exporter
    MXFP4    codes uint8 (E, A, B / 2); _weight_scale uint8 (E, A, B / 32), exponents
    MXFP8    codes float8 (E, A, B); _weight_scale likewise
    FP8      codes float8 (E, A, B); _weight_scale of the tensor, of experts (E), of channels (E, A) or (E, B)

The weight is named `<name>` as the model's own parameter, and has its orientation. Scales of a single expert have lost
their first axis (quant_utils.py). int4 ones are not read: whether their rows are inputs or outputs, no file tells.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from nibblecast.converters.arithmetic.dtypes import FLOAT4, FLOAT8_E4M3, UINT8
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Quantization, Tensor, grid_shape, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.rows import paired_rows
from nibblecast.formats.encodings.checkpoint import DecodedWeight, WeightTensors
from nibblecast.formats.encodings.modelopt.read import METHODS, MX_BLOCK, NVFP4_BLOCK, agree, nested
from nibblecast.formats.encodings.values.parameters import FLOATS, exponents, small_floats

__all__ = ["METHODS", "claims", "decode"]

_SCALE, _OUTER = "_weight_scale", "_weight_scale_2"
_PARTS = ("", _SCALE, _OUTER)


def claims(stored: WeightTensors) -> bool:
    """Whether there are codes of experts, and scales of the dtypes that tell what they are."""
    codes, scale = stored.get(""), stored.get(_SCALE)
    if codes is None or scale is None or len(codes.shape) != 3:
        return False
    if codes.dtype == UINT8:
        return scale.dtype in (FLOAT8_E4M3, UINT8)
    return codes.dtype == FLOAT8_E4M3 and (scale.dtype in FLOATS or scale.dtype == UINT8)


def decode(stored: WeightTensors) -> DecodedWeight:
    """The weight, of three axes. Raises CorruptFile where shapes, dtypes or configuration do not fit, Unsupported where
    scales could be of either channel."""
    codes, scale = stored[""], stored[_SCALE]
    name = stored.prefix
    if len(scale.shape) == 2 and codes.shape[0] == 1:
        scale = replace(scale, shape=(1, *scale.shape))
    if scale.dtype == FLOAT8_E4M3:
        agree(stored, "nvfp4", NVFP4_BLOCK)
        return DecodedWeight(_nvfp4(name, codes, scale, stored[_OUTER]), _PARTS)
    if scale.dtype == UINT8:
        agree(stored, "mxfp4" if codes.dtype == UINT8 else "mxfp8", MX_BLOCK)
        dtype = FLOAT4 if codes.dtype == UINT8 else codes.dtype
        return DecodedWeight(small_floats(name, dtype, codes, exponents(scale), MX_BLOCK), _PARTS)
    agree(stored, "fp8", None)
    blocks = _blocks(codes.shape, scale.shape)
    scale = replace(scale, name="scale", shape=grid_shape(codes.shape, blocks))
    return DecodedWeight(replace(codes, quantization=Quantization(scale, blocks)), _PARTS)


def _nvfp4(name: str, codes: Tensor, scale: Tensor, outer: Tensor) -> Tensor:
    """Of inputs along the second axis or along the last one: shapes of codes and scales agree on one of them only."""
    experts, rows, columns = codes.shape
    scales = nested(scale, outer)
    if scale.shape != (experts, -(-rows * 2 // NVFP4_BLOCK), columns):
        return small_floats(name, FLOAT4, codes, scales, NVFP4_BLOCK)
    return replace(paired_rows(name, codes, FLOAT4), quantization=Quantization(scales, (1, NVFP4_BLOCK, 1)))


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    experts, rows, columns = shape
    if prod(scales) == 1:
        return per_tensor(shape)
    if scales in ((experts,), (experts, 1), (experts, 1, 1)):
        return per_axis(shape, 0)
    if scales == (experts, columns) and rows == columns:
        raise Unsupported(f"has scales of shape {scales} for codes of shape {shape}, which could be of either axis")
    if scales in ((experts, columns), (experts, 1, columns)):
        return (1, max(1, rows), 1)
    if scales in ((experts, rows), (experts, rows, 1)):
        return (1, 1, max(1, columns))
    raise CorruptFile(f"has _weight_scale of shape {scales} for codes of shape {shape}")
