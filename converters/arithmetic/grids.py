"""The shapes of blocks that share a parameter, and of the grid that the blocks make up."""

from __future__ import annotations


def grid_shape(shape: tuple[int, ...], block_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the parameters: ceil(size / block) along each axis, at least 1."""
    return tuple(max(1, -(-size // block)) for size, block in zip(shape, block_shape, strict=True))


def per_tensor(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block shape of one parameter for the whole tensor."""
    return tuple(max(1, size) for size in shape)


def per_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The block shape of one parameter for each position along `axis`."""
    return with_size(per_tensor(shape), axis, 1)


def blocked(shape: tuple[int, ...], axis: int, block_size: int) -> tuple[int, ...]:
    """The block shape of one parameter for each `block_size` elements along `axis`, apart for every other position."""
    return with_size((1,) * len(shape), axis, block_size)


def with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """`shape` with another size along `axis`."""
    return (*shape[:axis], size, *shape[axis + 1 :])
