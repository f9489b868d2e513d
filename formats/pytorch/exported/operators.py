"""The operators that take weights: at which inputs, and along which axes.

Source: PyTorch's native_functions.yaml, and the shapes that the documentation of torch.nn.functional gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nibblecast.converters.metadata import OperatorInput
from nibblecast.formats.pytorch.exported.program import ProgramNode

_CONVOLUTION = OperatorInput(0, (1, 2, 3, 4))  # [O, I, H, W]
_TRANSPOSED_CONVOLUTION = OperatorInput(1, (0,))  # [I, O, H, W]
_PRODUCT = OperatorInput(-1, (-2,))  # [K, N]
_LOOKUP = OperatorInput(None, ())  # [rows, D]
_RECURRENT = OperatorInput(None, (1,))  # [gates * cells, inputs], and biases, which have one axis
_BIAS = OperatorInput(0)
_ANYTHING = OperatorInput()

#: What operators do with their weights and biases, by the names of operator and input.
_WEIGHTS: Mapping[tuple[str, str], OperatorInput] = MappingProxyType(
    {
        **{(f"aten.conv{n}d", "weight"): _CONVOLUTION for n in (1, 2, 3)},
        **{(f"aten.conv_transpose{n}d", "weight"): _TRANSPOSED_CONVOLUTION for n in (1, 2, 3)},
        **{(f"aten.{name}{n}d", "bias"): _BIAS for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
        ("aten.addmm", "mat2"): _PRODUCT,
        ("aten.bmm", "mat2"): _PRODUCT,
        ("aten.convolution", "weight"): _CONVOLUTION,
        ("aten.embedding", "weight"): _LOOKUP,
        ("aten.embedding_bag", "weight"): _LOOKUP,
        ("aten.linear", "weight"): OperatorInput(0, (1,)),  # [O, I]
        ("aten.linear", "bias"): _BIAS,
        **{(f"aten.{name}", "params"): _RECURRENT for name in ("gru", "lstm", "rnn_relu", "rnn_tanh")},
        ("aten.matmul", "other"): _PRODUCT,
        ("aten.mm", "mat2"): _PRODUCT,
    }
)
#: What a module calls the inputs of operators that have other names for them.
PARAMETER_NAMES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("aten.addmm", "mat2"): "weight",
        ("aten.addmm", "self"): "bias",
        ("aten.mm", "mat2"): "weight",
        ("aten.matmul", "other"): "weight",
    }
)


def input_of(node: ProgramNode, name: str) -> OperatorInput:
    """What a node does with an input."""
    if (node.operator, name) == ("aten.convolution", "weight") and node.argument("transposed") is True:
        return _TRANSPOSED_CONVOLUTION
    return _WEIGHTS.get((node.operator, name), _ANYTHING)
