"""ggml's blocks as codes and their parameters.

A block holds some elements along the innermost axis: their codes, a scale d (mostly float16), and more that depends on
the type. Codes stored with an excess become signed numbers: of Q4_0's codes 0 to 15, 8 is int4's 0.

gguf-py decodes each type straight to floats. Here blocks become codes and parameters instead, because every writer and
every stage works with these. A Q4_0 tensor can then become ONNX int4 or a C header without being quantized again.
The parts stay lazy, so that a model of many GB is never held in memory.

    Q4_0, Q5_0, Q8_0          d * q                        Q4_1, Q5_1    d * q + m
    Q2_K, Q4_K, Q5_K          (d * sc) * q - (dmin * m)    sc and m: small integers, one for a sub-block of 16 or 32
    Q3_K, Q6_K                (d * sc) * q                 IQ4_XS        (d * sc) * table[q]
    IQ4_NL                    d * table[q]                 TQ1_0, TQ2_0  d * (q - 1), q base 3 or of 2 bits
    MXFP4                     2 ** (e - 127) * E2M1(q)     NVFP4         UE4M3(d) * E2M1(q), d of 16 elements

Each operation is rounded to float32. Sources: gguf 0.19, quants.py; ggml, ggml-quants.c (dequantize_row_*). These
differ from this module only in codes that none of their quantizers makes. MXFP4's exponent 255 is 2 ** 128 there and
NaN here, as in OCP's specification. A float4 with only its fourth bit set is 0 there and -0 here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import (
    BFLOAT16,
    FLOAT4,
    FLOAT8_E4M3,
    FLOAT8_E8M0,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT2,
    INT4,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT2,
    UINT4,
    UINT8,
)
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import Quantization, Tensor, blocked
from nibblecast.converters.storage import Data
from nibblecast.formats.encodings.bytes.rows import by_rows
from nibblecast.formats.gguf.fields import fields, paired_halves

_Bytes = NDArray[np.uint8]
_Take = Callable[[_Bytes], NDArray[Any]]


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_UE4M3_ZERO = 0x7F


@dataclass(frozen=True, slots=True, eq=False)
class BlockData:
    """The data of a tensor whose last axis is stored in blocks of `elements` elements and `nbytes` bytes."""

    name: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int
    data: Data

    def part(
        self, role: str, dtype: np.dtype[Any], count: int, take: _Take, quantization: Quantization | None = None
    ) -> Tensor:
        """A part of each block as canonical bytes. `take` gets blocks of shape (n, nbytes) and returns `count` elements
        of each, in any shape."""
        shape = (*self.shape[:-1], self.shape[-1] // self.elements * count)

        def rows(first: int, last: int) -> NDArray[Any]:
            stored = self.data.read(first * self.nbytes, last * self.nbytes)
            return take(stored.reshape(-1, self.nbytes))

        data = by_rows((prod(self.shape) // self.elements, count), dtype, rows, self.data)
        return Tensor(role, shape, dtype, data, quantization)

    def quantized(
        self,
        dtype: np.dtype[Any],
        take: _Take,
        scale: Tensor,
        *,
        zero_point: Tensor | None = None,
        offset: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> Tensor:
        """The tensor itself: its codes and their parameters. All parameters are as many as the scales."""
        block_shape = blocked(self.shape, len(self.shape) - 1, self.shape[-1] // scale.shape[-1])
        quantization = Quantization(scale, block_shape, zero_point, offset, codebook)
        return self.part(self.name, dtype, self.elements, take, quantization)

    def nested(self, role: str, dtype: np.dtype[Any], count: int, take: _Take, scale: Tensor) -> Tensor:
        """`count` parameters of each block, as small integers whose scale is the block's."""
        shape = (*self.shape[:-1], self.shape[-1] // self.elements * count)
        return self.part(role, dtype, count, take, Quantization(scale, blocked(shape, len(shape) - 1, count)))


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block type: its size in elements and in bytes, and the function that makes a tensor of its blocks."""

    name: str
    elements: int
    nbytes: int
    tensor: Callable[[BlockData], Tensor]


def _field(start: int, stop: int) -> _Take:
    return lambda blocks: fields(blocks, start, stop, stop - start, 8)


def _negated(start: int) -> _Take:
    """A float16 with its sign flipped."""
    return lambda blocks: blocks[:, start : start + 2] ^ np.array([0x00, 0x80], np.uint8)


def _added(codes: _Bytes, high: _Bytes) -> _Bytes:
    """Adds the high bits to codes that have their low bits, in place."""
    codes |= high
    return codes


def _signed(excess: int, codes: _Bytes) -> NDArray[np.int8]:
    """Subtracts `excess` from the codes, in place."""
    codes -= np.uint8(excess)
    return codes.view(np.int8)


def _q4_0(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    return blocks.quantized(INT4, lambda b: paired_halves(b, 2, 16) ^ np.uint8(0x88), scale)


def _q4_1(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    offset = blocks.part("offset", FLOAT16, 1, _field(2, 4))
    return blocks.quantized(UINT4, lambda b: paired_halves(b, 4, 16), scale, offset=offset)


def _five_bits(blocks: _Bytes, begin: int) -> _Bytes:
    """Codes of 32 elements. The fifth bits are stored as a bit stream, the other bits in halves."""
    fifth = np.unpackbits(fields(blocks, begin, begin + 4, 4, 8), axis=1, bitorder="little")
    return _added(fields(blocks, begin + 4, begin + 20, 16, 4), fifth * np.uint8(16))


def _q5_0(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    return blocks.quantized(INT8, lambda b: _signed(16, _five_bits(b, 2)), scale)


def _q5_1(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    offset = blocks.part("offset", FLOAT16, 1, _field(2, 4))
    return blocks.quantized(UINT8, lambda b: _five_bits(b, 4), scale, offset=offset)


def _q8_0(blocks: BlockData) -> Tensor:
    return blocks.quantized(INT8, _field(2, 34), blocks.part("scale", FLOAT16, 1, _field(0, 2)))


def _q8_k(blocks: BlockData) -> Tensor:
    """Ignores the sums of 16 codes each that follow the codes: they are for dot products only."""
    return blocks.quantized(INT8, _field(4, 260), blocks.part("scale", FLOAT32, 1, _field(0, 4)))


def _with_minima(
    blocks: BlockData, dtype: np.dtype[Any], codes: _Take, at: int, count: int, scales: _Take, minima: _Take
) -> Tensor:
    """A tensor with `count` scales and minima in each block. Their own scales, d and dmin, lie at byte `at`."""
    d = blocks.part("scale", FLOAT16, 1, _field(at, at + 2))
    minus_dmin = blocks.part("scale", FLOAT16, 1, _negated(at + 2))
    scale = blocks.nested("scale", UINT8, count, scales, d)
    offset = blocks.nested("offset", UINT8, count, minima, minus_dmin)
    return blocks.quantized(dtype, codes, scale, offset=offset)


def _q2_k(blocks: BlockData) -> Tensor:
    return _with_minima(
        blocks,
        UINT2,
        lambda b: pack(fields(b, 16, 80, 32, 2), 2),
        80,
        16,
        lambda b: b[:, :16] & np.uint8(0x0F),
        lambda b: b[:, :16] >> np.uint8(4),
    )


def _six_bits(blocks: _Bytes, low: int, nibble: int) -> _Bytes:
    """The 8 scales or minima of Q4_K and Q5_K, from the 12 bytes that begin at byte 4. Four are the low 6 bits of the
    bytes from `low` on. The upper 2 bits of these bytes are the high bits of the other four, and a nibble of bytes 8 to
    11 has their low bits. Four bytes are computed at once."""
    words = fields(blocks, 4, 16, 12, 8).view("<u4")
    whole = words[:, low // 4]
    found = np.empty((blocks.shape[0], 2), "<u4")
    found[:, 0] = whole & np.uint32(0x3F3F3F3F)
    found[:, 1] = ((words[:, 2] >> np.uint32(nibble)) & np.uint32(0x0F0F0F0F)) | (
        (whole >> np.uint32(2)) & np.uint32(0x30303030)
    )
    return found.view(np.uint8)


def _q4_k(blocks: BlockData) -> Tensor:
    return _with_minima(
        blocks,
        UINT4,
        lambda b: paired_halves(b, 16, 32),
        0,
        8,
        lambda b: _six_bits(b, 0, 0),
        lambda b: _six_bits(b, 4, 4),
    )


def _q5_k(blocks: BlockData) -> Tensor:
    return _with_minima(
        blocks,
        UINT8,
        lambda b: _added(fields(b, 48, 176, 32, 4), fields(b, 16, 48, 32, 1, 4)),
        0,
        8,
        lambda b: _six_bits(b, 0, 0),
        lambda b: _six_bits(b, 4, 4),
    )


def _q3_k(blocks: BlockData) -> Tensor:
    """The third bit of a code is stored apart. If it is set, 4 is not subtracted."""

    def codes(stored: _Bytes) -> _Bytes:
        codes = _added(fields(stored, 32, 96, 32, 2), fields(stored, 0, 32, 32, 1, 2))
        return pack(_signed(4, codes), 4)

    def scales(stored: _Bytes) -> NDArray[np.int8]:
        return _signed(32, _added(fields(stored, 96, 104, 8, 4), fields(stored, 104, 108, 4, 2, 4)))

    d = blocks.part("scale", FLOAT16, 1, _field(108, 110))
    return blocks.quantized(INT4, codes, blocks.nested("scale", INT8, 16, scales, d))


def _q6_k(blocks: BlockData) -> Tensor:
    def codes(stored: _Bytes) -> NDArray[np.int8]:
        return _signed(32, _added(fields(stored, 0, 128, 64, 4), fields(stored, 128, 192, 32, 2, 4)))

    d = blocks.part("scale", FLOAT16, 1, _field(208, 210))
    return blocks.quantized(INT8, codes, blocks.nested("scale", INT8, 16, _field(192, 208), d))


def iq4_codebook() -> Tensor:
    """The values that IQ4_NL and IQ4_XS multiply by their scale."""
    return Tensor.from_array("codebook", np.array(IQ4_VALUES, np.float32))


def _iq4_nl(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    return blocks.quantized(UINT4, lambda b: paired_halves(b, 2, 16), scale, codebook=iq4_codebook())


def _iq4_xs(blocks: BlockData) -> Tensor:
    def scales(stored: _Bytes) -> NDArray[np.int8]:
        return _signed(32, _added(fields(stored, 4, 8, 1, 4), fields(stored, 2, 4, 1, 2, 4)))

    d = blocks.part("scale", FLOAT16, 1, _field(0, 2))
    scale = blocks.nested("scale", INT8, 8, scales, d)
    return blocks.quantized(UINT4, lambda b: paired_halves(b, 8, 16), scale, codebook=iq4_codebook())


def _tq1_0(blocks: BlockData) -> Tensor:
    """A byte stands for a fraction of 256. Its base-3 digits are the codes, the first digit first."""

    def digits(stored: _Bytes, count: int) -> NDArray[np.uint16]:
        shifted = stored[:, None, :] * (3 ** np.arange(count)).astype(np.uint8)[:, None]
        return (shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).reshape(stored.shape[0], -1)

    def codes(stored: _Bytes) -> _Bytes:
        parts = (digits(stored[:, :32], 5), digits(stored[:, 32:48], 5), digits(stored[:, 48:52], 4))
        return pack(_signed(1, np.concatenate(parts, axis=1).astype(np.uint8)), 2)

    return blocks.quantized(INT2, codes, blocks.part("scale", FLOAT16, 1, _field(52, 54)))


def _tq2_0(blocks: BlockData) -> Tensor:
    """Codes stay unsigned because the fourth code would mean 2, which int2 does not have."""
    scale = blocks.part("scale", FLOAT16, 1, _field(64, 66))
    zero_point = blocks.part("zero_point", UINT8, 1, lambda b: np.ones(b.shape[0], np.uint8))
    return blocks.quantized(UINT2, lambda b: pack(fields(b, 0, 64, 32, 2), 2), scale, zero_point=zero_point)


def _mxfp4(blocks: BlockData) -> Tensor:
    scale = blocks.part("scale", FLOAT8_E8M0, 1, _field(0, 1))
    return blocks.quantized(FLOAT4, lambda b: paired_halves(b, 1, 16), scale)


def _nvfp4(blocks: BlockData) -> Tensor:
    """The scales are float8_e4m3fn without a sign, and 0x7F is 0 instead of NaN."""

    def scales(stored: _Bytes) -> _Bytes:
        scale = stored[:, :4]
        if (scale == 0xFF).any():
            raise CorruptFile("has the scale 0xFF, which is not an unsigned E4M3 number", tensor=blocks.name)
        return np.where(scale == _UE4M3_ZERO, np.uint8(0), scale & np.uint8(0x7F))

    return blocks.quantized(FLOAT4, lambda b: paired_halves(b, 4, 8), blocks.part("scale", FLOAT8_E4M3, 4, scales))


#: The types that are decoded, by their number (ggml.h, enum ggml_type).
BLOCK_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        2: BlockType("Q4_0", 32, 18, _q4_0),
        3: BlockType("Q4_1", 32, 20, _q4_1),
        6: BlockType("Q5_0", 32, 22, _q5_0),
        7: BlockType("Q5_1", 32, 24, _q5_1),
        8: BlockType("Q8_0", 32, 34, _q8_0),
        10: BlockType("Q2_K", 256, 84, _q2_k),
        11: BlockType("Q3_K", 256, 110, _q3_k),
        12: BlockType("Q4_K", 256, 144, _q4_k),
        13: BlockType("Q5_K", 256, 176, _q5_k),
        14: BlockType("Q6_K", 256, 210, _q6_k),
        15: BlockType("Q8_K", 256, 292, _q8_k),
        20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
        23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
        34: BlockType("TQ1_0", 256, 54, _tq1_0),
        35: BlockType("TQ2_0", 256, 66, _tq2_0),
        39: BlockType("MXFP4", 32, 17, _mxfp4),
        40: BlockType("NVFP4", 64, 36, _nvfp4),
    }
)

PLAIN_TYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        0: FLOAT32,
        1: FLOAT16,
        24: INT8,
        25: INT16,
        26: INT32,
        27: INT64,
        28: FLOAT64,
        30: BFLOAT16,
    }
)

#: Types whose blocks are copied whole and not decoded (lattices, and single sign bits): name, elements, bytes.
OPAQUE_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        29: ("IQ1_M", 256, 56),
        41: ("Q1_0", 128, 18),
    }
)

#: Types that no file should have: types that exist only while llama.cpp runs, and removed ones.
OTHER_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        9: "Q8_1",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
