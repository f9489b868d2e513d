"""Stage: floats -> codes, only at the user's request.

    code = clip(round(value / scale) + zero_point, lowest, highest)

`converters.stages.scheme` describes how, `converters.arithmetic.rounding` computes it, `converters.arithmetic.blocks`
cuts tensors into pieces. All of it is lazy: scales are fitted when they or their codes are first read, and kept until
the tensor is released; codes are computed at each read. The same floats always give the same codes, in any order of
reading.

Why lazy here too. Quantizing the whole model first would hold all of its codes, or write them to a temporary file.
Fitted scales are small, and codes are cheap to compute again; so memory stays bounded and no file is written twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic import rounding
from nibblecast.converters.arithmetic.accuracy import Accuracy, errors
from nibblecast.converters.arithmetic.blocks import BlockGrid, Box, Group, side_by_side
from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.arithmetic.packing import pack, packed_size
from nibblecast.converters.arithmetic.rounding import BlockParameters, Floats
from nibblecast.converters.errors import UsageError, located
from nibblecast.converters.ir import Loss, Model, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.converters.machine import threads
from nibblecast.converters.metadata import Use
from nibblecast.converters.stages.scheme import Blocked, PerTensor, Scheme, parse_scheme
from nibblecast.converters.storage import Data

__all__ = ["Accuracy", "Scheme", "accuracy", "parse_scheme", "quantize_model", "quantized"]

_FLOATS = frozenset(np.dtype(name) for name in ("float16", "float32", "float64", "bfloat16"))
_HELD_ELEMENTS = 1 << 21  # a group of up to 8 MiB of float32 stays in memory, so that no pass reads it again
_MOST_THREADS = 8
_FITTED_BYTES = 8  # per block: scale and zero point as float32


def quantize_model(model: Model, scheme: Scheme) -> Model:
    """The model with its float weights quantized: tensors of the same names, shapes and uses.

    Weights are tensors of float16, bfloat16, float32 or float64 with at least two axes that an operator uses as its
    weight. If the source tells no uses at all, every such tensor is a weight. Tensors that are quantized already stay
    unchanged, unless `scheme.requantize` is set; requantizing is a Loss. This reads no payload. Raises UsageError when
    there is nothing to quantize, and for an axis that a weight does not have. Reading the codes or parameters raises
    Unsupported if values are not finite.
    """
    known = any(tensor.uses for tensor in model.values())
    tensors: dict[str, Tensor] = dict(model.tensors)
    losses, room = list(model.losses), _Room()
    changed = set()
    for name, tensor in model.items():
        if not (_is_weight(tensor, scheme, known) and scheme.takes(name)) or tensor.parameter_of in model.tensors:
            continue
        changed.add(name)
        tensors[name] = quantized(tensor, scheme, model.metadata.source, room)
        if tensor.quantization is not None:
            losses.append(Loss(name, "requantized", _requantized(tensor, tensors[name])))
    if not changed:
        raise UsageError(f"quantize '{scheme}': {_why_nothing(model, scheme, known)}", path=model.metadata.source)
    kept = {name: tensor for name, tensor in tensors.items() if tensor.parameter_of not in changed}
    return replace(model, tensors=kept, losses=tuple(losses))


def quantized(tensor: Tensor, scheme: Scheme, source: Path | None = None, room: _Room | None = None) -> Tensor:
    """`tensor`, plain or quantized already, with the codes and parameters of `scheme`, computed when they are read.
    `source` is the file that errors name; the tensors of one model share a `room`. Raises UsageError for an axis that
    the tensor does not have."""
    plain = tensor.dequantized(np.float32)
    block_shape = _block_shape(tensor, scheme)
    codes = QuantizedCodes(plain, scheme, block_shape, source, room or _Room())
    grid = grid_shape(tensor.shape, block_shape)
    count = prod(grid)
    scale = Tensor(
        f"{tensor.name}.scale",
        grid,
        scheme.scale_dtype,
        _FittedData(count * scheme.scale_dtype.itemsize, codes.read_scale, codes),
    )
    zero_point = None
    if scheme.middle or not scheme.symmetric:
        nbytes = packed_size(count, bits_of(scheme.dtype))
        fitted = _FittedData(nbytes, codes.read_zero_point, codes)
        zero_point = Tensor(f"{tensor.name}.zero_point", grid, scheme.dtype, fitted)
    return replace(
        tensor,
        dtype=scheme.dtype,
        data=codes,
        quantization=Quantization(scale, block_shape, zero_point),
        parameter_of=None,
    )


@np.errstate(all="ignore")  # numbers out of files may be anything
def accuracy(model: Model) -> tuple[Accuracy, ...]:
    """The quantization error of each tensor that `quantize_model` has quantized. It is measured while codes are read;
    codes that were never read are computed now."""
    return tuple(
        codes.accuracy(name)
        for name, tensor in model.items()
        for codes in (tensor.data, *tensor.data.made_of())  # shared data wrap the codes
        if isinstance(codes, QuantizedCodes)
    )


def _requantized(old: Tensor, new: Tensor) -> str:
    detail = f"requantized from {old.dtype}, {old.granularity} to {new.dtype}, {new.granularity}"
    if any(use.activation is not None for use in old.uses):  # integer kernels add the bias before they scale
        return f"{detail}; a quantized bias keeps its scale, which fits the weight's old one only"
    return detail


def _is_weight(tensor: Tensor, scheme: Scheme, uses_are_known: bool) -> bool:
    if len(tensor.shape) < 2 or tensor.size == 0:
        return False
    wanted = tensor.dtype in _FLOATS if tensor.quantization is None else scheme.requantize
    return wanted and (not uses_are_known or _weight_use(tensor) is not None)


def _weight_use(tensor: Tensor) -> Use | None:
    """The first use of the tensor as a weight."""
    return next((use for use in tensor.uses if use.sum_axes is not None), None)


def _why_nothing(model: Model, scheme: Scheme, uses_are_known: bool) -> str:
    """Why there is nothing to quantize, and what the user can do."""
    every = replace(scheme, requantize=True)
    weights = [tensor for tensor in model.values() if _is_weight(tensor, every, uses_are_known)]
    floats = [tensor for tensor in weights if tensor.quantization is None]
    if any(scheme.takes(tensor.name) for tensor in weights):
        return "the model has no float weight that is not quantized yet; add ',requantize' to include quantized ones"
    if floats or (weights and scheme.requantize):
        return (
            f"the model has no float weight of these names; without only= and except= it has {len(floats or weights)}"
        )
    known = " that an operator is known to take as its weight" if uses_are_known else ""
    return f"the model has no float weight (a float tensor with at least two axes){known}"


def _block_shape(tensor: Tensor, scheme: Scheme) -> tuple[int, ...]:
    shape, granularity = tensor.shape, scheme.granularity
    if isinstance(granularity, PerTensor):
        return per_tensor(shape)
    use = _weight_use(tensor)
    channels = use.channel_axis if use is not None and use.channel_axis is not None else 0
    axis = granularity.axis
    if axis is None:
        axis = _input_axis(use, len(shape)) if isinstance(granularity, Blocked) else channels
    if not -len(shape) <= axis < len(shape):
        raise UsageError(f"quantize '{scheme}': shape {shape} has no axis {axis}", tensor=tensor.name)
    axis %= len(shape)
    if isinstance(granularity, Blocked):
        return blocked(shape, axis, min(granularity.size, shape[axis]))
    return per_axis(shape, axis)


def _input_axis(use: Use | None, rank: int) -> int:
    """The axis of input channels, which the operator sums over; the last axis if that is unknown."""
    axis = use.sum_axes[0] if use is not None and use.sum_axes else -1
    return axis if -rank <= axis < rank else -1


@dataclass(slots=True)
class _Room:
    """The bytes of fitted parameters that all tensors of one model may keep together. A file may store all scales
    before all codes, so the parameters fitted for the scales are needed again for the codes. Without a limit memory
    would grow with the model; beyond it parameters are fitted again."""

    free: int = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class _FittedData(Data):
    """The bytes of a parameter: `read_fitted` fits the parameters of `codes` if that has not been done."""

    nbytes: int
    read_fitted: Callable[[int, int], NDArray[np.uint8]]
    codes: QuantizedCodes

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.read_fitted(start, stop)

    def made_of(self) -> tuple[Data, ...]:
        return (self.codes,)

    def release(self, start: int, stop: int) -> None:
        """Releases the fitted parameters with the last byte, if there is no room for them."""
        if stop >= self.nbytes:
            self.codes.release_parameters()


class QuantizedCodes(Data):
    """The packed codes of a tensor of floats, as `Data`. Fitted parameters are kept from their first use until all
    codes are released. Measured errors are kept for ever: they are a few numbers, and the report needs them."""

    def __init__(
        self, floats: Tensor, scheme: Scheme, block_shape: tuple[int, ...], source: Path | None, room: _Room
    ) -> None:
        self._floats = floats
        self._scheme = scheme
        self._block_shape = block_shape
        self._source = source
        self._room = room
        self._kept = 0  # bytes of the room that the parameters take
        self._fitted: dict[int, BlockParameters] = {}
        self._errors: dict[int, tuple[float, float, float]] = {}
        self._lock = Lock()  # two readers at a time would fit the same parameters, and each uses all threads anyway

    @property
    def nbytes(self) -> int:
        return packed_size(self._floats.size, bits_of(self._scheme.dtype))

    def made_of(self) -> tuple[Data, ...]:
        return tuple(self._floats.stored())

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the packed codes."""
        per_byte = 8 // bits_of(self._scheme.dtype)
        first, last = start * per_byte, min(stop * per_byte, self._floats.size)
        codes = np.empty(max(0, last - first), self._scheme.storage)
        numbers = self._overlapping(self._starts, first, last)
        wanted = [(n, box) for n in numbers for box in self._groups[n].boxes if box.start < last and box.stop > first]
        with self._lock:
            self._quantize_all(wanted, codes, first)
        return self._packed(codes)

    def read_scale(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the scales, flat, as the scheme's scale dtype."""
        itemsize = self._scheme.scale_dtype.itemsize
        scale = self._of_blocks(start // itemsize, -(-stop // itemsize), lambda parameters: parameters.scale)
        return scale.astype(self._scheme.scale_dtype).view(np.uint8)[start % itemsize :][: stop - start]

    def read_zero_point(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the zero points, packed as the codes are."""
        bits = bits_of(self._scheme.dtype)
        first, last = start * 8 // bits, min(stop * 8 // bits, prod(grid_shape(self._floats.shape, self._block_shape)))
        if self._scheme.symmetric:
            zero_point = np.full(last - first, self._scheme.middle, np.float32)
        else:
            zero_point = self._of_blocks(first, last, lambda parameters: parameters.zero_point)
        return self._packed(zero_point.astype(self._scheme.storage))

    def release(self, start: int, stop: int) -> None:
        """Releases the floats behind bytes [start, stop), and the parameters too if these are all bytes."""
        per_byte = 8 // bits_of(self._scheme.dtype)
        self._release_floats(start * per_byte, stop * per_byte)
        if start <= 0 and stop >= self.nbytes:
            self._fitted.clear()
            self._room.free += self._kept
            self._kept = 0

    def release_parameters(self) -> None:
        """Releases the parameters, unless there is room to keep them until the codes are released."""
        nbytes = _FITTED_BYTES * prod(grid_shape(self._floats.shape, self._block_shape))
        if self._fitted and not self._kept:
            if nbytes <= self._room.free:
                self._kept = nbytes
                self._room.free -= nbytes
            else:
                self._fitted.clear()

    def accuracy(self, name: str) -> Accuracy:
        """The error of all codes; codes that were never read are computed."""
        every = ((number, box) for number, group in enumerate(self._groups) for box in group.boxes)
        self._quantize_all([each for each in every if each[1].start not in self._errors], np.empty(0, np.int8), 0)
        self._release_floats(0, self._floats.size)
        errors = [self._errors[box.start] for group in self._groups for box in group.boxes]
        return Accuracy(
            name,
            f"{self._scheme.dtype}, {self._scheme.granularity}",
            self._floats.size,
            max(largest for largest, _, _ in errors),
            sum(squared for _, squared, _ in errors),
            sum(squared for _, _, squared in errors),
        )

    def _packed(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        return pack(codes, bits_of(self._scheme.dtype)) if self._scheme.dtype in SUB_BYTE else codes.view(np.uint8)

    @cached_property
    def _groups(self) -> tuple[Group, ...]:
        return tuple(BlockGrid.of(self._floats.shape, self._block_shape).groups())

    @cached_property
    def _starts(self) -> list[int]:
        return [group.start for group in self._groups]

    @cached_property
    def _first_blocks(self) -> list[int]:
        return [group.blocks.start for group in self._groups]

    def _overlapping(self, starts: Sequence[int], first: int, last: int) -> range:
        """The numbers of the groups that contain any of positions [first, last)."""
        return range(max(0, bisect_right(starts, first) - 1), bisect_right(starts, last - 1) if last > first else 0)

    def _of_blocks(self, first: int, last: int, parameter: Callable[[BlockParameters], Floats]) -> Floats:
        """A parameter of blocks [first, last)."""
        numbers = self._overlapping(self._first_blocks, first, last)
        if not numbers:
            return np.empty(0, np.float32)
        with self._lock:
            _in_threads(self._parameters, numbers)
            found = np.concatenate([parameter(self._parameters(number)) for number in numbers])
        skipped = self._first_blocks[numbers[0]]
        return found[first - skipped : last - skipped]

    def _is_held(self, number: int) -> bool:
        """Whether a group is small enough to have all of its floats in memory."""
        return self._groups[number].stop - self._groups[number].start <= _HELD_ELEMENTS

    def _parameters(self, number: int, loaded: Sequence[Floats] = ()) -> BlockParameters:
        """The parameters of a group; `loaded` are its boxes' blocks if they are in memory already."""
        if number not in self._fitted:
            group = self._groups[number]
            held = loaded
            if not held and self._is_held(number):
                held = [self._load(box) for box in group.boxes]

            def pieces() -> Iterator[tuple[slice, Floats]]:
                for box, blocks in zip(group.boxes, held or map(self._load, group.boxes), strict=True):
                    where = box.blocks
                    yield slice(where.start - group.blocks.start, where.stop - group.blocks.start), side_by_side(blocks)
                    if not held:
                        self._release_floats(box.start, box.stop)

            with located(tensor=self._floats.name, path=self._source):
                self._fitted[number] = rounding.fit(self._scheme.codes, pieces, group.blocks.stop - group.blocks.start)
            if not loaded:
                self._release_floats(group.start, group.stop)
        return self._fitted[number]

    def _load(self, box: Box) -> Floats:
        itemsize = self._floats.dtype.itemsize
        return box.to_blocks(self._floats.data.read(box.start * itemsize, box.stop * itemsize).view(self._floats.dtype))

    def _quantize_all(self, wanted: Sequence[tuple[int, Box]], out: NDArray[Any], first: int) -> None:
        """Writes the codes of boxes to their places in `out`, whose first code belongs to element `first`. Each box
        comes with the number of its group."""
        by_group: dict[int, list[Box]] = {}
        for number, box in wanted:
            by_group.setdefault(number, []).append(box)
        large = {number for number in by_group if not self._is_held(number)}
        _in_threads(self._parameters, sorted(large))  # now, because later all threads would wait for the same ones
        tasks = [(number, boxes) for number, boxes in by_group.items() if number not in large]
        tasks += [(number, [box]) for number in sorted(large) for box in by_group[number]]
        _in_threads(lambda task: self._quantize(task[0], task[1], out, first), tasks)

    def _quantize(self, number: int, boxes: Sequence[Box], out: NDArray[Any], first: int) -> None:
        group = self._groups[number]
        loaded: dict[Box, Floats] = {}
        if number not in self._fitted:
            loaded = {box: self._load(box) for box in group.boxes}
        fitted = self._parameters(number, list(loaded.values()))
        for box in boxes:
            blocks = loaded[box] if box in loaded else self._load(box)
            where = slice(box.blocks.start - group.blocks.start, box.blocks.stop - group.blocks.start)
            parameters = fitted.of(where, blocks)
            nearest = rounding.codes(self._scheme.codes, blocks, parameters)
            begin, end = max(box.start, first), min(box.stop, first + out.size)
            if begin < end:
                codes = box.from_blocks(nearest.astype(out.dtype))
                out[begin - first : end - first] = codes[begin - box.start : end - box.start]
            if box.start not in self._errors:
                self._errors[box.start] = errors(blocks, rounding.values(self._scheme.codes, nearest, parameters))

    def _release_floats(self, start: int, stop: int) -> None:
        itemsize = self._floats.dtype.itemsize
        self._floats.data.release(start * itemsize, min(stop, self._floats.size) * itemsize)


def _in_threads(function: Callable[[Any], object], items: Sequence[Any]) -> None:
    """Calls the function with each item in several threads (NumPy releases the interpreter's lock)."""
    count = min(_MOST_THREADS, threads(), len(items))
    if count < 2:
        for item in items:
            function(item)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count, initializer=partial(np.seterr, all="ignore")) as pool:  # as in this thread
        for _ in pool.map(function, items):
            pass
