"""`nibblecast inspect SRC`"""

from __future__ import annotations

from typing import Any

from nibblecast.converters.arithmetic.dtypes import dtype_name
from nibblecast.converters.cli.arguments import (
    Json,
    ReaderOptions,
    Source,
    cell,
    human_bytes,
    key_values,
    loss_document,
    print_json,
    shown_loss,
    table_console,
)
from nibblecast.converters.conversion import load
from nibblecast.converters.errors import line
from nibblecast.converters.ir import Model, Quantization, Tensor
from nibblecast.converters.metadata import Metadata, Port, Use
from nibblecast.converters.sizes import bits_per_quantized_weight, bits_per_weight, model_bytes, stored_bytes

_READ_BYTES = 1 << 16


def inspect(source: Source, opt: ReaderOptions = None, json: Json = False) -> None:
    """List the tensors of a model: shape, dtype, granularity of quantization, bits per weight, bytes."""
    model = load(source, **key_values(opt or ()))
    if json:
        print_json(_document(model))
    else:
        _print(model)


def _zero_points(quantization: Quantization | None) -> str:
    """What a table says of zero points: nothing is read where there are many."""
    if quantization is None:
        return ""
    zero_point = quantization.zero_point
    if zero_point is None:
        return "none"
    if zero_point.nbytes > _READ_BYTES:
        return zero_point.dtype.name
    values = zero_point.dequantize()
    return f"{values.min():g}" if (values == values.min()).all() else f"{values.min():g} to {values.max():g}"


def _consumers(tensor: Tensor) -> str:
    if tensor.parameter_of is not None:
        return f"parameter of {tensor.parameter_of}"
    return ", ".join(dict.fromkeys(use.operator for use in tensor.uses))


def _print(model: Model) -> None:
    from rich.table import Table

    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("granularity", no_wrap=True)
    table.add_column("zero point", no_wrap=True)
    for column in ("bits/weight", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("used by", overflow="fold")
    for name, tensor in model.items():
        quantization = tensor.quantization
        cells = (
            name,
            "×".join(map(str, tensor.shape)) or "scalar",
            dtype_name(tensor.dtype),
            tensor.granularity,
            _zero_points(quantization),
            f"{bits_per_weight(tensor):.2f}",
            str(stored_bytes(tensor)),
            _consumers(tensor),
        )
        table.add_row(*map(cell, cells))
    if model.tensors:
        console.print(table)
    for text in _summary(model):
        print(text)


def _summary(model: Model) -> list[str]:
    if not model.tensors:
        lines = ["no constant weights: nothing to convert (weights may be in variables, or in a file of their own)"]
    else:
        quantized = sum(tensor.quantization is not None for tensor in model.values())
        lines = [
            f"{len(model)} tensors, {quantized} quantized, {sum(t.size for t in model.values())} elements, "
            f"{human_bytes(model_bytes(model))}; format {model.metadata.format}"
            + (f", made by {line(model.metadata.producer)}" if model.metadata.producer else "")
        ]
        if quantized:
            lines.append(
                f"{bits_per_quantized_weight(model):.2f} bits per quantized weight, scales and zero points included"
            )
    lines += _graph_lines(model.metadata)
    if model.metadata.operators:
        counts = sorted(model.metadata.operators.items(), key=lambda item: (-item[1], item[0]))
        lines.append("operators: " + ", ".join(f"{line(name)} {count}" for name, count in counts))
    return lines + [shown_loss(loss) for loss in model.losses]


def _graph_lines(metadata: Metadata) -> list[str]:
    lines = []
    for what, ports in (("inputs", metadata.inputs), ("outputs", metadata.outputs)):
        if ports:
            lines.append(f"{what}: " + ", ".join(map(_port, ports)))
    if metadata.opsets:
        sets = [f"{line(domain) or 'ai.onnx'} {version}" for domain, version in metadata.opsets.items()]
        lines.append("operator sets: " + ", ".join(sets))
    return lines


def _port(port: Port) -> str:
    shape = "?" if port.shape is None else "×".join(str(size) or "?" for size in port.shape) or "scalar"
    return f"{line(port.name)} {port.dtype or 'no tensor'} {line(shape)}"


def _port_document(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": None if port.shape is None else list(port.shape)}


def _document(model: Model) -> dict[str, Any]:
    return {
        "source": str(model.metadata.source),
        "format": model.metadata.format,
        "producer": model.metadata.producer,
        "operators": dict(model.metadata.operators),
        "inputs": [_port_document(port) for port in model.metadata.inputs],
        "outputs": [_port_document(port) for port in model.metadata.outputs],
        "opsets": dict(model.metadata.opsets),
        "bytes": model_bytes(model),
        "bits_per_quantized_weight": bits_per_quantized_weight(model),
        "tensors": [_tensor_document(tensor) for tensor in model.values()],
        "losses": [loss_document(loss) for loss in model.losses if not loss.is_exact],
        "notes": [loss.text for loss in model.losses if loss.is_exact],
    }


def _tensor_document(tensor: Tensor) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor.dtype),
        "bits_per_weight": bits_per_weight(tensor),
        "bytes": stored_bytes(tensor),
        "quantization": _quantization_document(tensor),
        "uses": [_use_document(use) for use in tensor.uses],
    }
    if tensor.parameter_of is not None:
        document["parameter_of"] = tensor.parameter_of
    return document


def _use_document(use: Use) -> dict[str, Any]:
    document: dict[str, Any] = {"operator": use.operator, "input": use.input, "channel_axis": use.channel_axis}
    if use.sum_axes is not None:
        document["sum_axes"] = list(use.sum_axes)
    for name, activation in (("activation", use.activation), ("result", use.result)):
        if activation is not None:
            shape, zero_point = list(activation.shape), activation.zero_point
            document[name] = {"dtype": activation.dtype.name, "shape": shape, "scale": activation.scale}
            document[name]["zero_point"] = zero_point
    return document


def _quantization_document(tensor: Tensor) -> dict[str, Any] | None:
    quantization = tensor.quantization
    if quantization is None:
        return None
    return {"granularity": tensor.granularity, "block_shape": list(quantization.block_shape)} | {
        role: {"shape": list(parameter.shape), "dtype": parameter.dtype.name}
        for role, parameter in quantization.parameters()
    }
