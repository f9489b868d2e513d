"""What the arrays cost on a device: bytes of flash per tensor and in all, against int8 and float32, and RAM.

Flash is what the arrays hold: names, shapes and the table of tensors come on top where a program uses them. RAM is what
TFLite Micro's kernels want of its arena: the reference ones unpack an int4 weight into one byte a weight each time they
run, one weight after the other, so that the largest counts; those of CMSIS-NN read it where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.converters.errors import RefusedLoss
from nibblecast.converters.interfaces import Size
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.device.kernels import advice
from nibblecast.formats.cheader.packings import DENSE, Packing

_INT4 = np.dtype(ml_dtypes.int4)
_LARGEST = 5


@dataclass(frozen=True, slots=True)
class TensorFlash:
    """A tensor's bytes of flash: `nbytes` are what its arrays hold, `aligned` the most that they take with the gaps of
    alignment; `int8` what they would hold if codes were int8 and parameters the same, `float32` if they were values
    (integers that stand for themselves stay as they are). `scratch` is the RAM that the reference kernels of TFLite
    Micro unpack it into."""

    name: str
    nbytes: int
    aligned: int
    int8: int
    float32: int
    scratch: int


@dataclass(frozen=True, slots=True)
class FlashReport:
    """The costs of all tensors, in the model's order."""

    tensors: Sequence[TensorFlash]

    @property
    def total(self) -> TensorFlash:
        """The sums; of `scratch`, of which only one is needed at a time, the largest."""
        return TensorFlash(
            "in all",
            sum(tensor.nbytes for tensor in self.tensors),
            sum(tensor.aligned for tensor in self.tensors),
            sum(tensor.int8 for tensor in self.tensors),
            sum(tensor.float32 for tensor in self.tensors),
            max((tensor.scratch for tensor in self.tensors), default=0),
        )

    def largest(self) -> list[TensorFlash]:
        """The five that take the most, the largest first; the model's order where several take as much."""
        return sorted(self.tensors, key=lambda tensor: -tensor.nbytes)[:_LARGEST]

    def lines(self) -> tuple[str, ...]:
        """The totals, the largest tensors and the RAM, for a person to read."""
        total = self.total
        flash = (
            f"flash: {total.nbytes} bytes, at most {total.aligned} with alignment "
            f"(as int8 {total.int8}, as float32 {total.float32})"
        )
        width = len(str(max((tensor.nbytes for tensor in self.tensors), default=0)))
        rows = [f"  {tensor.nbytes:{width}}  {tensor.name}" for tensor in self.largest()]
        if len(self.tensors) > _LARGEST:
            rows.append(f"  {len(self.tensors) - _LARGEST} more")
        return (flash, *(rows if len(self.tensors) > 1 else ()), *self._ram_lines())

    def comment(self, names: Sequence[str]) -> str:
        """A table of all tensors for the header's comment, with these names for them, and what RAM is needed."""
        lines = [f" * {'bytes':>12} {'at most':>12} {'as int8':>12} {'as float32':>12}"]
        for tensor, name in zip((*self.tensors, self.total), (*names, "in all"), strict=True):
            lines.append(f" * {tensor.nbytes:12} {tensor.aligned:12} {tensor.int8:12} {tensor.float32:12}  {name}")
        return "\n".join([*lines, *(f" *\n * {line}" for line in self._ram_lines())])

    def refuse_above(self, budget: Size | None) -> None:
        """Raises RefusedLoss, naming the largest tensors, where the arrays may take more than `budget` bytes."""
        total = self.total
        if budget is None or total.aligned <= budget:
            return
        largest = ", ".join(f"'{tensor.name}' {tensor.nbytes}" for tensor in self.largest())
        raise RefusedLoss(
            f"takes up to {total.aligned} bytes of flash, and the budget is {budget}; the largest: {largest}; "
            "raise the budget, leave tensors out with --skip, or use a model with fewer bits per weight"
        )

    def _ram_lines(self) -> list[str]:
        scratch = self.total.scratch
        if not scratch:
            return []
        return [f"RAM for int4: {scratch} bytes of arena with TFLite Micro's reference kernels, 0 with CMSIS-NN"]


def tensor_flash(tensor: Tensor, nbytes: int, aligned: int, parameters: int, packing: Packing = DENSE) -> TensorFlash:
    """The costs of a tensor whose arrays hold `nbytes`, of which `parameters` are not data, and take at most `aligned`
    bytes."""
    has_codes = tensor.quantization is not None and tensor.bits <= 8
    is_value = tensor.quantization is not None or is_float(tensor.dtype)
    return TensorFlash(
        tensor.name,
        nbytes,
        aligned,
        tensor.size + parameters if has_codes else nbytes,
        tensor.size * np.dtype(np.float32).itemsize if is_value else nbytes,
        tensor.size if _is_unpacked(tensor, packing) else 0,
    )


def _is_unpacked(tensor: Tensor, packing: Packing) -> bool:
    found = advice(tensor, packing) if tensor.dtype == _INT4 and not packing.unpacked else None
    return found is not None and bool(found.kernels)
