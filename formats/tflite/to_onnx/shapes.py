"""Operators that move elements or read shapes, without computing values."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.formats.tflite.to_onnx.builder import TO_FIRST, TO_LAST, GraphBuilder, OperatorCall
from nibblecast.formats.tflite.to_onnx.dense import free_first

_INT64, _INT32 = int(ir.DataType.INT64), int(ir.DataType.INT32)
_FAR = (1 << 63) - 1


def long_list(b: GraphBuilder, index: int) -> ir.Value:
    """A list of integers as int64."""
    values = b.numbers(index)
    return b.ints(values.reshape(-1).tolist()) if values is not None else b.emit("Cast", [b.read(index)], to=_INT64)


def reshape(b: GraphBuilder, op: OperatorCall) -> None:
    """RESHAPE: to the second input, else to the option, else to the shape of the result."""
    given = op.options.integers("new_shape")
    if op.input(1) >= 0 and b.numbers(op.input(1)) is None:
        shape = b.emit("Cast", [b.read(op.input(1))], to=_INT64)
    elif op.input(1) >= 0:
        shape = b.ints(b.list_of(op.input(1)))
    elif given is not None and len(given) == len(b.info(op.outputs[0]).shape):
        shape = b.ints(given)
    else:
        shape = b.ints(free_first(b, op.outputs[0]))
    b.write(op.outputs[0], b.emit("Reshape", [b.read(op.input(0)), shape]))


def squeeze(b: GraphBuilder, op: OperatorCall) -> None:
    """SQUEEZE: the given axes, or all of size 1."""
    axes = op.options.integers("squeeze_dims")
    inputs = [b.read(op.input(0))] + ([b.ints(axes)] if axes else [])
    b.write(op.outputs[0], b.emit("Squeeze", inputs))


def expand_dims(b: GraphBuilder, op: OperatorCall) -> None:
    """EXPAND_DIMS."""
    b.write(op.outputs[0], b.emit("Unsqueeze", [b.read(op.input(0)), b.ints(b.list_of(op.input(1)))]))


def transpose(b: GraphBuilder, op: OperatorCall) -> None:
    """TRANSPOSE. For an image that is channels first already, only the rest of the permutation is emitted."""
    permutation = tuple(b.list_of(op.input(1)))
    if not b.is_first(op.input(0)):
        b.write(op.outputs[0], b.emit("Transpose", [b.read(op.input(0))], perm=permutation))
        return
    rank = len(permutation)
    composed = tuple(TO_LAST[rank][axis] for axis in permutation)
    value = b.read_first(op.input(0))
    if composed != tuple(range(rank)):
        value = b.emit("Transpose", [value], perm=composed)
    b.write(op.outputs[0], value)


def concatenation(b: GraphBuilder, op: OperatorCall) -> None:
    """CONCATENATION."""
    rank = len(b.info(op.outputs[0]).shape)
    axis = op.options.integer("axis") % max(1, rank)
    first = rank in TO_FIRST and any(b.is_first(index) for index in op.inputs)
    values = [b.read_first(index) if first else b.read(index) for index in op.inputs]
    axis = TO_FIRST[rank].index(axis) if first else axis
    b.finish(op, b.emit("Concat", values, axis=axis), first=first)


def pack(b: GraphBuilder, op: OperatorCall) -> None:
    """PACK."""
    axis = op.options.integer("axis")
    values = [b.emit("Unsqueeze", [b.read(index), b.ints([axis])]) for index in op.inputs]
    b.write(op.outputs[0], b.emit("Concat", values, axis=axis))


def unpack(b: GraphBuilder, op: OperatorCall) -> None:
    """UNPACK."""
    axis = op.options.integer("axis")
    for position, index in enumerate(op.outputs):
        at = b.constant(np.int64(position), name="position")
        b.write(index, b.emit("Gather", [b.read(op.input(0)), at], axis=axis))


def split(b: GraphBuilder, op: OperatorCall) -> None:
    """SPLIT into equal parts: the axis is the first input."""
    axis, shape = b.list_of(op.input(0))[0], b.info(op.input(1)).shape
    _split(b, op, op.input(1), axis, [shape[axis] // len(op.outputs)] * len(op.outputs))


def split_v(b: GraphBuilder, op: OperatorCall) -> None:
    """SPLIT_V: sizes and axis are the second and third inputs; one size may be -1."""
    axis, sizes = b.list_of(op.input(2))[0], b.list_of(op.input(1))
    whole = b.info(op.input(0)).shape[axis]
    rest = whole - sum(size for size in sizes if size >= 0)
    _split(b, op, op.input(0), axis, [rest if size < 0 else size for size in sizes])


def _split(b: GraphBuilder, op: OperatorCall, index: int, axis: int, sizes: list[int]) -> None:
    parts = b.emit_all("Split", [b.read(index), b.ints(sizes)], outputs=len(sizes), axis=axis)
    for result, part in zip(op.outputs, parts, strict=True):
        b.write(result, part)


def gather(b: GraphBuilder, op: OperatorCall) -> None:
    """GATHER along one axis; with batch_dims, separately for each position of that many leading axes."""
    axis, batch = op.options.integer("axis"), op.options.integer("batch_dims")
    values, indices = b.read(op.input(0)), b.read(op.input(1))
    if batch < 0:
        batch += len(b.info(op.input(1)).shape)
    if not batch:
        b.write(op.outputs[0], b.emit("Gather", [values, indices], axis=axis))
        return
    rank, others = len(b.info(op.input(0)).shape), len(b.info(op.input(1)).shape) - batch
    if not 0 < batch <= rank or others < 0:
        raise CorruptFile(f"GATHER with {batch} axes of a batch, of tensors with {rank} and {others + batch} axes")
    axis %= rank
    if axis != batch:  # GatherND gathers along the axis after those of the batch
        values = b.emit("Transpose", [values], perm=_moved(rank, axis, batch))
    last = b.emit("Unsqueeze", [b.emit("Cast", [indices], to=_INT64), b.ints([-1])])
    result = b.emit("GatherND", [values, last], batch_dims=batch)
    if axis != batch:
        between = range(batch + others, batch + others + axis - batch)
        picked, rest = range(batch, batch + others), range(axis + others, rank - 1 + others)
        result = b.emit("Transpose", [result], perm=(*range(batch), *between, *picked, *rest))
    b.write(op.outputs[0], result)


def _moved(rank: int, axis: int, to: int) -> tuple[int, ...]:
    """The axes, with one of them moved to another place."""
    axes = [each for each in range(rank) if each != axis]
    return (*axes[:to], axis, *axes[to:])


def embedding_lookup(b: GraphBuilder, op: OperatorCall) -> None:
    """EMBEDDING_LOOKUP: rows of the second input."""
    b.write(op.outputs[0], b.emit("Gather", [b.read(op.input(1)), b.read(op.input(0))], axis=0))


def gather_nd(b: GraphBuilder, op: OperatorCall) -> None:
    """GATHER_ND."""
    indices = b.emit("Cast", [b.read(op.input(1))], to=_INT64)
    b.write(op.outputs[0], b.emit("GatherND", [b.read(op.input(0)), indices]))


def scatter_nd(b: GraphBuilder, op: OperatorCall) -> None:
    """SCATTER_ND: updates at the same position are added."""
    zero = np.zeros(1, b.info(op.outputs[0]).dtype if not b.info(op.outputs[0]).is_quantized else np.float32)
    empty = b.emit("ConstantOfShape", [long_list(b, op.input(2))], value=ir.tensor(zero))
    indices = b.emit("Cast", [b.read(op.input(0))], to=_INT64)
    b.write(op.outputs[0], b.emit("ScatterND", [empty, indices, b.read(op.input(1))], reduction="add"))


def mirror_pad(b: GraphBuilder, op: OperatorCall) -> None:
    """MIRROR_PAD (schema.fbs, MirrorPadMode). ONNX does not have SYMMETRIC, which repeats the edge; it becomes a Gather
    along each padded axis."""
    if op.options.integer("mode") == 0:
        pad(b, op)
        return
    info, first, rank = b.info(op.input(0)), b.is_first(op.input(0)), len(b.info(op.input(0)).shape)
    value = b.read_first(op.input(0)) if first else b.read(op.input(0))
    for axis, (before, after) in enumerate(np.asarray(b.list_of(op.input(1))).reshape(rank, 2).tolist()):
        if info.signature[axis] < 0 and before + after:
            raise Unsupported("MIRROR_PAD in mode SYMMETRIC of an axis whose size is open has no like in ONNX")
        if before + after:
            at = TO_FIRST[rank].index(axis) if first else axis
            value = b.emit("Gather", [value, _mirrored(b, info.shape[axis], before, after)], axis=at)
    b.write(op.outputs[0], value, first=first)


def _mirrored(b: GraphBuilder, size: int, before: int, after: int) -> ir.Value:
    """The positions of an axis, extended by those at its ends in reverse order."""
    nbytes = (size + max(before, 0) + max(after, 0)) * 8
    make = lambda: np.pad(np.arange(size, dtype=np.int64), (before, after), "symmetric")  # noqa: E731
    return b.computed(nbytes, make, "ints")


def pad(b: GraphBuilder, op: OperatorCall) -> None:
    """PAD, PADV2 and MIRROR_PAD in mode REFLECT: the second input has the padding before and after each axis."""
    first, rank = b.is_first(op.input(0)), len(b.info(op.input(0)).shape)
    mode = "reflect" if op.name == "MIRROR_PAD" else "constant"
    value = b.read_first(op.input(0)) if first else b.read(op.input(0))
    if b.numbers(op.input(1)) is None:
        value, first = b.read(op.input(0)), False
        pairs = b.emit("Transpose", [b.emit("Cast", [b.read(op.input(1))], to=_INT64)], perm=(1, 0))
        amounts = b.emit("Reshape", [pairs, b.ints([-1])])
    else:
        around = np.asarray(b.list_of(op.input(1)), np.int64).reshape(rank, 2)
        amounts = b.ints((around[list(TO_FIRST[rank])] if first else around).T.reshape(-1).tolist())
    filling = []
    if op.name == "PADV2":
        filling = [b.emit("Reshape", [b.read(op.input(2)), b.ints([])])]
    b.write(op.outputs[0], b.emit("Pad", [value, amounts, *filling], mode=mode), first=first)


def slice_(b: GraphBuilder, op: OperatorCall) -> None:
    """SLICE: a size of -1 means everything up to the end."""
    begin, size = b.numbers(op.input(1)), b.numbers(op.input(2))
    rank = len(b.info(op.input(0)).shape)
    if begin is not None and size is not None:
        starts = b.list_of(op.input(1))
        ends = [_FAR if n < 0 else s + n for s, n in zip(starts, b.list_of(op.input(2)), strict=True)]
        inputs = [b.ints(starts), b.ints(ends)]
    else:
        start, count = long_list(b, op.input(1)), long_list(b, op.input(2))
        is_rest = b.emit("Less", [count, b.ints([0] * rank)])
        inputs = [start, b.emit("Where", [is_rest, b.ints([_FAR] * rank), b.emit("Add", [start, count])])]
    b.write(op.outputs[0], b.emit("Slice", [b.read(op.input(0)), *inputs]))


def strided_slice(b: GraphBuilder, op: OperatorCall) -> None:
    """STRIDED_SLICE with its masks, as NumPy's x[a:b:c, ..., newaxis, i]."""
    integer = op.options.integer
    strides = b.list_of(op.input(3))
    masks = {name: integer(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    rank, value = len(b.info(op.input(0)).shape), b.read(op.input(0))
    added = [k for k in range(len(strides)) if masks["new_axis"] >> k & 1]
    ellipsis = [k for k in range(len(strides)) if masks["ellipsis"] >> k & 1]
    axis = 0
    shrunk: list[int] = []
    inserted: list[int] = []
    places: list[tuple[int, int]] = []
    for k in range(len(strides)):
        if k in ellipsis:
            axis += rank - (len(strides) - len(added) - 1)
        elif k in added:
            inserted.append(axis - len(shrunk) + len(inserted))
        else:
            places.append((k, axis))
            if masks["shrink_axis"] >> k & 1:
                shrunk.append(axis)
            axis += 1
    value = _sliced(b, op, value, places, strides, masks)
    if shrunk:
        value = b.emit("Squeeze", [value, b.ints(shrunk)])
    for place in inserted:
        value = b.emit("Unsqueeze", [value, b.ints([place])])
    b.write(op.outputs[0], value)


def _sliced(
    b: GraphBuilder,
    op: OperatorCall,
    value: ir.Value,
    places: list[tuple[int, int]],
    strides: list[int],
    masks: dict[str, int],
) -> ir.Value:
    """The slice along `places`: (position in begin, end and strides; axis)."""
    wanted = [k for k, _ in places]
    steps = [1 if masks["shrink_axis"] >> k & 1 else strides[k] for k in wanted]
    whole_start = [-1 if step < 0 else 0 for step in steps]
    whole_end = [-_FAR if step < 0 else _FAR for step in steps]
    begins, ends = b.numbers(op.input(1)), b.numbers(op.input(2))
    shrink = [bool(masks["shrink_axis"] >> k & 1) for k in wanted]
    free_begin = [bool(masks["begin"] >> k & 1) and not one for k, one in zip(wanted, shrink, strict=True)]
    free_end = [bool(masks["end"] >> k & 1) for k in wanted]
    if begins is not None and ends is not None:
        start = [w if f else int(begins[k]) for k, w, f in zip(wanted, whole_start, free_begin, strict=True)]
        stop = [w if f else int(ends[k]) for k, w, f in zip(wanted, whole_end, free_end, strict=True)]
        if op.options.integer("offset"):  # ends count from the start of the slice
            sizes = [b.info(op.input(0)).shape[axis] for _, axis in places]
            start = [s % size if s < 0 else s for s, size in zip(start, sizes, strict=True)]
            stop = [e if f else s + e for s, e, f in zip(start, stop, free_end, strict=True)]
        stop = [(s + 1 or _FAR) if one else e for s, e, one in zip(start, stop, shrink, strict=True)]
        inputs = [b.ints(start), b.ints(stop)]
    else:
        positions = b.ints(wanted)
        start_value = b.emit("Gather", [long_list(b, op.input(1)), positions])
        stop_value = b.emit("Gather", [long_list(b, op.input(2)), positions])
        if op.options.integer("offset"):
            stop_value = b.emit("Add", [start_value, stop_value])
        after = b.emit("Add", [start_value, b.ints([1])])
        is_last = b.emit("Equal", [after, b.ints([0])])
        after = b.emit("Where", [is_last, b.ints([_FAR]), after])
        start_value = _where(b, free_begin, whole_start, start_value)
        stop_value = _where(b, free_end, whole_end, stop_value)
        mask = b.constant(np.array(shrink), name="mask")
        inputs = [start_value, b.emit("Where", [mask, after, stop_value])]
    return b.emit("Slice", [value, *inputs, b.ints([axis for _, axis in places]), b.ints(steps)])


def _where(b: GraphBuilder, mask: list[bool], values: list[int], others: ir.Value) -> ir.Value:
    return b.emit("Where", [b.constant(np.array(mask), name="mask"), b.ints(values), others]) if any(mask) else others


def tile(b: GraphBuilder, op: OperatorCall) -> None:
    """TILE."""
    b.write(op.outputs[0], b.emit("Tile", [b.read(op.input(0)), long_list(b, op.input(1))]))


def broadcast_to(b: GraphBuilder, op: OperatorCall) -> None:
    """BROADCAST_TO."""
    b.write(op.outputs[0], b.emit("Expand", [b.read(op.input(0)), long_list(b, op.input(1))]))


def fill(b: GraphBuilder, op: OperatorCall) -> None:
    """FILL: the shape is the first input."""
    b.write(op.outputs[0], b.emit("Expand", [b.read(op.input(1)), long_list(b, op.input(0))]))


def shape_of(b: GraphBuilder, op: OperatorCall) -> None:
    """SHAPE."""
    shape = b.emit("Shape", [b.read(op.input(0))])
    b.write(op.outputs[0], b.emit("Cast", [shape], to=int(ir.DataType.from_numpy(b.info(op.outputs[0]).dtype))))


def rank_of(b: GraphBuilder, op: OperatorCall) -> None:
    """RANK."""
    b.write(op.outputs[0], b.constant(np.int32(len(b.info(op.input(0)).shape)), name="rank"))


def range_(b: GraphBuilder, op: OperatorCall) -> None:
    """RANGE."""
    ends = [b.emit("Reshape", [b.read(index), b.ints([])]) for index in op.inputs[:3]]
    b.write(op.outputs[0], b.emit("Range", ends))


def one_hot(b: GraphBuilder, op: OperatorCall) -> None:
    """ONE_HOT."""
    on, off = (b.emit("Reshape", [b.read(op.input(position)), b.ints([1])]) for position in (2, 3))
    values = b.emit("Concat", [off, on], axis=0)
    depth = b.emit("Reshape", [long_list(b, op.input(1)), b.ints([1])])
    indices = b.emit("Cast", [b.read(op.input(0))], to=_INT64)
    if not b.info(op.input(0)).shape:  # ONNX needs an axis
        made = b.emit("OneHot", [b.emit("Reshape", [indices, b.ints([1])]), depth, values], axis=-1)
        b.write(op.outputs[0], b.emit("Squeeze", [made, b.ints([0])]))
        return
    b.write(op.outputs[0], b.emit("OneHot", [indices, depth, values], axis=op.options.integer("axis")))


def where(b: GraphBuilder, op: OperatorCall) -> None:
    """WHERE: the positions of true elements, one in each row."""
    found = b.emit("NonZero", [b.read(op.input(0))])
    b.write(op.outputs[0], b.emit("Transpose", [found], perm=(1, 0)))


def reverse(b: GraphBuilder, op: OperatorCall) -> None:
    """REVERSE_V2."""
    axes = b.list_of(op.input(1))
    count = len(axes)
    inputs = [b.ints([-1] * count), b.ints([-_FAR] * count), b.ints(axes), b.ints([-1] * count)]
    b.write(op.outputs[0], b.emit("Slice", [b.read(op.input(0)), *inputs]))


def dynamic_update_slice(b: GraphBuilder, op: OperatorCall) -> None:
    """DYNAMIC_UPDATE_SLICE: the third input has the position of the update. It is moved so that the update fits."""
    info, update = b.info(op.input(0)), b.info(op.input(1))
    rank, values = len(info.shape), b.read(op.input(1))
    if info.is_open or update.is_open:
        size = b.emit("Shape", [values])
        room = b.emit("Sub", [b.emit("Shape", [b.read(op.input(0))]), size])
        ones = b.emit("Expand", [b.constant(np.ones((), np.bool_), name="true"), size])
        positions = b.emit("Transpose", [b.emit("NonZero", [ones])], perm=(1, 0))
        values = b.emit("Reshape", [values, b.ints([-1])])
    else:
        room = b.ints([whole - part for whole, part in zip(info.shape, update.shape, strict=True)])
        positions = b.computed(prod(update.shape) * rank * 8, lambda: _positions(update.shape), "positions")
    start = b.emit("Max", [b.emit("Min", [long_list(b, op.input(2)), room]), b.ints([0] * rank)])
    indices = b.emit("Add", [positions, start])
    b.write(op.outputs[0], b.emit("ScatterND", [b.read(op.input(0)), indices, values]))


def _positions(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The index of every element, shape (*shape, rank)."""
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1).astype(np.int64)


def space_to_batch(b: GraphBuilder, op: OperatorCall) -> None:
    """SPACE_TO_BATCH_ND: pads, cuts each spatial axis into blocks, and moves positions in a block before the batch."""
    blocks = b.list_of(op.input(1))
    around = np.asarray(b.list_of(op.input(2)), np.int64).reshape(-1, 2)
    shape, count = b.info(op.input(0)).shape, len(blocks)
    rest = len(shape) - 1 - count
    amounts = [0, *around[:, 0].tolist(), *[0] * rest, 0, *around[:, 1].tolist(), *[0] * rest]
    value = b.emit("Pad", [b.read(op.input(0)), b.ints(amounts)])
    _refuse_open(b, op, range(1, 1 + count))
    sizes = [-1 if b.info(op.input(0)).is_open else shape[0]]
    for size, block, (before, after) in zip(shape[1 : 1 + count], blocks, around.tolist(), strict=True):
        sizes += [(size + before + after) // block, block]
    value = b.emit("Reshape", [value, b.ints([*sizes, *shape[1 + count :]])])
    inner, outer = [2 + 2 * k for k in range(count)], [1 + 2 * k for k in range(count)]
    rest_axes = [1 + 2 * count + k for k in range(rest)]
    value = b.emit("Transpose", [value], perm=(*inner, 0, *outer, *rest_axes))
    made = b.info(op.outputs[0])
    b.write(op.outputs[0], b.emit("Reshape", [value, b.ints([-1 if made.is_open else made.shape[0], *made.shape[1:]])]))


def _refuse_open(b: GraphBuilder, op: OperatorCall, axes: Iterable[int]) -> None:
    """Raises Unsupported if the file leaves sizes open that must be known."""
    info = b.info(op.input(0))
    if info.is_open and any(info.signature[axis] < 0 for axis in axes):
        raise Unsupported(f"{op.name} of an image whose sizes are open: convert the model with fixed ones")


def batch_to_space(b: GraphBuilder, op: OperatorCall) -> None:
    """BATCH_TO_SPACE_ND: the inverse of SPACE_TO_BATCH_ND, followed by cropping."""
    blocks = b.list_of(op.input(1))
    cut = np.asarray(b.list_of(op.input(2)), np.int64).reshape(-1, 2)
    shape, count = b.info(op.input(0)).shape, len(blocks)
    _refuse_open(b, op, range(1, 1 + count))
    batch = -1 if b.info(op.input(0)).is_open else shape[0] // int(np.prod(blocks))
    value = b.emit("Reshape", [b.read(op.input(0)), b.ints([*blocks, batch, *shape[1:]])])
    order = [count]
    for k in range(count):
        order += [count + 1 + k, k]
    rest = [2 * count + 1 + k for k in range(len(shape) - 1 - count)]
    value = b.emit("Transpose", [value], perm=(*order, *rest))
    spatial = [size * block for size, block in zip(shape[1 : 1 + count], blocks, strict=True)]
    value = b.emit("Reshape", [value, b.ints([batch, *spatial, *shape[1 + count :]])])
    ends = [size - after for size, (_, after) in zip(spatial, cut.tolist(), strict=True)]
    axes = list(range(1, 1 + count))
    b.write(op.outputs[0], b.emit("Slice", [value, b.ints(cut[:, 0].tolist()), b.ints(ends), b.ints(axes)]))


def segment_sum(b: GraphBuilder, op: OperatorCall) -> None:
    """SEGMENT_SUM: adds the rows of each segment. Segments are in order, so the last one gives their number, which the
    file often does not."""
    value, ids = b.read(op.input(0)), b.emit("Cast", [b.read(op.input(1))], to=_INT64)
    last = b.emit("Slice", [ids, b.ints([-1]), b.ints([_FAR])])
    rest = b.emit("Slice", [b.emit("Shape", [value]), b.ints([1]), b.ints([_FAR])])
    shape = b.emit("Concat", [b.emit("Add", [last, b.ints([1])]), rest], axis=0)
    dtype = np.float32 if b.info(op.input(0)).is_quantized else b.info(op.input(0)).dtype
    empty = b.emit("ConstantOfShape", [shape], value=ir.tensor(np.zeros(1, dtype)))
    rows = b.emit("Unsqueeze", [ids, b.ints([-1])])
    b.write(op.outputs[0], b.emit("ScatterND", [empty, rows, value], reduction="add"))
