"""The parameters of a quantized initializer, from the nodes that decode it: their blocks, and a group index."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from nibblecast.converters.errors import CorruptFile
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor
from nibblecast.formats.encodings.bytes.rows import Rows, made_by_rows
from nibblecast.formats.onnx.file.payload import PayloadTensors
from nibblecast.formats.onnx.file.schema import GROUP_SIZE
from nibblecast.formats.onnx.weights.patterns import InitializerCodes, Pattern, Spread


def quantization(pattern: Pattern, payloads: PayloadTensors, known: Mapping[int, Tensor]) -> Quantization | None:
    """The parameters that a pattern decodes its codes with; None if they are not in blocks. `known` has the tensors
    that were already made of parameters, by the identity of the header. Raises CorruptFile if the parameters' dims
    contradict those of the codes."""
    shape = pattern.codes.header.dims
    group_index = None
    takes_codes = not pattern.value  # operators may have one zero point with several scales, or vice versa
    if pattern.grid is not None:
        grid = pattern.grid
        block_shape = tuple(max(1, size) if count == 1 else 1 for size, count in zip(shape, grid, strict=True))
    elif pattern.linear is not None:
        dims = pattern.scale.stored.header.dims
        if takes_codes:
            dims = max((part.header.dims for part in pattern.parameters()), key=prod)
        found = _linear_block_shape(shape, dims, pattern.linear)
        if found is None:
            return None
        block_shape, grid = found, grid_shape(shape, found)
    else:
        grid = _padded(pattern.scale.stored.header.dims, shape)
        if not _spreads_over(grid, shape, pattern):
            return None
        block_shape, group_index = _spread_block_shape(shape, grid, dict(pattern.scale.indices), payloads)

    def parameter(spread: Spread, role: str) -> Tensor:
        if takes_codes and prod(spread.stored.header.dims) == 1 and prod(grid) > 1:
            one = spread.stored.tensor(payloads)
            value, columns = one.codes().reshape(-1)[0], grid[-1] if grid else 1
            rows: Rows = lambda first, last: np.full((last - first, columns), value)  # noqa: E731
            return made_by_rows(one.name, grid, one.dtype, rows, one.data)
        if prod(spread.stored.header.dims) != prod(grid):
            raise CorruptFile(
                f"{role} of dims {spread.stored.header.dims} does not fit codes of dims {shape}: {grid} is needed"
            )
        tensor = known.get(id(spread.stored.header))
        return tensor if tensor is not None and tensor.shape == grid else spread.stored.tensor(payloads, grid)

    codebook = None
    if pattern.codebook is not None:
        codebook = known.get(id(pattern.codebook.header)) or pattern.codebook.tensor(payloads)
    return Quantization(
        parameter(pattern.scale, "scale"),
        block_shape,
        parameter(pattern.zero_point, "zero point") if pattern.zero_point else None,
        parameter(pattern.offset, "offset") if pattern.offset else None,
        codebook,
        group_index,
    )


def _linear_block_shape(
    shape: tuple[int, ...], scale: tuple[int, ...], attributes: Mapping[str, int]
) -> tuple[int, ...] | None:
    """The block shape of DequantizeLinear. The scale's dims tell its three granularities apart (ONNX operators,
    DequantizeLinear 21)."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    if block < 0:
        raise CorruptFile(f"block_size {block} of its DequantizeLinear: zero or a positive size is needed")
    is_blocked = block > 0 and len(scale) == len(shape) and scale != ()
    if prod(scale) == 1 and not is_blocked:  # exporters write one scale as () and as (1,)
        return per_tensor(shape)
    if not -len(shape) <= axis < len(shape):
        raise CorruptFile(f"axis {axis} of its DequantizeLinear: codes of dims {shape} have no such axis")
    axis %= len(shape)
    if is_blocked:
        block_shape = blocked(shape, axis, block)
    elif len(scale) == 1:
        block_shape = per_axis(shape, axis)
    else:
        raise CorruptFile(f"scale of dims {scale} and block_size {block} do not fit codes of dims {shape}")
    if 0 in shape:
        return block_shape if prod(scale) == prod(grid_shape(shape, block_shape)) else None
    needed = grid_shape(shape, block_shape) if is_blocked else (shape[axis],)
    if scale != needed:
        raise CorruptFile(f"scale of dims {scale} does not fit codes of dims {shape}: {needed} is needed")
    return block_shape


def _spreads_over(grid: tuple[int, ...], shape: tuple[int, ...], pattern: Pattern) -> bool:
    """Whether all parameters have one grid that broadcasts, or is spread by indices, to `shape`."""
    if len(grid) != len(shape) or (pattern.scale.indices and len(pattern.scale.stored.header.dims) != len(shape)):
        return False
    spread = [axis for axis, _ in pattern.scale.indices]
    others = [p.stored.header.dims for p in (pattern.zero_point, pattern.offset) if p is not None]
    pairs = enumerate(zip(shape, grid, strict=True))
    fitting = all(count in (1, size) or axis in spread for axis, (size, count) in pairs)
    return fitting and all(axis < len(shape) for axis in spread) and all(_padded(d, grid) == grid for d in others)


def _padded(dims: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(grid) - len(dims)) + dims


def _spread_block_shape(
    shape: tuple[int, ...], grid: tuple[int, ...], indices: Mapping[int, InitializerCodes], payloads: PayloadTensors
) -> tuple[tuple[int, ...], GroupIndex | None]:
    block_shape: list[int] = []
    group_index = None
    for axis, (size, count) in enumerate(zip(shape, grid, strict=True)):
        stored = indices.get(axis)
        if stored is None:
            block_shape.append(1 if count == size else max(1, size))
            continue
        index = stored.tensor(payloads)
        block = _block_of(index, stored.header.properties, size, count)
        if block is None:
            block = max(1, _group_size(stored.header.properties, size, count))
            group_index = GroupIndex(axis, index)
        block_shape.append(block)
    return tuple(block_shape), group_index


def _block_of(index: Tensor, properties: Mapping[str, str], size: int, count: int) -> int | None:
    """The block size of an index that numbers consecutive blocks; None for one that assigns groups freely. Raises
    CorruptFile unless the index assigns each of `size` positions to one of `count` groups."""
    if index.shape != (size,) or index.dtype.kind not in "iu":
        raise CorruptFile(
            f"index of dims {index.shape} and {index.dtype}: an integer for each of {size} positions is needed"
        )
    groups = index.codes()
    if size and (groups.min() < 0 or groups.max() >= count):
        raise CorruptFile(f"index has groups {groups.min()} to {groups.max()}: there are {count}")
    if GROUP_SIZE in properties or not size:
        return None
    block = max(1, int(np.count_nonzero(groups == 0)))
    return block if np.array_equal(groups, np.arange(size) // block) and count == -(-size // block) else None


def _group_size(properties: Mapping[str, str], size: int, count: int) -> int:
    text = properties.get(GROUP_SIZE, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -(-size // max(1, count))
