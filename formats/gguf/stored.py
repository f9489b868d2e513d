"""Blocks as they lie in a file, behind the codes that are read from them: so they can be written again as they are.

A tensor that no stage has changed is still its blocks, whatever their type, also one whose codes are not decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.converters.storage import Data


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlocks(Data):
    """The canonical bytes of the codes of a tensor, `codes`, and the `blocks` of the type `type_id` that they are read
    from; `shape` is that of the tensor in elements. `quantization` is what makes values of the codes."""

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
        """Lets go of the blocks that bytes [start, stop) of the codes are in."""
        first, last = start * self.blocks.nbytes // self.nbytes, -(-stop * self.blocks.nbytes // self.nbytes)
        self.blocks.release(first, last)


def stored_blocks(tensor: Tensor) -> StoredBlocks | None:
    """The blocks that a tensor was read from, where its codes and its parameters are still theirs."""
    data = tensor.data
    return data if isinstance(data, StoredBlocks) and data.quantization is tensor.quantization else None
