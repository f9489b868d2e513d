"""PyTorch's dtypes and storage classes, by name (torch 2.13, c10/core/ScalarType.h)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from nibblecast.formats.pytorch.pickle.records import TorchDtype


def _dtype(name: str, numpy: Any, *, quantized: bool = False, elements: int = 1) -> TorchDtype:
    return TorchDtype(name, np.dtype(numpy), quantized, elements)


#: What `torch.NAME` is.
DTYPES: Mapping[str, TorchDtype] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            _dtype("uint8", np.uint8),
            _dtype("int8", np.int8),
            _dtype("int16", np.int16),
            _dtype("int32", np.int32),
            _dtype("int64", np.int64),
            _dtype("uint16", np.uint16),
            _dtype("uint32", np.uint32),
            _dtype("uint64", np.uint64),
            _dtype("float16", np.float16),
            _dtype("float32", np.float32),
            _dtype("float64", np.float64),
            _dtype("bfloat16", ml_dtypes.bfloat16),
            _dtype("complex64", np.complex64),
            _dtype("complex128", np.complex128),
            _dtype("bool", np.bool_),
            _dtype("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
            _dtype("float8_e5m2", ml_dtypes.float8_e5m2),
            _dtype("float8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
            _dtype("float8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
            _dtype("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu),
            # one byte is two elements, low nibble first; shapes count bytes
            _dtype("float4_e2m1fn_x2", np.uint8, elements=2),
            _dtype("qint8", np.int8, quantized=True),
            _dtype("quint8", np.uint8, quantized=True),
            _dtype("qint32", np.int32, quantized=True),
            # likewise, but shapes count elements
            _dtype("quint4x2", np.uint8, quantized=True, elements=2),
        )
    }
)

#: Names that older versions wrote for some of them.
ALIASES = MappingProxyType(
    {"half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64"}
)

#: The dtype of the storages of `torch.NAME`; None: its elements have no dtype of their own.
STORAGES: Mapping[str, TorchDtype | None] = MappingProxyType(
    {
        "UntypedStorage": None,
        "ByteStorage": DTYPES["uint8"],
        "CharStorage": DTYPES["int8"],
        "ShortStorage": DTYPES["int16"],
        "IntStorage": DTYPES["int32"],
        "LongStorage": DTYPES["int64"],
        "HalfStorage": DTYPES["float16"],
        "FloatStorage": DTYPES["float32"],
        "DoubleStorage": DTYPES["float64"],
        "BFloat16Storage": DTYPES["bfloat16"],
        "ComplexFloatStorage": DTYPES["complex64"],
        "ComplexDoubleStorage": DTYPES["complex128"],
        "BoolStorage": DTYPES["bool"],
        "QInt8Storage": DTYPES["qint8"],
        "QUInt8Storage": DTYPES["quint8"],
        "QInt32Storage": DTYPES["qint32"],
        "QUInt4x2Storage": DTYPES["quint4x2"],
    }
)
