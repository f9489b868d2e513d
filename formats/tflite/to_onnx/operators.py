"""The table of TFLite's operators: how each becomes ONNX.

The summaries and limits stand beside the functions and not in docs/tflite-operators.md, because that page is made from
this table and so cannot contradict the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nibblecast.formats.tflite.to_onnx import (
    control_flow,
    convolution,
    dense,
    elementwise,
    positions,
    recurrent,
    reductions,
    shapes,
    storage,
)
from nibblecast.formats.tflite.to_onnx.builder import GraphBuilder, OperatorCall
from nibblecast.formats.tflite.to_onnx.elementwise import binary, clipped, negated, unary


@dataclass(frozen=True, slots=True)
class OperatorLowering:
    """A lowering function, a summary of the ONNX operators that it emits, and what it cannot do."""

    function: Callable[[GraphBuilder, OperatorCall], None]
    how: str
    limits: str = ""


def _table(
    *entries: tuple[str, Callable[[GraphBuilder, OperatorCall], None], str, str],
) -> Mapping[str, OperatorLowering]:
    return MappingProxyType({name: OperatorLowering(function, how, limits) for name, function, how, limits in entries})


LOWERINGS: Mapping[str, OperatorLowering] = _table(
    # activations and elementwise
    ("ABS", unary("Abs"), "Abs", ""),
    ("ADD", binary("Add", fused=True), "Add", ""),
    ("ADD_N", elementwise.add_n, "Sum", ""),
    ("ATAN2", elementwise.arc_tangent_2, "Atan, Where", ""),
    ("BITWISE_XOR", binary("BitwiseXor"), "BitwiseXor", ""),
    ("BUCKETIZE", positions.bucketize, "GreaterOrEqual, ReduceSum", ""),
    ("CEIL", unary("Ceil"), "Ceil", ""),
    ("COS", unary("Cos"), "Cos", ""),
    ("DIV", binary("Div", fused=True), "Div", ""),
    ("ELU", unary("Elu"), "Elu", ""),
    ("EQUAL", binary("Equal"), "Equal", ""),
    ("EXP", unary("Exp"), "Exp", ""),
    ("FLOOR", unary("Floor"), "Floor", ""),
    ("FLOOR_DIV", elementwise.floor_div, "Div, Floor, Mod", ""),
    ("FLOOR_MOD", elementwise.floor_mod, "Mod, or Div, Floor, Mul, Sub", ""),
    ("GELU", elementwise.gelu, "Gelu; below opset 20 Erf or Tanh", ""),
    ("GREATER", binary("Greater"), "Greater", ""),
    ("GREATER_EQUAL", binary("GreaterOrEqual"), "GreaterOrEqual", ""),
    ("HARD_SWISH", elementwise.hard_swish, "HardSwish", ""),
    ("L2_NORMALIZATION", elementwise.l2_normalization, "ReduceSum, Sqrt, Max, Div", ""),
    ("LEAKY_RELU", elementwise.leaky_relu, "LeakyRelu", ""),
    ("LESS", binary("Less"), "Less", ""),
    ("LESS_EQUAL", binary("LessOrEqual"), "LessOrEqual", ""),
    ("LOCAL_RESPONSE_NORMALIZATION", elementwise.local_response_normalization, "LRN", ""),
    ("LOG", unary("Log"), "Log", ""),
    ("LOGICAL_AND", binary("And"), "And", ""),
    ("LOGICAL_NOT", unary("Not"), "Not", ""),
    ("LOGICAL_OR", binary("Or"), "Or", ""),
    ("LOGISTIC", unary("Sigmoid"), "Sigmoid", ""),
    ("LOG_SOFTMAX", elementwise.log_softmax, "LogSoftmax", ""),
    ("MAXIMUM", binary("Max"), "Max", ""),
    ("MINIMUM", binary("Min"), "Min", ""),
    ("MUL", binary("Mul", fused=True), "Mul", ""),
    ("NEG", unary("Neg"), "Neg", ""),
    ("NOT_EQUAL", negated("Equal"), "Equal, Not", ""),
    ("POW", binary("Pow"), "Pow", ""),
    ("PRELU", elementwise.prelu, "PRelu", ""),
    ("RELU", unary("Relu"), "Relu", ""),
    ("RELU6", clipped(0.0, 6.0), "Clip", ""),
    ("RELU_0_TO_1", clipped(0.0, 1.0), "Clip", ""),
    ("RELU_N1_TO_1", clipped(-1.0, 1.0), "Clip", ""),
    ("RIGHT_SHIFT", elementwise.right_shift, "BitShift, or Pow, Mod, Sub, Div", ""),
    ("ROUND", unary("Round"), "Round", ""),
    ("RSQRT", elementwise.reciprocal_square_root, "Sqrt, Reciprocal", ""),
    ("SELECT", elementwise.select, "Where", ""),
    ("SELECT_V2", elementwise.select, "Where", ""),
    ("SIGN", unary("Sign"), "Sign", ""),
    ("SIN", unary("Sin"), "Sin", ""),
    ("SOFTMAX", elementwise.softmax, "Softmax", ""),
    ("SQRT", unary("Sqrt"), "Sqrt", ""),
    ("SQUARE", elementwise.square, "Mul", ""),
    ("SQUARED_DIFFERENCE", elementwise.squared_difference, "Sub, Mul", ""),
    ("SUB", binary("Sub", fused=True), "Sub", ""),
    ("TANH", unary("Tanh"), "Tanh", ""),
    # convolutions and images
    ("AVERAGE_POOL_2D", convolution.average_pool_2d, "AveragePool", ""),
    ("CONV_2D", convolution.conv_2d, "Conv", ""),
    ("CONV_3D", convolution.conv_3d, "Conv", ""),
    ("CONV_3D_TRANSPOSE", convolution.conv_3d_transpose, "ConvTranspose", ""),
    ("DEPTHWISE_CONV_2D", convolution.depthwise_conv_2d, "Conv with groups", ""),
    ("DEPTH_TO_SPACE", convolution.depth_to_space, "DepthToSpace", ""),
    ("L2_POOL_2D", convolution.l2_pool_2d, "Mul, AveragePool, Sqrt", ""),
    ("MAX_POOL_2D", convolution.max_pool_2d, "MaxPool", ""),
    ("RESIZE_BILINEAR", convolution.resize("linear", nearest=False), "Resize", ""),
    ("RESIZE_NEAREST_NEIGHBOR", convolution.resize("nearest", nearest=True), "Resize", ""),
    ("SPACE_TO_DEPTH", convolution.space_to_depth, "SpaceToDepth", ""),
    ("TRANSPOSE_CONV", convolution.transpose_conv, "ConvTranspose", ""),
    # control flow and variables
    ("ASSIGN_VARIABLE", control_flow.assign_variable, "what reads after it take", ""),
    ("CALL_ONCE", control_flow.call_once, "initial values of variables", ""),
    ("IF", control_flow.if_, "If", ""),
    ("READ_VARIABLE", control_flow.read_variable, "an input that begins at zero", ""),
    ("STABLEHLO_COMPOSITE", control_flow.composite, "its decomposition", ""),
    ("VAR_HANDLE", control_flow.variable_handle, "nothing", ""),
    ("WHILE", control_flow.while_, "Loop", ""),
    # matrix products
    ("BATCH_MATMUL", dense.batch_matmul, "MatMul", ""),
    ("FULLY_CONNECTED", dense.fully_connected, "Gemm", "no shuffled weights"),
    # reductions
    ("ARG_MAX", reductions.search("ArgMax"), "ArgMax", "a constant axis"),
    ("ARG_MIN", reductions.search("ArgMin"), "ArgMin", "a constant axis"),
    ("CUMSUM", reductions.cumulative_sum, "CumSum", "a constant axis"),
    ("MEAN", reductions.reduce("ReduceMean"), "ReduceMean", "constant axes"),
    ("REDUCE_ALL", reductions.reduce_bool("ReduceMin"), "ReduceMin", "constant axes"),
    ("REDUCE_ANY", reductions.reduce_bool("ReduceMax"), "ReduceMax", "constant axes"),
    ("REDUCE_MAX", reductions.reduce("ReduceMax"), "ReduceMax", "constant axes"),
    ("REDUCE_MIN", reductions.reduce("ReduceMin"), "ReduceMin", "constant axes"),
    ("REDUCE_PROD", reductions.reduce("ReduceProd"), "ReduceProd", "constant axes"),
    ("SUM", reductions.reduce("ReduceSum"), "ReduceSum", "constant axes"),
    ("TOPK_V2", reductions.top_k, "TopK", ""),
    # positions
    ("BROADCAST_ARGS", positions.broadcast_args, "Concat, Where", ""),
    ("MATRIX_DIAG", positions.matrix_diag, "Where", "a constant size"),
    ("MATRIX_SET_DIAG", positions.matrix_set_diag, "Where", "constant sizes"),
    ("NON_MAX_SUPPRESSION_V4", positions.non_max_suppression, "NonMaxSuppression, Pad", ""),
    ("NON_MAX_SUPPRESSION_V5", positions.non_max_suppression, "NonMaxSuppression, Pad", "no soft suppression"),
    ("REVERSE_SEQUENCE", positions.reverse_sequence, "ReverseSequence", ""),
    ("SPARSE_TO_DENSE", positions.sparse_to_dense, "ScatterND", ""),
    ("UNIQUE", positions.unique, "Unique", ""),
    ("UNSORTED_SEGMENT_MAX", positions.unsorted_segment("max"), "ScatterND", ""),
    ("UNSORTED_SEGMENT_MIN", positions.unsorted_segment("min"), "ScatterND", ""),
    ("UNSORTED_SEGMENT_PROD", positions.unsorted_segment("mul"), "ScatterND", ""),
    ("UNSORTED_SEGMENT_SUM", positions.unsorted_segment("add"), "ScatterND", ""),
    # recurrent
    ("LSTM", recurrent.lstm_cell, "the cell's own arithmetic", "the full kernel only; states begin at zero"),
    ("SVDF", recurrent.svdf, "Gemm, Concat, Slice, Mul, ReduceSum", "the state begins at zero"),
    (
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        recurrent.sequence_lstm,
        "Scan over the cell's own arithmetic",
        "states begin at zero",
    ),
    # shapes
    ("BATCH_TO_SPACE_ND", shapes.batch_to_space, "Reshape, Transpose, Slice", "constant blocks"),
    ("BROADCAST_TO", shapes.broadcast_to, "Expand", ""),
    ("CONCATENATION", shapes.concatenation, "Concat", ""),
    ("DYNAMIC_UPDATE_SLICE", shapes.dynamic_update_slice, "ScatterND", ""),
    ("EMBEDDING_LOOKUP", shapes.embedding_lookup, "Gather", ""),
    ("EXPAND_DIMS", shapes.expand_dims, "Unsqueeze", "a constant axis"),
    ("FILL", shapes.fill, "Expand", ""),
    ("GATHER", shapes.gather, "Gather; GatherND with batch_dims", ""),
    ("GATHER_ND", shapes.gather_nd, "GatherND", ""),
    ("MIRROR_PAD", shapes.mirror_pad, "Pad; mode SYMMETRIC Gather", "constant sizes in mode SYMMETRIC"),
    ("ONE_HOT", shapes.one_hot, "OneHot", ""),
    ("PACK", shapes.pack, "Unsqueeze, Concat", ""),
    ("PAD", shapes.pad, "Pad", ""),
    ("PADV2", shapes.pad, "Pad", ""),
    ("RANGE", shapes.range_, "Range", ""),
    ("RANK", shapes.rank_of, "a constant", ""),
    ("RESHAPE", shapes.reshape, "Reshape", ""),
    ("REVERSE_V2", shapes.reverse, "Slice", "constant axes"),
    ("SCATTER_ND", shapes.scatter_nd, "ScatterND", ""),
    ("SEGMENT_SUM", shapes.segment_sum, "ScatterND", ""),
    ("SHAPE", shapes.shape_of, "Shape", ""),
    ("SLICE", shapes.slice_, "Slice", ""),
    ("SPACE_TO_BATCH_ND", shapes.space_to_batch, "Pad, Reshape, Transpose", "constant blocks"),
    ("SPLIT", shapes.split, "Split", "a constant axis"),
    ("SPLIT_V", shapes.split_v, "Split", "constant sizes"),
    ("SQUEEZE", shapes.squeeze, "Squeeze", ""),
    ("STRIDED_SLICE", shapes.strided_slice, "Slice, Squeeze, Unsqueeze", "constant strides"),
    ("TILE", shapes.tile, "Tile", ""),
    ("TRANSPOSE", shapes.transpose, "Transpose", "a constant permutation"),
    ("UNPACK", shapes.unpack, "Gather", ""),
    ("WHERE", shapes.where, "NonZero, Transpose", ""),
    # storage
    ("CAST", storage.cast, "Cast", ""),
    ("DENSIFY", storage.unpacked, "nothing: the weights are expanded", ""),
    ("DEQUANTIZE", storage.unpacked, "DequantizeLinear, or Cast of half floats", ""),
    ("FAKE_QUANT", storage.fake_quant, "Clip, Sub, Mul, Floor, Add", ""),
    ("QUANTIZE", storage.quantize, "QuantizeLinear", ""),
    ("ZEROS_LIKE", storage.zeros_like, "ConstantOfShape", ""),
)
