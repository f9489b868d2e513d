"""GPTQ's words, packed one code after the other, and layers of random codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Layer:
    """A linear layer: codes (O, I), zeros (O, G), scales (O, G), the group of each input."""

    codes: NDArray[np.int64]
    zeros: NDArray[np.int64]
    scales: NDArray[Any]
    groups: NDArray[np.int32]
    bits: int

    def unrounded(self) -> NDArray[np.float32]:
        """The values before they are rounded to the dtype of the scales."""
        difference = self.codes - self.zeros[:, self.groups]
        return difference.astype(np.float32) * self.scales[:, self.groups].astype(np.float32)

    def values(self) -> NDArray[Any]:
        """What gptqmodel decodes: one rounding to the dtype of the scales."""
        return self.unrounded().astype(self.scales.dtype)


def packed(fields: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Fields (R * 32 / bits, C) as words (R, C), the first field lowest."""
    per_word = 32 // bits
    words = np.zeros((fields.shape[0] // per_word, fields.shape[1]), np.uint64)
    for row in range(fields.shape[0]):
        words[row // per_word] |= fields[row].astype(np.uint64) << np.uint64(bits * (row % per_word))
    return words.astype(np.uint32).view(np.int32)


def stored(layer: Layer, *, version: int, with_groups: bool, name: str = "model.fc") -> dict[str, NDArray[Any]]:
    qzeros = packed(layer.zeros, layer.bits).T
    if version == 1:  # the writer subtracts one from every field of a word, with borrow
        one = sum(1 << shift for shift in range(0, 32, layer.bits))
        qzeros = ((qzeros.view(np.uint32).astype(np.int64) - one) % (1 << 32)).astype(np.uint32).view(np.int32)
    tensors: dict[str, NDArray[Any]] = {
        f"{name}.qweight": packed(layer.codes.T, layer.bits),
        f"{name}.qzeros": np.ascontiguousarray(qzeros),
        f"{name}.scales": np.ascontiguousarray(layer.scales.T),
    }
    if with_groups:
        tensors[f"{name}.g_idx"] = layer.groups
    return tensors | {f"{name}.bias": np.arange(layer.codes.shape[0], dtype=np.float16)}


def random_layer(seed: int, bits: int, outputs: int, inputs: int, size: int, *, shuffled: bool) -> Layer:
    random = np.random.default_rng(seed)
    count = -(-inputs // size)
    groups = (np.arange(inputs) // size).astype(np.int32)
    if shuffled:
        random.shuffle(groups)
    return Layer(
        random.integers(0, 1 << bits, (outputs, inputs)),
        random.integers(0, 1 << bits, (outputs, count)),
        (random.random((outputs, count)) / 50 + 0.001).astype(np.float16),
        groups,
        bits,
    )


def configuration(layer: Layer, size: int, version: int, **more: Any) -> dict[str, Any]:
    layout = "gptq" if version == 1 else "gptq_v2"
    return {
        "quantization_config": {
            "quant_method": "gptq",
            "bits": layer.bits,
            "group_size": size,
            "checkpoint_format": layout,
            **more,
        }
    }
