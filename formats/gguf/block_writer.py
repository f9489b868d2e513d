"""Codes and their parameters as ggml's blocks: the inverse of `formats.gguf.blocks`, for the types that are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Tensor
from nibblecast.formats.gguf.fit import IQ4_NL, MXFP4, NVFP4, Q4_0, Q4_1, Q8_0, Kind

_Bytes = NDArray[np.uint8]


def encode(tensor: Tensor, kind: Kind) -> _Bytes:
    """The blocks of a tensor from `formats.gguf.fit`, or of whole rows of it, shape (blocks, bytes)."""
    blocks = tensor.size // kind.elements
    codes = tensor.packed().reshape(blocks, -1)
    return np.concatenate([*_parameters(tensor, blocks), _LAID_OUT[kind](codes)], axis=1)


def _parameters(tensor: Tensor, blocks: int) -> list[_Bytes]:
    """The scales of each block, and its minimum if it has one."""
    quantization = tensor.quantization
    if quantization is None:
        return []
    roles = (quantization.scale, quantization.offset)
    return [parameter.packed().reshape(blocks, -1) for parameter in roles if parameter is not None]


def _halves(packed: _Bytes, half: int) -> _Bytes:
    """Nibbles in groups of `half` bytes: the low nibbles are the group's first elements, the high ones the rest."""
    groups = packed.reshape(-1, 2, half // 2)
    first, second = groups[:, 0], groups[:, 1]
    stored = np.empty((groups.shape[0], half), np.uint8)
    stored[:, 0::2] = (first & 0x0F) | (second << 4)
    stored[:, 1::2] = (first >> 4) | (second & 0xF0)
    return stored.reshape(packed.shape)


_LAID_OUT: Mapping[Kind, Callable[[_Bytes], _Bytes]] = MappingProxyType(
    {
        Q4_0: lambda codes: _halves(codes ^ np.uint8(0x88), 16),
        Q4_1: lambda codes: _halves(codes, 16),
        Q8_0: lambda codes: codes,
        IQ4_NL: lambda codes: _halves(codes, 16),
        MXFP4: lambda codes: _halves(codes, 16),
        NVFP4: lambda codes: _halves(codes, 8),
    }
)
