"""Takes apart fields of bits that lie in groups of bytes, in blocks of equal size.

Compiled code does this where it also decodes (`converters.arithmetic.compiled`), NumPy elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic import compiled

Bytes = NDArray[np.uint8]


def paired_halves(blocks: Bytes, begin: int, half: int) -> Bytes:
    """Nibbles as canonical bytes, shape (n * (nbytes - begin),). They lie in groups of `half` bytes after the first
    `begin` bytes of each block of `blocks`, shape (n, nbytes). In a group, all low nibbles come first, then all high
    ones. ggml stores its 4-bit codes like this (ggml-quants.c)."""
    stored = blocks[:, begin:]
    packed = np.empty(stored.size, np.uint8)
    if compiled.is_used():
        from nibblecast.formats.gguf import compiled_fields as loops

        loops.pair_halves(half)(blocks.reshape(-1), blocks.shape[1], begin, packed)
        return packed
    pairs = np.ascontiguousarray(stored).reshape(-1).view("<u2")
    moved = pairs >> np.uint16(4)
    low = (pairs & np.uint16(0x0F)) | (moved & np.uint16(0xF0))
    high = (moved & np.uint16(0x0F)) | ((pairs >> np.uint16(8)) & np.uint16(0xF0))
    words = np.dtype(f"u{min(8, half // 2)}")  # NumPy is slow with many short rows of bytes
    halves = packed.view(words).reshape(stored.size // half, 2, half // 2 // words.itemsize)
    for place, nibbles in enumerate((low, high)):
        halves[:, place] = nibbles.astype(np.uint8).view(words).reshape(halves.shape[0], -1)
    return packed


def fields(blocks: Bytes, begin: int, end: int, group: int, bits: int, up: int = 0) -> Bytes:
    """Fields of `bits` bits, one in a byte, shape (n, elements), shifted `up` bits. They lie in groups of `group`
    bytes, from `begin` to `end` in each block of `blocks`, shape (n, nbytes). All lowest fields of a group come first.
    The caller may write to the result, except for whole bytes (`bits` is 8), which may be a view of `blocks`."""
    if compiled.is_used():
        from nibblecast.formats.gguf import compiled_fields as loops

        taken: Bytes = np.empty(blocks.shape[0] * (end - begin) * 8 // bits, np.uint8)
        loops.take_fields(group, bits, up)(blocks.reshape(-1), blocks.shape[1], begin, end, taken)
        return taken.reshape(blocks.shape[0], -1)
    stored: Bytes = np.ascontiguousarray(blocks[:, begin:end])
    if bits == 8:
        return stored
    word = np.dtype(f"u{min(8, group)}")  # many bytes at once; the mask drops bits shifted out of a neighbour
    words = stored.view(word).reshape(blocks.shape[0], -1, 1, group // word.itemsize)
    mask = np.full(word.itemsize, (1 << bits) - 1, np.uint8).view(word)
    shifted: NDArray[Any] = ((words >> np.arange(0, 8, bits, dtype=word)[:, None]) & mask) << word.type(up)
    return shifted.reshape(blocks.shape[0], -1).view(np.uint8)
