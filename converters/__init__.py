"""nibblecast: 4-bit models from the formats that people train in to the formats they ship in, code for code.

model = converters.load("model.tflite")
weight = model["dense/kernel"]
weight.codes(), weight.quantization.scale.numpy(), weight.dequantize("float32")
converters.convert("model.tflite", "weights.h", "weights.safetensors", "weights.onnx")

What is offered here is imported when it is asked for. `python -m converters` imports this module before anything of the
command line can run, so that only a module that imports nothing lets that see to signals from its first moment on.
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from converters.accuracy import Accuracy
    from converters.api import Conversion, batch, compare_outputs, convert, load, report, save, verify
    from converters.comparison import Comparison, Difference
    from converters.errors import Error
    from converters.ir import Loss, Model, Quantization, Tensor
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

_MODULES = {
    "converters.accuracy": ("Accuracy",),
    "converters.api": ("Conversion", "batch", "compare_outputs", "convert", "load", "report", "save", "verify"),
    "converters.comparison": ("Comparison", "Difference"),
    "converters.errors": ("Error",),
    "converters.ir": ("Loss", "Model", "Quantization", "Tensor"),
    "converters.scheme": ("Scheme",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> "Any":
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'converters' has no attribute '{name}'")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
