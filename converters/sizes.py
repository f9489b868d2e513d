"""The sizes of tensors and models, including scales and other parameters, and sizes as text."""

from __future__ import annotations

from nibblecast.converters.ir import Model, Quantization, Tensor

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def weights_of(model: Model) -> dict[str, Tensor]:
    """The tensors by name, without those that are only parameters of others: they count with their owners."""
    return {name: tensor for name, tensor in model.items() if tensor.parameter_of not in model.tensors}


def parameter_bytes(quantization: Quantization | None) -> int:
    """Bytes of all parameters, those of parameters included; 0 without quantization."""
    if quantization is None:
        return 0
    return sum(stored_bytes(tensor) for _, tensor in quantization.parameters())


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor and of its parameters."""
    return tensor.nbytes + parameter_bytes(tensor.quantization)


def bits_per_weight(tensor: Tensor) -> float:
    """Stored bits for each element, parameters included; 0 where there are no elements."""
    return 8 * stored_bytes(tensor) / tensor.size if tensor.size else 0.0


def model_bytes(model: Model) -> int:
    """Bytes of all tensors with their parameters, each counted once."""
    return sum(stored_bytes(tensor) for tensor in weights_of(model).values())


def bits_per_quantized_weight(model: Model) -> float:
    """Stored bits per element of all quantized tensors together; 0 without any."""
    quantized = [tensor for tensor in model.values() if tensor.quantization is not None]
    return 8 * sum(map(stored_bytes, quantized)) / max(1, sum(tensor.size for tensor in quantized))


def bytes_unit(value: float) -> tuple[str, int]:
    """The unit for a number of bytes, and how many bytes it is."""
    power = 0
    while value >= 1024 and power < len(_UNITS) - 1:
        value /= 1024
        power += 1
    return _UNITS[power], 1024**power


def bytes_text(value: float) -> str:
    """A number of bytes: 512 B, 1.5 KiB, 3.2 GiB."""
    unit, size = bytes_unit(value)
    return f"{value / size:.{0 if size == 1 else 1}f} {unit}"
