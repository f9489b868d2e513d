"""nibblecast: 4-bit models from the formats that people train in to the formats they ship in, code for code.

model = converters.load("model.tflite")
weight = model["dense/kernel"]
weight.codes(), weight.quantization.scale.numpy(), weight.dequantize("float32")
converters.convert("model.tflite", "weights.h", "weights.safetensors", "weights.onnx")
"""

from typing import TYPE_CHECKING, Any

from converters.api import Conversion, batch, compare_outputs, convert, load, report, save, verify
from converters.comparison import Comparison, Difference
from converters.errors import Error
from converters.ir import Loss, Model, Quantization, Tensor

if TYPE_CHECKING:
    from converters.accuracy import Accuracy
    from converters.scheme import Scheme

__all__ = [
    "Accuracy",
    "Comparison",
    "Conversion",
    "Difference",
    "Error",
    "Loss",
    "Model",
    "Quantization",
    "Scheme",
    "Tensor",
    "batch",
    "compare_outputs",
    "convert",
    "load",
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Quantization is imported when it is asked for: most programs need none, and start faster."""
    module = {"Accuracy": "converters.accuracy", "Scheme": "converters.scheme"}.get(name)
    if module is None:
        raise AttributeError(f"module 'converters' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(module), name)
