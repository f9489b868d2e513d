"""Codes that remember the blocks of the file that they are read from, so that the blocks can be written unchanged.

Writing only ever from codes would need an encoder for each of ggml's types, and some types are read but not written.
A tensor that no stage has changed is still its blocks, so these are copied, whatever their type. That also holds for
types whose codes are not decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.converters.storage import Data


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlocks(Data):
    """The canonical bytes of a tensor's codes, `codes`, and the `blocks` of type `type_id` that they are read from.
    `shape` is the tensor's shape in elements. `quantization` turns the codes into values."""

    codes: Data
    blocks: Data
    type_id: int
    shape: tuple[int, ...]
    quantization: Quantization | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def made_of(self) -> tuple[Data, ...]:
        return (self.blocks,)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.codes.read(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Releases the blocks that hold bytes [start, stop) of the codes."""
        first, last = start * self.blocks.nbytes // self.nbytes, -(-stop * self.blocks.nbytes // self.nbytes)
        self.blocks.release(first, last)


def stored_blocks(tensor: Tensor) -> StoredBlocks | None:
    """The blocks that a tensor was read from, if its codes and its parameters are still those of the blocks."""
    data = tensor.data
    return data if isinstance(data, StoredBlocks) and data.quantization is tensor.quantization else None
