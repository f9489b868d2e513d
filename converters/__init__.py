"""nibblecast: 4-bit models from the formats that people train in to the formats they ship in, code for code.

model = converters.load("model.tflite")
weight = model["dense/kernel"]
weight.codes(), weight.quantization.scale.numpy(), weight.dequantize("float32")
converters.convert("model.tflite", "weights.h", "weights.safetensors", "weights.onnx")
"""

from converters.api import Conversion, convert, load, save, verify
from converters.comparison import Comparison, Difference
from converters.errors import Error
from converters.ir import Loss, Model, Quantization, Tensor
from converters.quantize import Accuracy
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
    "convert",
    "load",
    "save",
    "verify",
]
