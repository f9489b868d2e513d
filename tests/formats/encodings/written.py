"""Weights written by an encoding into a folder of a checkpoint, and what reading that must give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nibblecast
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.writable import Configuration, Encoded, writable_encoding
from tests.formats.encodings.checkpoints import write_file

NO_PLAIN: Mapping[str, NDArray[Any]] = {}


def write(
    folder: Path,
    layout: str,
    weights: Iterable[Tensor],
    plain: Mapping[str, NDArray[Any]] = NO_PLAIN,
    architecture: Mapping[str, Any] = NO_PLAIN,
    shards: int = 1,
) -> tuple[dict[str, Encoded], Configuration]:
    """A folder of these weights and plain arrays, and config.json of the architecture with the encoding's entries."""
    encoding = writable_encoding(layout)
    encoded = {weight.name: encoding.encode(weight) for weight in weights}
    configuration = encoding.configuration(encoded, plain)
    stored = {key: tensor for one in encoded.values() for key, tensor in one.stored.items()}
    stored |= configuration.stored
    assert all(tensor.name == key and tensor.quantization is None for key, tensor in stored.items())
    arrays = {key: tensor.numpy() for key, tensor in stored.items()} | dict(plain)
    folder.mkdir(exist_ok=True)
    config = dict(architecture) | dict(configuration.entries)
    (folder / "config.json").write_text(json.dumps(config))
    for name, document in configuration.files.items():
        (folder / name).write_text(json.dumps(document))
    if shards == 1:
        write_file(folder / "model.safetensors", arrays, configuration.metadata)
        return encoded, configuration
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        keys = list(arrays)[number * len(arrays) // shards : (number + 1) * len(arrays) // shards]
        write_file(folder / name, {key: arrays[key] for key in keys}, configuration.metadata)
        weight_map |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return encoded, configuration


def check(folder: Path, encoded: Mapping[str, Encoded], sources: Iterable[Tensor]) -> nibblecast.Model:
    """What is read is what the encoding said; without losses, the values are also those of the sources, of the dtype
    of which their libraries give them."""
    model = nibblecast.load(folder)
    for name, one in encoded.items():
        assert one.weight.name == name
        same(model[name], one.weight)
    for source in sources:
        if not encoded[source.name].losses:
            dtype = own_dtype(source)
            np.testing.assert_array_equal(model[source.name].dequantize(dtype), source.dequantize(dtype), source.name)
    return model


def own_dtype(source: Tensor) -> np.dtype[Any]:
    """The dtype of the values that the library gives that made a weight; float32 for float64."""
    assert source.quantization is not None
    own = source.quantization.value_dtype or source.quantization.compute_dtype
    return own if own != np.float64 else np.dtype(np.float32)


def same(read: Tensor, said: Tensor) -> None:
    """Two tensors are the same: codes and parameters, their dtypes and blocks, and the values, whole and in rows."""
    _same_parts(read, said)
    values = read.dequantize(np.float32)
    np.testing.assert_array_equal(values, said.dequantize(np.float32))
    step = said.row_step
    count = next((size for size in said.shape if size != 1), 1)
    rows = [said.rows(start, min(start + step, count)) for start in range(0, count, step)]
    by_rows = np.concatenate([part.dequantize(np.float32).reshape(-1) for part in rows])
    np.testing.assert_array_equal(by_rows, values.reshape(-1))


def _same_parts(read: Tensor, said: Tensor) -> None:
    assert (read.name, read.shape, read.dtype) == (said.name, said.shape, said.dtype)
    np.testing.assert_array_equal(read.packed(), said.packed(), said.name)
    a, b = read.quantization, said.quantization
    assert (a is None) == (b is None), said.name
    if a is None or b is None:
        return
    assert (a.block_shape, a.factor) == (b.block_shape, b.factor)
    assert (a.compute_dtype, a.value_dtype) == (b.compute_dtype, b.value_dtype), said.name
    assert [role for role, _ in a.parameters()] == [role for role, _ in b.parameters()]
    for (_, of_a), (_, of_b) in zip(a.parameters(), b.parameters(), strict=True):
        _same_parts(of_a, of_b)
