"""The operators that take weights: at which inputs, and along which axes.

Sources: the ONNX operators, and onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nibblecast.converters.metadata import OperatorInput
from nibblecast.formats.onnx.file.graph import Node

#: Operators that take the codes of weights. Each weight has the positions of codes, scale and zero point, and the axis
#: of several scales (ONNX operators, QLinearConv 10 and QLinearMatMul 21; onnxruntime 1.32, ContribOperators.md).
CODES_OPERATORS: Mapping[tuple[str, str], tuple[tuple[int, int, int, int], ...]] = MappingProxyType(
    {
        ("", "QLinearConv"): ((3, 4, 5, 0),),
        ("", "QLinearMatMul"): ((3, 4, 5, -1), (0, 1, 2, -2)),
        ("com.microsoft", "DynamicQuantizeLSTM"): ((1, 8, 9, 0), (2, 10, 11, 0)),
        ("com.microsoft", "DynamicQuantizeMatMul"): ((1, 2, 3, -1),),
        ("com.microsoft", "MatMulIntegerToFloat"): ((1, 3, 5, -1),),
        ("com.microsoft", "QAttention"): ((1, 4, 7, -1),),
        ("com.microsoft", "QEmbedLayerNormalization"): tuple((2 + n, 8 + n, 13 + n, -1) for n in range(5)),
        ("com.microsoft", "QGemm"): ((3, 4, 5, -1),),
        ("com.microsoft", "QLinearAdd"): ((3, 4, 5, -1), (0, 1, 2, -1)),
        ("com.microsoft", "QLinearConv"): ((3, 4, 5, 0),),
        ("com.microsoft", "QLinearMul"): ((3, 4, 5, -1), (0, 1, 2, -1)),
    }
)
#: Operators that multiply codes and leave scales to later nodes: the positions of the weight's codes and of its zero
#: point, and the axis of its output channels.
INTEGER_PRODUCTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"ConvInteger": (1, 3, 0), "MatMulInteger": (1, 3, -1)}
)

#: What operators do with their weights, by operator and input. Float weights have sum axes, along which they are
#: quantized. Weights that an operator takes as codes have no sum axes, because they cannot get other codes.
_WEIGHTS: Mapping[tuple[str, int], OperatorInput] = MappingProxyType(
    {
        ("Conv", 1): OperatorInput(0, (1, 2, 3, 4)),  # [O, I, H, W]
        ("ConvInteger", 1): OperatorInput(0),
        ("ConvTranspose", 1): OperatorInput(1, (0,)),  # [I, O, H, W]
        ("DynamicQuantizeMatMul", 1): OperatorInput(-1),
        ("Gather", 0): OperatorInput(None, ()),  # [rows, D]
        ("Gemm", 1): OperatorInput(1, (0,)),  # [K, N]
        ("MatMul", 1): OperatorInput(-1, (-2,)),  # [K, N]
        ("MatMulInteger", 1): OperatorInput(-1),
        ("MatMulIntegerToFloat", 1): OperatorInput(-1),
        ("QAttention", 1): OperatorInput(-1),
        ("QGemm", 3): OperatorInput(1),
        ("QLinearConv", 3): OperatorInput(0),
        ("QLinearMatMul", 3): OperatorInput(-1),
    }
)
#: The same for operators that transpose their weight, [N, K].
_TRANSPOSED: Mapping[tuple[str, int], OperatorInput] = MappingProxyType(
    {("Gemm", 1): OperatorInput(0, (1,)), ("QGemm", 3): OperatorInput(0)}
)
_ANYTHING = OperatorInput()


def input_of(node: Node, position: int) -> OperatorInput:
    """What a node does with an input."""
    key = (node.op_type, position)
    if key in _TRANSPOSED and node.integers.get("transB", 0):
        return _TRANSPOSED[key]
    return _WEIGHTS.get(key, _ANYTHING)
