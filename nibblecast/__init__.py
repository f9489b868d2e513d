"""nibblecast: 4-bit models from the formats that people train in to the formats they ship in, code for code.

model = nibblecast.load("model.tflite")
weight = model["dense/kernel"]
weight.codes(), weight.quantization.scale.numpy(), weight.dequantize("float32")
nibblecast.convert("model.tflite", "weights.h", "weights.safetensors", "weights.onnx")

The public API is what this module exports: what you call, what you pass, and what you get back. docs/api.md explains
every name. All other modules may change between versions.

A name is imported when it is first asked for. `python -m nibblecast` imports this module before anything of the command
line can run, so that only a module that imports nothing lets that see to signals from its first moment on.
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from nibblecast.converters.arithmetic.accuracy import Accuracy
    from nibblecast.converters.batches.run import BatchResult, BatchSettings, batch
    from nibblecast.converters.compare.comparison import Comparison, Difference
    from nibblecast.converters.compare.running import OutputDifference, compare_outputs
    from nibblecast.converters.conversion import Conversion, convert, load, save, verify
    from nibblecast.converters.errors import Error
    from nibblecast.converters.ir import GroupIndex, Loss, Model, Quantization, Tensor
    from nibblecast.converters.metadata import Use
    from nibblecast.converters.reports.run import Report, report
    from nibblecast.converters.stages.quantize import quantize_model
    from nibblecast.converters.stages.scheme import Blocked, PerAxis, PerTensor, Scheme, parse_scheme
    from nibblecast.converters.version import __version__

__all__ = [
    "Accuracy",
    "BatchResult",
    "BatchSettings",
    "Blocked",
    "Comparison",
    "Conversion",
    "Difference",
    "Error",
    "GroupIndex",
    "Loss",
    "Model",
    "OutputDifference",
    "PerAxis",
    "PerTensor",
    "Quantization",
    "Report",
    "Scheme",
    "Tensor",
    "Use",
    "__version__",
    "batch",
    "compare_outputs",
    "convert",
    "load",
    "parse_scheme",
    "quantize_model",
    "report",
    "save",
    "verify",
]

_MODULES = {
    "nibblecast.converters.arithmetic.accuracy": ("Accuracy",),
    "nibblecast.converters.batches.run": ("BatchResult", "BatchSettings", "batch"),
    "nibblecast.converters.compare.comparison": ("Comparison", "Difference"),
    "nibblecast.converters.compare.running": ("OutputDifference", "compare_outputs"),
    "nibblecast.converters.conversion": ("Conversion", "convert", "load", "save", "verify"),
    "nibblecast.converters.errors": ("Error",),
    "nibblecast.converters.ir": ("GroupIndex", "Loss", "Model", "Quantization", "Tensor"),
    "nibblecast.converters.metadata": ("Use",),
    "nibblecast.converters.reports.run": ("Report", "report"),
    "nibblecast.converters.stages.quantize": ("quantize_model",),
    "nibblecast.converters.stages.scheme": ("Blocked", "PerAxis", "PerTensor", "Scheme", "parse_scheme"),
    "nibblecast.converters.version": ("__version__",),
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
    return __all__.copy()
