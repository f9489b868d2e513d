"""The operators that take weights: at which inputs, and along which axes.

Source: the reference kernels of LiteRT 2.3 (tflite/kernels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nibblecast.converters.metadata import OperatorInput


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's weights by their positions among its inputs, and the positions of its activations and its bias
    (None: not known to have one)."""

    weights: Mapping[int, OperatorInput]
    data: int | None = None
    bias: int | None = None


#: An operator about which nothing is known.
UNKNOWN = Operator(MappingProxyType({}))

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "BATCH_MATMUL": Operator({1: OperatorInput(-1, (-2,))}),  # [.., K, N], else TRANSPOSED_BATCH_MATMUL
        "CONV_2D": Operator({1: OperatorInput(0, (-1, 1, 2))}, data=0, bias=2),  # [O, H, W, I]
        "CONV_3D": Operator({1: OperatorInput(4, (3, 0, 1, 2))}, data=0, bias=2),  # [D, H, W, I, O]
        "DEPTHWISE_CONV_2D": Operator({1: OperatorInput(3, (2, 1))}, data=0, bias=2),  # [1, H, W, C * multiplier]
        "EMBEDDING_LOOKUP": Operator({1: OperatorInput(0, ())}, data=0),  # [rows, D]
        "FULLY_CONNECTED": Operator({1: OperatorInput(0, (-1,))}, data=0, bias=2),  # [O, I]
        "GATHER": Operator({0: OperatorInput(0, ())}, data=1),  # [rows, D]
        "TRANSPOSE_CONV": Operator({1: OperatorInput(0, (-1, 1, 2))}, data=2, bias=3),  # [O, H, W, I]
        "UNIDIRECTIONAL_SEQUENCE_LSTM": Operator(  # [cells, inputs]
            {position: OperatorInput(None, (-1,)) for position in (*range(1, 9), 16)}
        ),
    }
)
TRANSPOSED_BATCH_MATMUL = OperatorInput(-2, (-1,))  # [.., N, K]

#: Operators that only change how a tensor is stored. A node that takes their output takes the tensor.
STORAGE_OPERATORS = frozenset({"DEQUANTIZE", "DENSIFY"})
