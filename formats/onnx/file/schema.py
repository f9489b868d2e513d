"""ONNX's messages and element types as tables: onnx.proto of ONNX 1.23, and the operators' type constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.formats.onnx.file.wire import Field, Kind, Schema

ENTRY = Schema("StringStringEntryProto", key=Field(1, Kind.TEXT), value=Field(2, Kind.TEXT))
OPERATOR_SET = Schema("OperatorSetIdProto", domain=Field(1, Kind.TEXT), version=Field(2, Kind.INT))
MODEL = Schema(
    "ModelProto",
    ir_version=Field(1, Kind.INT),
    producer_name=Field(2, Kind.TEXT),
    producer_version=Field(3, Kind.TEXT),
    graph=Field(7, Kind.RANGE),
    opset_import=Field(8, Kind.RANGE),
    metadata_props=Field(14, Kind.RANGE),
    training_info=Field(20, Kind.RANGE),
    functions=Field(25, Kind.RANGE),
)
FUNCTION = Schema(
    "FunctionProto",
    name=Field(1, Kind.TEXT),
    input=Field(4, Kind.TEXT),
    output=Field(5, Kind.TEXT),
    node=Field(7, Kind.RANGE),
    opset_import=Field(9, Kind.RANGE),
    domain=Field(10, Kind.TEXT),
)
TRAINING = Schema("TrainingInfoProto", initialization=Field(1, Kind.RANGE), algorithm=Field(2, Kind.RANGE))
GRAPH = Schema(
    "GraphProto",
    node=Field(1, Kind.RANGE),
    name=Field(2, Kind.TEXT),
    initializer=Field(5, Kind.RANGE),
    input=Field(11, Kind.RANGE),
    output=Field(12, Kind.RANGE),
    value_info=Field(13, Kind.RANGE),
    sparse_initializer=Field(15, Kind.RANGE),
)
NODE = Schema(
    "NodeProto",
    input=Field(1, Kind.TEXT),
    output=Field(2, Kind.TEXT),
    name=Field(3, Kind.TEXT),
    op_type=Field(4, Kind.TEXT),
    attribute=Field(5, Kind.RANGE),
    domain=Field(7, Kind.TEXT),
)
ATTRIBUTE = Schema(
    "AttributeProto",
    name=Field(1, Kind.TEXT),
    f=Field(2, Kind.FLOAT),
    i=Field(3, Kind.INT),
    s=Field(4, Kind.RANGE),
    t=Field(5, Kind.RANGE),
    g=Field(6, Kind.RANGE),
    floats=Field(7, Kind.FLOAT),
    ints=Field(8, Kind.INT),
    tensors=Field(10, Kind.RANGE),
    graphs=Field(11, Kind.RANGE),
    type=Field(20, Kind.INT),
    ref_attr_name=Field(21, Kind.TEXT),
)
TENSOR = Schema(
    "TensorProto",
    dims=Field(1, Kind.INT),
    data_type=Field(2, Kind.INT),
    float_data=Field(4, Kind.ARRAY),
    int32_data=Field(5, Kind.ARRAY),
    int64_data=Field(7, Kind.ARRAY),
    name=Field(8, Kind.TEXT),
    raw_data=Field(9, Kind.RANGE),
    double_data=Field(10, Kind.ARRAY),
    uint64_data=Field(11, Kind.ARRAY),
    external_data=Field(13, Kind.RANGE),
    data_location=Field(14, Kind.INT),
    metadata_props=Field(16, Kind.RANGE),
)
SPARSE_TENSOR = Schema("SparseTensorProto", values=Field(1, Kind.RANGE), indices=Field(2, Kind.RANGE))
VALUE_INFO = Schema("ValueInfoProto", name=Field(1, Kind.TEXT), type=Field(2, Kind.RANGE))
TYPE = Schema("TypeProto", tensor_type=Field(1, Kind.RANGE))
TENSOR_TYPE = Schema("TypeProto.Tensor", elem_type=Field(1, Kind.INT), shape=Field(2, Kind.RANGE))
SHAPE = Schema("TensorShapeProto", dim=Field(1, Kind.RANGE))
DIMENSION = Schema("TensorShapeProto.Dimension", dim_value=Field(1, Kind.INT), dim_param=Field(2, Kind.TEXT))

ATTRIBUTE_INT = 2
ATTRIBUTE_TENSOR = 4
DATA_LOCATION_EXTERNAL = 1
STRING = 8


@dataclass(frozen=True, slots=True)
class ElementType:
    """An element type: its number in TensorProto, the first operator set whose Cast knows it, and the TensorProto field
    that holds it if raw_data does not."""

    number: int
    opset: int
    typed_field: str = "int32_data"


_TYPES: dict[Any, ElementType] = {
    np.float32: ElementType(1, 13, "float_data"),
    np.uint8: ElementType(2, 13),
    np.int8: ElementType(3, 13),
    np.uint16: ElementType(4, 13),
    np.int16: ElementType(5, 13),
    np.int32: ElementType(6, 13),
    np.int64: ElementType(7, 13, "int64_data"),
    np.bool_: ElementType(9, 13),
    np.float16: ElementType(10, 13),
    np.float64: ElementType(11, 13, "double_data"),
    np.uint32: ElementType(12, 13, "uint64_data"),
    np.uint64: ElementType(13, 13, "uint64_data"),
    np.complex64: ElementType(14, 13, "float_data"),
    np.complex128: ElementType(15, 13, "double_data"),
    ml_dtypes.bfloat16: ElementType(16, 13),
    ml_dtypes.float8_e4m3fn: ElementType(17, 19),
    ml_dtypes.float8_e4m3fnuz: ElementType(18, 19),
    ml_dtypes.float8_e5m2: ElementType(19, 19),
    ml_dtypes.float8_e5m2fnuz: ElementType(20, 19),
    ml_dtypes.uint4: ElementType(21, 21),
    ml_dtypes.int4: ElementType(22, 21),
    ml_dtypes.float4_e2m1fn: ElementType(23, 23),
    ml_dtypes.float8_e8m0fnu: ElementType(24, 24),
    ml_dtypes.uint2: ElementType(25, 25),
    ml_dtypes.int2: ElementType(26, 25),
}
ELEMENT_TYPES: Mapping[np.dtype[Any], ElementType] = MappingProxyType({np.dtype(k): v for k, v in _TYPES.items()})
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType({v.number: k for k, v in ELEMENT_TYPES.items()})

#: The first operator set whose DequantizeLinear takes codes of a dtype and has a kernel for it in onnxruntime 1.32.
DEQUANTIZE_LINEAR_SINCE: Mapping[np.dtype[Any], int] = MappingProxyType(
    {
        np.dtype(dtype): opset
        for dtype, opset in (
            (np.int8, 13),
            (np.uint8, 13),
            (np.int32, 13),
            (ml_dtypes.float8_e4m3fn, 19),
            (ml_dtypes.float8_e4m3fnuz, 19),
            (ml_dtypes.float8_e5m2, 19),
            (ml_dtypes.float8_e5m2fnuz, 19),
            (np.int16, 21),
            (np.uint16, 21),
            (ml_dtypes.int4, 21),
            (ml_dtypes.uint4, 21),
            (ml_dtypes.int2, 25),
            (ml_dtypes.uint2, 25),
        )
    }
)
#: The first operator set whose DequantizeLinear has a block_size.
BLOCKS_SINCE = 21

#: The IR version that came with each operator set.
IR_VERSIONS: Mapping[int, int] = MappingProxyType(
    {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
)
DEFAULT_OPSET = 21

#: The metadata entry that marks a model of our writer, and its value: every graph output is a tensor under its name.
LAYOUT, WEIGHTS_LAYOUT = "nibblecast.layout", "weights"
#: A metadata entry of a table initializer: the dtype whose bit patterns the table lists.
TABLE_DTYPE = "nibblecast.dtype"
#: A metadata entry of a group index: the block size that the groups were made with. No value depends on it.
GROUP_SIZE = "nibblecast.group_size"
