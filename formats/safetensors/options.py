"""What a user can choose about safetensors files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nibblecast.converters.interfaces import Size, option


@dataclass(frozen=True, slots=True)
class SafetensorsOptions:
    """Options of the safetensors writer."""

    layout: Literal["packed", "awq", "compressed-tensors", "gptq", "mlx", "torchao"] = option(
        "packed", "packed: codes as stored, described in the file's own metadata; or as that library has them"
    )
    shard_size: Size = option(Size(5 << 30), "of a folder: the most bytes of one of its files")
    others: Literal["refuse", "dequantize"] = option(
        "refuse", "weights that another layout than packed cannot hold: an error, or plain floats and a loss"
    )
    scale_dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        None, "of another layout than packed: the dtype of scales, in which its library computes"
    )
