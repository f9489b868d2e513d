"""The part of TFLite's schema that weights need, version 3d, and what LiteRT 2.3 adds to it.

Source: tflite/converter/schema/schema.fbs of google-ai-edge/LiteRT (2026-08).

The classes are written by hand because no package has all of the schema. The PyPI package `tflite` 2.18 lacks INT2,
UINT4, the float8 types, BlockwiseQuantization, MultiAxisQuantization and external buffers. The tests compare these
tables with the part that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from nibblecast.converters.arithmetic.dtypes import BFLOAT16, BOOL, FLOAT8_E4M3, FLOAT8_E5M2, INT2, INT4, UINT4
from nibblecast.formats.tflite.flatbuffer import Table, payload, scalar, string, table, tables, vector

IDENTIFIER = b"TFL3"
VERSION = 3

TENSOR_TYPES = (
    "FLOAT32 FLOAT16 INT32 UINT8 INT64 STRING BOOL INT16 COMPLEX64 INT8 FLOAT64 COMPLEX128 UINT64 RESOURCE VARIANT "
    "UINT32 UINT16 INT4 BFLOAT16 INT2 UINT4 FLOAT8_E4M3FN FLOAT8_E5M2"
).split()

#: The dtypes of tensor types that hold numbers. STRING, RESOURCE and VARIANT do not hold numbers.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {name: np.dtype(name.lower()) for name in TENSOR_TYPES if hasattr(np, name.lower())}
    | {
        "BOOL": BOOL,
        "INT4": INT4,
        "INT2": INT2,
        "UINT4": UINT4,
        "BFLOAT16": BFLOAT16,
        "FLOAT8_E4M3FN": FLOAT8_E4M3,
        "FLOAT8_E5M2": FLOAT8_E5M2,
    }
)

CUSTOM = 32
#: The names of the builtin operators by code; codes that the schema marks deprecated keep their names.
BUILTIN_OPERATORS = """
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR
    FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC
    LSH_PROJECTION LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH
    SVDF TANH CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER
    BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE
    BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM
    ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE
    TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK
    LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL
    FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL
    REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND
    HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM
    BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS
    HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE
    ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU
    DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2
    UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT STABLEHLO_LOGISTIC STABLEHLO_ADD STABLEHLO_DIVIDE
    STABLEHLO_MULTIPLY STABLEHLO_MAXIMUM STABLEHLO_RESHAPE STABLEHLO_CLAMP STABLEHLO_CONCATENATE
    STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CONVOLUTION STABLEHLO_SLICE STABLEHLO_CUSTOM_CALL STABLEHLO_REDUCE
    STABLEHLO_ABS STABLEHLO_AND STABLEHLO_COSINE STABLEHLO_EXPONENTIAL STABLEHLO_FLOOR STABLEHLO_LOG
    STABLEHLO_MINIMUM STABLEHLO_NEGATE STABLEHLO_OR STABLEHLO_POWER STABLEHLO_REMAINDER STABLEHLO_RSQRT
    STABLEHLO_SELECT STABLEHLO_SUBTRACT STABLEHLO_TANH STABLEHLO_SCATTER STABLEHLO_COMPARE STABLEHLO_CONVERT
    STABLEHLO_DYNAMIC_SLICE STABLEHLO_DYNAMIC_UPDATE_SLICE STABLEHLO_PAD STABLEHLO_IOTA STABLEHLO_DOT_GENERAL
    STABLEHLO_REDUCE_WINDOW STABLEHLO_SORT STABLEHLO_WHILE STABLEHLO_GATHER STABLEHLO_TRANSPOSE DILATE
    STABLEHLO_RNG_BIT_GENERATOR REDUCE_WINDOW STABLEHLO_COMPOSITE STABLEHLO_SHIFT_LEFT STABLEHLO_CBRT STABLEHLO_CASE
""".split()


class BlockwiseQuantization(Table):
    """Blocks along the last dimension. `scales` and `zero_points` are indices of tensors of the same subgraph."""

    TYPE = 2
    scales = scalar(0, "i")
    zero_points = scalar(1, "i")
    block_size = scalar(2, "i")
    block_shape = vector(3, np.int32)  # only in the schema of ai-edge-litert 2.3


class MultiAxisQuantization(Table):
    """One scale for each index of several dimensions; with a `block_size`, blocks along the last of them."""

    TYPE = 3
    scales = scalar(0, "i")
    zero_points = scalar(1, "i")
    block_size = scalar(2, "i")
    quantized_dimensions = vector(3, np.int32)


class QuantizationParameters(Table):
    """Quantization of a tensor. If `details_type` is not 0, scale and zero point must be ignored."""

    scale = vector(2, np.float32)
    zero_point = vector(3, np.int64)
    details_type = scalar(4, "B")
    blockwise = table(5, BlockwiseQuantization)
    multi_axis = table(5, MultiAxisQuantization)
    quantized_dimension = scalar(6, "i")


class Int32Vector(Table):
    """Indices of a sparse dimension."""

    values = vector(0, np.int32)


class Uint16Vector(Table):
    """Indices of a sparse dimension."""

    values = vector(0, np.uint16)


class Uint8Vector(Table):
    """Indices of a sparse dimension."""

    values = vector(0, np.uint8)


class DimensionMetadata(Table):
    """A dimension of a sparse tensor, dense (format 0) or compressed (format 1); two unions of index vectors."""

    format = scalar(0, "b")
    dense_size = scalar(1, "i")
    segments_type = scalar(2, "B")
    segments_int32 = table(3, Int32Vector)
    segments_uint16 = table(3, Uint16Vector)
    segments_uint8 = table(3, Uint8Vector)
    indices_type = scalar(4, "B")
    indices_int32 = table(5, Int32Vector)
    indices_uint16 = table(5, Uint16Vector)
    indices_uint8 = table(5, Uint8Vector)


class SparsityParameters(Table):
    """The order and the dimensions in which a sparse tensor is traversed."""

    traversal_order = vector(0, np.int32)
    block_map = vector(1, np.int32)
    dim_metadata = tables(2, DimensionMetadata)


class Tensor(Table):
    """A tensor. It is constant if its buffer has data."""

    shape = vector(0, np.int32)
    type = scalar(1, "b")
    buffer = scalar(2, "I")
    name = string(3)
    quantization = table(4, QuantizationParameters)
    is_variable = scalar(5, "?")
    sparsity = table(6, SparsityParameters)
    shape_signature = vector(7, np.int32)
    external_buffer = scalar(10, "I")


class BatchMatMulOptions(Table):
    """Options of BATCH_MATMUL."""

    TYPE = 101
    adj_x = scalar(0, "?")
    adj_y = scalar(1, "?")


class Operator(Table):
    """An operator of a subgraph. An input of -1 is absent."""

    opcode_index = scalar(0, "I")
    inputs = vector(1, np.int32)
    outputs = vector(2, np.int32)
    builtin_options_type = scalar(3, "B")
    builtin_options = table(4, Table)
    batch_matmul_options = table(4, BatchMatMulOptions)
    custom_options = vector(5, np.uint8)
    intermediates = vector(8, np.int32)
    builtin_options_2 = table(12, Table)


class TensorMap(Table):
    """A name of a signature for a tensor."""

    name = string(0)
    tensor_index = scalar(1, "I")


class SignatureDef(Table):
    """A subgraph's inputs and outputs by the names that callers know."""

    inputs = tables(0, TensorMap)
    outputs = tables(1, TensorMap)
    signature_key = string(2)
    subgraph_index = scalar(4, "I")


class Metadata(Table):
    """Bytes that the file carries under a name."""

    name = string(0)
    buffer = scalar(1, "I")


class OperatorCode(Table):
    """A builtin operator, or a custom operator's name. The older field saturates at 127, so the larger code counts."""

    deprecated_builtin_code = scalar(0, "b")
    custom_code = string(1)
    version = scalar(2, "i", 1)
    builtin_code = scalar(3, "i")


class SubGraph(Table):
    """Tensors and operators of one graph."""

    tensors = tables(0, Tensor)
    inputs = vector(1, np.int32)
    outputs = vector(2, np.int32)
    operators = tables(3, Operator)
    name = string(4)


class Buffer(Table):
    """Bytes in this table or, if `offset` is above 1, at that offset from the start of the model."""

    data = payload(0)
    offset = scalar(1, "Q")
    size = scalar(2, "Q")


class ExternalBufferGroup(Table):
    """A file of external buffers."""

    name = string(0)


class ExternalBuffer(Table):
    """Bytes of a file beside the model. `group` is an index into the groups; tensors refer to `id`."""

    id = scalar(0, "I")
    group = scalar(1, "I")
    offset = scalar(2, "Q")
    length = scalar(3, "Q")
    packing = string(4)


class Model(Table):
    """The root table."""

    version = scalar(0, "I")
    operator_codes = tables(1, OperatorCode)
    subgraphs = tables(2, SubGraph)
    description = string(3)
    buffers = tables(4, Buffer)
    metadata = tables(6, Metadata)
    signature_defs = tables(7, SignatureDef)
    external_buffer_groups = tables(8, ExternalBufferGroup)
    external_buffers = tables(9, ExternalBuffer)
