"""Checkpoints of language models as their libraries write them, of random codes: as many equal layers as are wanted."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

OUTPUTS, INPUTS = 4096, 4096
_KINDS = {"uint8": "U8", "int32": "I32", "int64": "I64", "uint32": "U32", "float16": "F16", "bfloat16": "BF16"}
_KINDS["float32"] = "F32"
_GGUF_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight of (OUTPUTS, INPUTS): its tensors by what follows the module's name, and the configuration."""

    parts: Mapping[str, NDArray[Any]]
    config: Mapping[str, Any] = field(default_factory=dict)


def gptq() -> Layer:
    """Of 4 bits, groups of 128, scales of float16."""
    groups = INPUTS // 128
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"}
    parts = {
        ".qweight": _words(INPUTS // 8, OUTPUTS),
        ".qzeros": _words(groups, OUTPUTS // 8),
        ".scales": _scales(np.float16, groups, OUTPUTS),
    }
    return Layer(parts, config)


def awq() -> Layer:
    """Of 4 bits, groups of 128, scales of float16."""
    groups = INPUTS // 128
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    parts = {
        ".qweight": _words(INPUTS, OUTPUTS // 8),
        ".qzeros": _words(groups, OUTPUTS // 8),
        ".scales": _scales(np.float16, groups, OUTPUTS),
    }
    return Layer(parts, config)


def compressed_tensors(dtype: Any = ml_dtypes.bfloat16) -> Layer:
    """pack-quantized, symmetric, of 4 bits, groups of 128."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.20.0",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    parts = {
        ".weight_packed": _words(OUTPUTS, INPUTS // 8),
        ".weight_scale": _scales(dtype, OUTPUTS, INPUTS // 128),
        ".weight_shape": np.array([OUTPUTS, INPUTS]),
    }
    return Layer(parts, config)


def nf4(dtype: str) -> Layer:
    """Of bitsandbytes, with double quantization, for a weight of that dtype."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": dtype,
        "shape": [OUTPUTS, INPUTS],
        "nested_blocksize": 256,
        "nested_offset": 0.01,
    }
    blocks = OUTPUTS * INPUTS // 64
    parts = {
        ".weight": _bytes(OUTPUTS * INPUTS // 2, 1),
        ".weight.absmax": _bytes(blocks),
        ".weight.nested_absmax": _scales(np.float32, blocks // 256),
        ".weight.quant_map": np.sort(_random.random(16, np.float32)) * 2 - 1,
        ".weight.nested_quant_map": np.sort(_random.random(256, np.float32)),
        ".weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return Layer(parts)


def mlx() -> Layer:
    """Of 4 bits, groups of 64, scales and biases of bfloat16."""
    parts = {
        ".weight": _words(OUTPUTS, INPUTS // 8).view(np.uint32),
        ".scales": _scales(ml_dtypes.bfloat16, OUTPUTS, INPUTS // 64),
        ".biases": _scales(ml_dtypes.bfloat16, OUTPUTS, INPUTS // 64),
    }
    return Layer(parts, {"quant_method": "mlx", "bits": 4, "group_size": 64})


def write_checkpoint(folder: Path, layer: Layer, count: int) -> Path:
    """A folder with config.json and one safetensors file of `count` layers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": layer.config} if layer.config else {}))
    header, end = {}, 0
    for number in range(count):
        for suffix, array in layer.parts.items():
            offsets = [end, end + array.nbytes]
            entry = {"dtype": _KINDS[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
            header[f"layers.{number}{suffix}"] = entry
            end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            for array in layer.parts.values():
                file.write(array.tobytes())
    return folder


def gguf_blocks(elements: int, nbytes: int, scales: tuple[int, ...]) -> NDArray[np.uint8]:
    """Random blocks of a weight, (rows, bytes of a row); the float16 numbers at the bytes `scales` are finite."""
    blocks = _bytes(OUTPUTS * INPUTS // elements, nbytes)
    for at in scales:
        blocks[:, at + 1] &= 0x3F
    return blocks.reshape(OUTPUTS, -1)


def write_gguf(path: Path, kind: int, blocks: NDArray[np.uint8], count: int) -> Path:
    """A file of `count` weights of one ggml type."""
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 0)
    for number in range(count):
        name = f"blk.{number}.weight".encode()
        sizes = struct.pack("<QQ", INPUTS, OUTPUTS)
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", 2) + sizes
        head += struct.pack("<IQ", kind, number * blocks.nbytes)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % _GGUF_ALIGNMENT))
        for _ in range(count):
            file.write(blocks.tobytes())
    return path


_random = np.random.default_rng(0)


def _words(*shape: int) -> NDArray[np.int32]:
    return _random.integers(-(1 << 31), 1 << 31, shape, np.int64).astype(np.int32)


def _bytes(*shape: int) -> NDArray[np.uint8]:
    return _random.integers(0, 256, shape, np.uint8)


def _scales(dtype: Any, *shape: int) -> NDArray[Any]:
    return (_random.random(shape, np.float32) / 50 + 0.001).astype(dtype)
