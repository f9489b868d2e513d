"""Fields of bits that lie in groups of bytes of blocks of equal size, taken apart.

With NumPy, or with compiled code where that decodes (`converters.arithmetic.compiled`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic import compiled

Bytes = NDArray[np.uint8]


def paired_halves(blocks: Bytes, begin: int, half: int) -> Bytes:
    """Canonical bytes, shape (n * (nbytes - begin),), of the nibbles in groups of `half` bytes that follow the first
    `begin` bytes of each block of `blocks`, shape (n, nbytes): first all the low ones, then all the high ones. ggml has
    its codes of 4 bits so (ggml-quants.c)."""
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
    """Fields of `bits` bits that lie in groups of `group` bytes, from `begin` to `end` in each block of `blocks`, shape
    (n, nbytes): all the lowest of a group first, moved `up` by so many bits, one in a byte, shape (n, elements). They
    are the caller's to write to, but for whole bytes (`bits` is 8), which may be those of `blocks`."""
    if compiled.is_used():
        from nibblecast.formats.gguf import compiled_fields as loops

        taken: Bytes = np.empty(blocks.shape[0] * (end - begin) * 8 // bits, np.uint8)
        loops.take_fields(group, bits, up)(blocks.reshape(-1), blocks.shape[1], begin, end, taken)
        return taken.reshape(blocks.shape[0], -1)
    stored: Bytes = np.ascontiguousarray(blocks[:, begin:end])
    if bits == 8:
        return stored
    word = np.dtype(f"u{min(8, group)}")  # as many bytes at once; what is shifted out of one is masked in the next
    words = stored.view(word).reshape(blocks.shape[0], -1, 1, group // word.itemsize)
    mask = np.full(word.itemsize, (1 << bits) - 1, np.uint8).view(word)
    shifted: NDArray[Any] = ((words >> np.arange(0, 8, bits, dtype=word)[:, None]) & mask) << word.type(up)
    return shifted.reshape(blocks.shape[0], -1).view(np.uint8)
