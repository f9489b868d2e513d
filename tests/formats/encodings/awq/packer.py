"""AWQ's words, packed one code after the other, and a checkpoint of them."""

from __future__ import annotations

import numpy as np


def packed(codes):
    """Rows of outputs in words, as the paper's kernel wants them: output k of eight is in nibble ORDER.index(k)."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            word, output = divmod(column, 8)
            words[row, word] |= np.uint32(int(codes[row, column]) << 4 * order.index(output))
    return words.view(np.int32)


def checkpoint(inputs=32, outputs=24, size=16, dtype=np.float16, seed=0):
    random = np.random.default_rng(seed)
    groups = -(-inputs // size)
    codes = random.integers(0, 16, (inputs, outputs), np.uint8)
    zeros = random.integers(0, 16, (groups, outputs), np.uint8)
    scales = (random.random((groups, outputs)) * 0.1).astype(dtype)
    arrays = {"m.qweight": packed(codes), "m.qzeros": packed(zeros), "m.scales": scales, "m.bias": scales[0]}
    return arrays, codes, zeros, scales
