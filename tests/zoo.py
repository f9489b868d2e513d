"""The one set of models of the intermediate representation that every writer is tried with.

Each function gives a small Model of one theme, the same at every call; `zoo` puts those together that a writer without
limits must hold. `write` writes one; `assert_identical` says whether a reader gave back what a writer was given.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast
from zlib import crc32

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of, is_float
from nibblecast.converters.arithmetic.packing import pack
from nibblecast.converters.interfaces import Writer
from nibblecast.converters.ir import GroupIndex, Model, Quantization, Tensor, blocked, grid_shape, per_axis, per_tensor

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
SMALL_CODES = (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2, np.int8, np.uint8)
WIDE_CODES = (np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
FLOAT8 = (
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
)
PLAIN = (
    *FLOATS,
    *SMALL_CODES,
    *WIDE_CODES,
    *FLOAT8,
    np.float64,
    np.bool_,
    np.complex64,
    np.complex128,
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e8m0fnu,
)


def zoo() -> Model:
    """Every theme in one model, complex values aside (most runtimes refuse a whole file for one of those)."""
    themes = (granularities(), zero_points(), scales(), schemes(), small_floats(), wide_codes(), shapes(), names())
    tensors = {name: tensor for theme in (*themes, shared_parameters(), plain()) for name, tensor in theme.items()}
    return model(tensor for tensor in tensors.values() if tensor.dtype.kind != "c")


def model(tensors: Iterable[Tensor]) -> Model:
    """The tensors by their names."""
    return Model({tensor.name: tensor for tensor in tensors})


def codes(name: str, shape: Sequence[int], dtype: object) -> Tensor:
    """A plain tensor of random bits, the same for a name; small floats are finite, bools 0 and 1."""
    wanted = np.dtype(dtype)  # type: ignore[call-overload]
    rng = np.random.default_rng(crc32(name.encode("utf-8", "surrogatepass")))
    size = int(np.prod(shape, dtype=np.int64))
    if wanted.kind == "b":
        return Tensor.from_array(name, rng.integers(0, 2, shape).astype(np.bool_))
    if wanted in SUB_BYTE:
        bits = rng.integers(0, 1 << bits_of(wanted), size, np.uint8)
        bits[:2] = (0, (1 << bits_of(wanted)) - 1)[:size]
        plain = Tensor.from_array(name, np.zeros(tuple(shape), wanted))
        return replace(plain, data=type(plain.data)(pack(bits, bits_of(wanted))))
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        array = rng.integers(limits.min, limits.max, shape, wanted, endpoint=True)
        array.reshape(-1)[:2] = (limits.min, limits.max)[:size]
        return Tensor.from_array(name, array)
    if wanted.itemsize == 1:
        every = np.arange(256, dtype=np.uint8).view(wanted)
        finite = every[np.isfinite(every.astype(np.float32))]
        return Tensor.from_array(name, rng.choice(finite.view(np.uint8), shape).view(wanted))
    return Tensor.from_array(name, rng.normal(size=shape).astype(wanted))


def parameter(name: str, shape: Sequence[int], dtype: object) -> Tensor:
    """Values as scales have them, from 1e-6 to 1, the first 1e-30 where the dtype has that."""
    wanted = np.dtype(dtype)  # type: ignore[call-overload]
    rng = np.random.default_rng(crc32(name.encode("utf-8", "surrogatepass")))
    values = np.exp(rng.uniform(np.log(1e-6), 0, shape)).astype(np.float32)
    if values.size > 1:
        values.reshape(-1)[0] = 1e-30
    return Tensor.from_array(name, values.astype(wanted))


def quantized(
    name: str,
    shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    *,
    dtype: object = ml_dtypes.int4,
    scale: object = np.float32,
    zero_point: object = None,
    offset: object = None,
    codebook: object = None,
    group_index: GroupIndex | None = None,
) -> Tensor:
    """A tensor of random codes and parameters; the arguments after `dtype` are the parameters' dtypes."""
    grid = list(grid_shape(shape, block_shape))
    if group_index is not None:
        grid[group_index.axis] = int(group_index.index.numpy().max()) + 1
    base = codes(name, shape, dtype)
    zero = None
    if zero_point is not None:
        wanted = np.dtype(zero_point)  # type: ignore[call-overload]
        zero = parameter(f"{name}/zp", grid, wanted) if is_float(wanted) else codes(f"{name}/zp", grid, wanted)
    return replace(
        base,
        quantization=Quantization(
            parameter(f"{name}/scale", grid, scale),
            block_shape,
            zero,
            None if offset is None else parameter(f"{name}/offset", grid, offset),
            None if codebook is None else parameter(f"{name}/codebook", (1 << bits_of(base.dtype),), codebook),
            group_index,
        ),
    )


def granularities() -> Model:
    """Every width of codes, per tensor, per first and last axis, in blocks that fit and blocks that do not."""
    shape, deep = (5, 50), (3, 2, 35)
    tensors = []
    for dtype in (*SMALL_CODES, np.int16, np.uint16, np.int32):
        of = np.dtype(dtype).name
        tensors += [
            quantized(f"{of} per tensor", shape, per_tensor(shape), dtype=dtype),
            quantized(f"{of} per first axis", shape, per_axis(shape, 0), dtype=dtype),
            quantized(f"{of} per last axis", shape, per_axis(shape, 1), dtype=dtype),
            quantized(f"{of} in blocks of 10", shape, blocked(shape, 1, 10), dtype=dtype),
            quantized(f"{of} in ragged blocks", shape, blocked(shape, 1, 16), dtype=dtype),
            quantized(f"{of} in blocks along the first axis", shape, blocked(shape, 0, 2), dtype=dtype),
            quantized(f"{of} 3-D, per middle axis", deep, per_axis(deep, 1), dtype=dtype),
            quantized(f"{of} 3-D in blocks", deep, blocked(deep, 2, 32), dtype=dtype),
            quantized(f"{of} in blocks along two axes", deep, (2, 1, 32), dtype=dtype),
        ]
    return model(tensors)


def zero_points() -> Model:
    """Zero points of the codes' dtype, of others, floats, and beyond the codes' range."""
    shape = (6, 21)
    tensors = []
    for dtype in (*SMALL_CODES, np.int16, np.uint16):
        for block_shape in (per_tensor(shape), per_axis(shape, 0), blocked(shape, 1, 8)):
            name = f"{np.dtype(dtype).name} minus its own, {block_shape}"
            tensors.append(quantized(name, shape, block_shape, dtype=dtype, zero_point=dtype))
    for zero_point in (np.int8, np.int32, np.int64, np.float32, np.float16, ml_dtypes.bfloat16):
        name = f"int4 minus {np.dtype(zero_point).name}"
        tensors.append(quantized(name, shape, per_axis(shape, 1), zero_point=zero_point))
    fitting = quantized("int4 minus int64 that fit", shape, per_axis(shape, 0))
    zero_point = Tensor.from_array("fits", np.array([[-8], [7], [0], [1], [2], [3]], np.int64))
    tensors.append(replace(fitting, quantization=replace(fitting.quantization, zero_point=zero_point)))
    return model(tensors)


def scales() -> Model:
    """Scales of every floating-point dtype."""
    shape = (4, 33)
    tensors = []
    for dtype in (*FLOATS, np.float64, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn):
        for block_shape in (per_tensor(shape), per_axis(shape, 0), blocked(shape, 1, 32)):
            name = f"scale of {np.dtype(dtype).name}, {block_shape}"
            tensors.append(quantized(name, shape, block_shape, scale=dtype))
    return model(tensors)


def schemes() -> Model:
    """Codebooks, offsets, group indices, and these together."""
    shape = (5, 24)
    block_shape = blocked(shape, 1, 8)
    act_order = GroupIndex(
        1, Tensor.from_array("g_idx", np.random.default_rng(0).permutation(24).astype(np.int32) // 8)
    )
    in_order = GroupIndex(1, Tensor.from_array("g_idx in order", np.arange(24, dtype=np.int64) // 8))
    narrow = GroupIndex(0, Tensor.from_array("g_idx of rows", np.array([1, 0, 1, 1, 2], np.uint8)))
    uint4, uint2 = ml_dtypes.uint4, ml_dtypes.uint2
    return model(
        [
            quantized("codebook of uint4", shape, block_shape, dtype=uint4, codebook=np.float32),
            quantized("codebook of uint2", shape, per_axis(shape, 0), dtype=uint2, codebook=np.float16),
            quantized("codebook of uint8", shape, per_tensor(shape), dtype=np.uint8, codebook=ml_dtypes.bfloat16),
            quantized("codebook of float4", shape, block_shape, dtype=uint4, codebook=ml_dtypes.float4_e2m1fn),
            quantized("offset", shape, block_shape, offset=np.float32),
            quantized("offset of float16", shape, per_tensor(shape), scale=np.float16, offset=np.float16),
            quantized("offset and zero point", shape, block_shape, zero_point=ml_dtypes.int4, offset=np.float32),
            quantized("group index", shape, block_shape, group_index=act_order),
            quantized("group index in order", shape, block_shape, zero_point=ml_dtypes.int4, group_index=in_order),
            quantized("group index of rows", shape, (2, 24), scale=np.float16, group_index=narrow),
            quantized(
                "everything",
                shape,
                (2, 8),
                dtype=uint4,
                zero_point=np.float16,
                offset=np.float16,
                codebook=np.float32,
                group_index=act_order,
            ),
        ]
    )


def small_floats() -> Model:
    """float8 and float4 codes."""
    shape = (4, 33)
    tensors = []
    for dtype in (*FLOAT8, ml_dtypes.float4_e2m1fn, np.float16):
        for block_shape in (per_tensor(shape), per_axis(shape, 1), blocked(shape, 1, 16), (2, 16)):
            name = f"{np.dtype(dtype).name} codes, {block_shape}"
            tensors.append(quantized(name, shape, block_shape, dtype=dtype))
    mx = {"dtype": ml_dtypes.float4_e2m1fn, "scale": ml_dtypes.float8_e8m0fnu}
    tensors.append(quantized("mxfp4", shape, blocked(shape, 1, 32), **mx))
    return model(tensors)


def wide_codes() -> Model:
    """Codes of 16 bits and more, which float32 does not hold, with zero points and without."""
    shape = (3, 10)
    tensors = []
    for dtype in WIDE_CODES:
        for zero_point in (None, dtype, np.int8, np.float32):
            name = f"{np.dtype(dtype).name} minus {zero_point and np.dtype(zero_point).name}"
            tensors.append(quantized(name, shape, blocked(shape, 1, 4), dtype=dtype, zero_point=zero_point))
        tensors.append(quantized(f"{np.dtype(dtype).name} bias", (7,), per_axis((7,), 0), dtype=dtype))
        zeros = Tensor.from_array("zeros", np.zeros((7,), np.int64))
        bias = quantized(f"{np.dtype(dtype).name} bias minus zeros", (7,), per_axis((7,), 0), dtype=dtype)
        tensors.append(replace(bias, quantization=replace(bias.quantization, zero_point=zeros)))
    return model(tensors)


def shapes() -> Model:
    """No axes, no elements, one element, odd counts, many axes, and blocks larger than their axis."""
    tensors = []
    for shape in ((), (0,), (1,), (3,), (0, 4), (4, 0), (1, 1), (1, 7), (7, 1), (1, 3, 1, 5), (2, 1, 1, 2, 1, 3)):
        tensors.append(quantized(f"per tensor {shape}", shape, per_tensor(shape), zero_point=ml_dtypes.int4))
        tensors.append(codes(f"plain {shape}", shape, np.float32))
        tensors.append(codes(f"plain int4 {shape}", shape, ml_dtypes.int4))
        for axis in range(len(shape)):
            tensors.append(quantized(f"per axis {axis} of {shape}", shape, per_axis(shape, axis)))
            tensors.append(quantized(f"blocks along {axis} of {shape}", shape, blocked(shape, axis, 2)))
            tensors.append(quantized(f"large blocks along {axis} of {shape}", shape, blocked(shape, axis, 32)))
    tensors.append(quantized("larger blocks", (3, 5), (8, 2), zero_point=ml_dtypes.int4))
    tensors.append(quantized("larger than all", (3, 5), (8, 8), zero_point=np.float32))
    return model(tensors)


def names() -> Model:
    """Names that are hard to carry, and names that collide with those that a writer may make of others."""
    hard = (
        *(
            "a b",
            " ",
            "\u00a0",
            "\u200b",
            ".",
            "..",
            "/",
            "a/b:1",
            "Gewicht_größe",
            "重み",
            "🎉",
            "%s",
            "{}",
            "\\n",
            "'\"",
        ),
        *("line\nbreak", "tab\there", "\x1b[31mred", "nul\0byte", "*/", "??/", "int", "0start", "x" * 300),
        *("w", "w_quantized", "w_scale", "w_zero_point", "w_scale_1", "w_quantized_float32", "W", "w.scale", "w/scale"),
        *("blocks_of_2_in_3", "float4_e2m1fn_values"),
    )
    shape = (2, 3)
    arithmetic = {"zero_point": np.float32, "dtype": ml_dtypes.float4_e2m1fn}
    return model(
        [
            quantized(name, shape, blocked(shape, 1, 2), **arithmetic)
            if len(name) % 2
            else quantized(name, shape, per_axis(shape, 0), zero_point=ml_dtypes.int4)
            for name in hard
        ]
    )


def shared_parameters() -> Model:
    """Weights whose scales and zero points are tensors of the model themselves."""
    shape = (4, 32)
    owner = quantized("owner", shape, blocked(shape, 1, 8), scale=np.float16, zero_point=ml_dtypes.int4)
    per_row = quantized("owner by row", shape, per_axis(shape, 0))
    renamed = []
    for one in (owner, per_row):
        quantization = one.quantization
        scale = replace(quantization.scale, name=f"scale of {one.name}", parameter_of=one.name)
        changes = {"scale": scale}
        if quantization.zero_point is not None:
            zero_point = replace(quantization.zero_point, name=f"zero point of {one.name}", parameter_of=one.name)
            changes["zero_point"] = zero_point
        renamed += [replace(one, quantization=replace(quantization, **changes)), *changes.values()]
    return model(renamed)


def plain() -> Model:
    """Plain values of every dtype, an odd number of them."""
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    tensors = [codes(f"plain {np.dtype(dtype).name}", (3, 5), dtype) for dtype in PLAIN]
    tensors += [Tensor.from_array(f"special {np.dtype(t).name}", special.astype(t)) for t in (np.float32, np.float64)]
    return model(tensors)


class FrontToBack(io.FileIO):
    """A file that can only be written front to back."""

    def seek(self, offset: int, whence: int = 0) -> int:
        raise AssertionError(f"a writer seeks, to {offset} ({whence})")


def write(writer: Writer, model: Model, path: Path, options: Any) -> Any:
    """Writes a model as the pipeline does, and fails unless every file has the size that the plan gave, every shard
    tells of as many bytes as it has, and all is written front to back. The plan."""
    plan = writer.plan(model, path, options)
    for shard in plan.shards:
        told: list[int] = []
        with FrontToBack(shard.file.path, "w") as stream:
            shard.write(cast("BinaryIO", stream), told.append)
        assert sum(told) == shard.nbytes, shard.file.path
    for companion in plan.companions:
        assert isinstance(companion.content, bytes)
        companion.file.path.write_bytes(companion.content)
    for file in plan.files:
        assert file.nbytes in (None, file.path.stat().st_size), file.path
    return plan


def assert_identical(read: Model, written: Model) -> None:
    """Fails unless both have the same tensors in the same order: names, shapes, dtypes, bytes, parameters, and which
    tensors are parameters of which."""
    assert list(read) == list(written)
    for name, tensor in written.items():
        _assert_same(read[name], tensor, name)
        assert read[name].parameter_of == tensor.parameter_of, name


def _assert_same(read: Tensor, written: Tensor, where: str) -> None:
    assert (read.shape, read.dtype) == (written.shape, written.dtype), where
    assert read.packed().tobytes() == written.packed().tobytes(), where
    assert (read.quantization is None) == (written.quantization is None), where
    if read.quantization is None or written.quantization is None:
        return
    assert _blocks(read) == _blocks(written), where
    parameters, wanted = dict(read.quantization.parameters()), dict(written.quantization.parameters())
    assert list(parameters) == list(wanted), where
    for role, one in wanted.items():
        _assert_same(parameters[role], one, f"{role} of {where}")


def _blocks(tensor: Tensor) -> tuple[int, ...]:
    """The block shape without what lies beyond the tensor's end, which no value depends on."""
    return tuple(min(b, max(1, size)) for b, size in zip(tensor.quantization.block_shape, tensor.shape, strict=True))
