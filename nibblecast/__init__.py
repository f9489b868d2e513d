"""nibblecast: 4-bit models from the formats that people train in to the formats they ship in, code for code.

model = nibblecast.load("model.tflite")
weight = model["dense/kernel"]
weight.codes(), weight.quantization.scale.numpy(), weight.dequantize("float32")
nibblecast.convert("model.tflite", "weights.h", "weights.safetensors", "weights.onnx")

What is offered here is imported when it is asked for. `python -m nibblecast` imports this module before anything of the
command line can run, so that only a module that imports nothing lets that see to signals from its first moment on.
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from nibblecast.converters.arithmetic.accuracy import Accuracy
    from nibblecast.converters.batches.run import batch
    from nibblecast.converters.compare.comparison import Comparison, Difference
    from nibblecast.converters.compare.running import compare_outputs
    from nibblecast.converters.conversion import Conversion, convert, load, save, verify
    from nibblecast.converters.errors import Error
    from nibblecast.converters.ir import Loss, Model, Quantization, Tensor
    from nibblecast.converters.reports.run import report
    from nibblecast.converters.stages.scheme import Scheme

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
    "nibblecast.converters.arithmetic.accuracy": ("Accuracy",),
    "nibblecast.converters.batches.run": ("batch",),
    "nibblecast.converters.compare.comparison": ("Comparison", "Difference"),
    "nibblecast.converters.compare.running": ("compare_outputs",),
    "nibblecast.converters.conversion": ("Conversion", "convert", "load", "save", "verify"),
    "nibblecast.converters.errors": ("Error",),
    "nibblecast.converters.ir": ("Loss", "Model", "Quantization", "Tensor"),
    "nibblecast.converters.reports.run": ("report",),
    "nibblecast.converters.stages.scheme": ("Scheme",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> "Any":
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'nibblecast' has no attribute '{name}'")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
