"""Convolutions and pooling: images become channels first, and stored weights are permuted.

Permuting the stored weight instead of adding a Transpose keeps it an initializer. Codes can then be written in the new
order, and the weight stays a weight for every later reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nibblecast.converters.errors import Unsupported
from nibblecast.formats.tflite.options import Options
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall

_SAME, _VALID = 0, 1


def conv_2d(b: GraphBuilder, op: OperatorCall) -> None:
    """CONV_2D: weights [O, H, W, I / groups]."""
    image, weight = b.info(op.input(0)).shape, b.info(op.input(1)).shape
    groups = image[-1] // weight[-1]
    _convolve(b, op, (0, 3, 1, 2), weight[1:3], groups, _strides(op.options), _dilations(op.options))


def depthwise_conv_2d(b: GraphBuilder, op: OperatorCall) -> None:
    """DEPTHWISE_CONV_2D: weights [1, H, W, C * multiplier], the multiplier varies fastest."""
    image, weight = b.info(op.input(0)).shape, b.info(op.input(1)).shape
    _convolve(b, op, (3, 0, 1, 2), weight[1:3], image[-1], _strides(op.options), _dilations(op.options))


def conv_3d(b: GraphBuilder, op: OperatorCall) -> None:
    """CONV_3D: weights [D, H, W, I, O]."""
    image, weight = b.info(op.input(0)).shape, b.info(op.input(1)).shape
    integer = op.options.integer
    strides = [integer(f"stride_{axis}") for axis in "dhw"]
    dilations = [integer(f"dilation_{axis}_factor") for axis in "dhw"]
    _convolve(b, op, (4, 3, 0, 1, 2), weight[:3], image[-1] // weight[3], strides, dilations)


def _convolve(
    b: GraphBuilder,
    op: OperatorCall,
    permutation: tuple[int, ...],
    kernel: Sequence[int],
    groups: int,
    strides: list[int],
    dilations: list[int],
) -> None:
    attributes: dict[str, Any] = {
        "kernel_shape": list(kernel),
        "strides": strides,
        "dilations": dilations,
        "group": groups,
        **padding(b, op, kernel, strides, dilations),
    }
    inputs = [b.read_first(op.input(0)), kernel_value(b, op.input(1), permutation)]
    if op.input(2) >= 0:
        inputs.append(b.read(op.input(2)))
    b.finish(op, b.emit("Conv", inputs, **attributes), first=True)


def kernel_value(b: GraphBuilder, index: int, permutation: tuple[int, ...]) -> ir.Value:
    """A weight with its axes permuted: a constant as stored, a computed one by a Transpose."""
    if b.info(index).constant is not None and index not in b.held:
        return b.weight(index, permutation)
    return b.emit("Transpose", [b.read(index)], perm=permutation)


def transpose_conv(b: GraphBuilder, op: OperatorCall) -> None:
    """TRANSPOSE_CONV: inputs are the result's shape, weights [O, H, W, I], the image, and perhaps a bias."""
    weight = b.info(op.input(1)).shape
    _convolve_transposed(b, op, (3, 0, 1, 2), weight[1:3], _strides(op.options), [1, 1])


def conv_3d_transpose(b: GraphBuilder, op: OperatorCall) -> None:
    """CONV_3D_TRANSPOSE: inputs are the result's shape, weights [D, H, W, O, I], the image, and perhaps a bias."""
    weight, integer = b.info(op.input(1)).shape, op.options.integer
    strides = [integer(f"stride_{axis}") for axis in "dhw"]
    dilations = [integer(f"dilation_{axis}_factor") for axis in "dhw"]
    _convolve_transposed(b, op, (4, 3, 0, 1, 2), weight[:3], strides, dilations)


def _convolve_transposed(
    b: GraphBuilder,
    op: OperatorCall,
    permutation: tuple[int, ...],
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
) -> None:
    """Emits ConvTranspose with the padding of the convolution that it is the gradient of
    (lite/kernels/transpose_conv.cc)."""
    image, result = b.info(op.input(2)).shape, b.info(op.outputs[0]).shape
    before, after, more = [], [], []
    is_same = op.options.integer("padding") == _SAME
    is_open = any(size < 0 for size in b.info(op.input(2)).signature[1:-1])
    axes = zip(image[1:-1], result[1:-1], kernel, strides, dilations, strict=True)
    for size, wide, window, stride, dilation in axes:
        surplus = (size - 1) * stride + (window - 1) * dilation + 1 - wide
        if is_open:  # the size of the result is the one that Keras asks for
            surplus = (window - 1) * dilation + 1 - stride
            surplus = surplus if is_same else min(surplus, 0)
        total = max(surplus, 0)
        before.append(total // 2 if is_same else 0)
        after.append(max(surplus - before[-1], 0))
        more.append(max(-surplus, 0))
    attributes: dict[str, Any] = {
        "kernel_shape": list(kernel),
        "strides": strides,
        "dilations": dilations,
        "pads": before + after,
        "output_padding": more,
    }
    inputs = [b.read_first(op.input(2)), kernel_value(b, op.input(1), permutation)]
    if op.input(3) >= 0:
        inputs.append(b.read(op.input(3)))
    b.finish(op, b.emit("ConvTranspose", inputs, **attributes), first=True)


def average_pool_2d(b: GraphBuilder, op: OperatorCall) -> None:
    """AVERAGE_POOL_2D: padding is not part of the average."""
    b.finish(op, b.emit("AveragePool", [b.read_first(op.input(0))], **_pool(b, op), count_include_pad=0), first=True)


def max_pool_2d(b: GraphBuilder, op: OperatorCall) -> None:
    """MAX_POOL_2D."""
    b.finish(op, b.emit("MaxPool", [b.read_first(op.input(0))], **_pool(b, op)), first=True)


def l2_pool_2d(b: GraphBuilder, op: OperatorCall) -> None:
    """L2_POOL_2D: the root of the mean of squares."""
    value = b.read_first(op.input(0))
    squares = b.emit("Mul", [value, value])
    mean = b.emit("AveragePool", [squares], **_pool(b, op), count_include_pad=0)
    b.finish(op, b.emit("Sqrt", [mean]), first=True)


def _pool(b: GraphBuilder, op: OperatorCall) -> dict[str, Any]:
    kernel = [op.options.integer("filter_height"), op.options.integer("filter_width")]
    strides = _strides(op.options)
    return {"kernel_shape": kernel, "strides": strides, **padding(b, op, kernel, strides, [1, 1])}


def padding(
    b: GraphBuilder, op: OperatorCall, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> dict[str, Any]:
    """The attributes for the padding of an image. If the file leaves sizes open, the runtime computes the padding,
    unless it is the same for all sizes."""
    image, how = b.info(op.input(0)), op.options.integer("padding")
    is_open = any(size < 0 for size in image.signature[1:-1])
    if how == _SAME and is_open and any(stride > 1 for stride in strides):
        return {"auto_pad": "SAME_UPPER"}
    return {"pads": pads(how, image.shape[1:-1], kernel, strides, dilations)}


def pads(
    padding: int, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Zeros before and after each axis (schema.fbs, Padding; lite/kernels/padding.h)."""
    if padding == _VALID:
        return [0] * (2 * len(sizes))
    if padding != _SAME:
        raise Unsupported(f"padding {padding} is not known")
    before, after = [], []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return before + after


def _strides(options: Options) -> list[int]:
    return [options.integer("stride_h"), options.integer("stride_w")]


def _dilations(options: Options) -> list[int]:
    return [options.integer("dilation_h_factor"), options.integer("dilation_w_factor")]


def resize(mode: str, nearest: bool) -> Any:
    """RESIZE_BILINEAR and RESIZE_NEAREST_NEIGHBOR: the size is the second input."""

    def lower(b: GraphBuilder, op: OperatorCall) -> None:
        align = bool(op.options.integer("align_corners"))
        half = bool(op.options.integer("half_pixel_centers"))
        how = "align_corners" if align else "half_pixel" if half else "asymmetric"
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
        if nearest:  # TFLite rounds halves up if corners or centres are aligned, else down
            attributes["nearest_mode"] = "round_prefer_ceil" if align or half else "floor"
        image, value, size = b.info(op.input(0)), b.read_first(op.input(0)), b.numbers(op.input(1))
        sizes = [] if size is None else [int(each) for each in np.asarray(size).reshape(-1)]
        if sizes and not image.is_open:
            wanted = b.ints([image.shape[0], image.shape[3], *sizes])
        else:  # batch and channels keep their sizes
            kept = b.emit("Slice", [b.emit("Shape", [value]), b.ints([0]), b.ints([2])])
            given = b.ints(sizes) if sizes else b.emit("Cast", [b.read(op.input(1))], to=int(ir.DataType.INT64))
            wanted = b.emit("Concat", [kept, given], axis=0)
        value = b.emit("Resize", [value, None, None, wanted], **attributes)
        b.write(op.outputs[0], value, first=True)

    return lower


def depth_to_space(b: GraphBuilder, op: OperatorCall) -> None:
    """DEPTH_TO_SPACE: the depth varies fastest, as in ONNX's mode DCR."""
    size = op.options.integer("block_size")
    b.write(op.outputs[0], b.emit("DepthToSpace", [b.read_first(op.input(0))], blocksize=size, mode="DCR"), first=True)


def space_to_depth(b: GraphBuilder, op: OperatorCall) -> None:
    """SPACE_TO_DEPTH."""
    size = op.options.integer("block_size")
    b.write(op.outputs[0], b.emit("SpaceToDepth", [b.read_first(op.input(0))], blocksize=size), first=True)
