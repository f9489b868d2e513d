"""What the libraries of checkpoints decode with, on a CPU. A peer is its name and a call that decodes one weight."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.checkpoint_files import INPUTS, OUTPUTS, Layer

Peer = tuple[str, Callable[[], object] | None]


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _gptq(layer: Layer) -> Peer:
    """gptqmodel's own operations: it has no kernel for a CPU alone."""
    if find_spec("torch") is None:
        return "torch", None
    import torch

    qweight, qzeros, scales = (_tensor(layer.parts[part]) for part in (".qweight", ".qzeros", ".scales"))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    groups = torch.arange(INPUTS) // (INPUTS // scales.shape[0])

    def decode() -> object:
        zeros = ((qzeros[:, :, None] >> shifts) & 15).reshape(scales.shape)
        codes = ((qweight[:, None, :] >> shifts[:, None]) & 15).reshape(INPUTS, OUTPUTS)
        return (scales[groups] * (codes - zeros[groups])).T.contiguous()

    return "gptqmodel's operations in torch", decode


def _awq(layer: Layer) -> Peer:
    """autoawq's own operations."""
    if find_spec("torch") is None:
        return "torch", None
    import torch

    qweight, qzeros, scales = (_tensor(layer.parts[part]) for part in (".qweight", ".qzeros", ".scales"))
    shifts = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32) * 4
    size = INPUTS // scales.shape[0]

    def decode() -> object:
        zeros = ((qzeros[:, :, None] >> shifts) & 15).reshape(scales.shape).repeat_interleave(size, 0)
        codes = ((qweight[:, :, None] >> shifts) & 15).reshape(INPUTS, OUTPUTS)
        return ((codes - zeros) * scales.repeat_interleave(size, 0)).T.contiguous()

    return "autoawq's operations in torch", decode


def _compressed_tensors(layer: Layer) -> Peer:
    if find_spec("compressed_tensors") is None:
        return "compressed-tensors", None
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**layer.config["config_groups"]["group_0"])
    state = {part[1:]: _tensor(array) for part, array in layer.parts.items()}
    return "its decompress", lambda: PackedQuantizationCompressor.decompress(state, scheme)


def _nf4(layer: Layer) -> Peer:
    """bitsandbytes decodes on a CPU with a kernel of its own; this is what it computes, in torch."""
    if find_spec("torch") is None:
        return "torch", None
    import torch

    packed, absmax, nested, table, nested_table = (
        _tensor(layer.parts[f".weight{part}"])
        for part in ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
    )

    def decode() -> object:
        scales = (nested_table[absmax.int()].reshape(-1, 256) * nested[:, None] + 0.01).reshape(-1, 1)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1, 64)
        return (table[codes.int()] * scales).to(torch.bfloat16).reshape(OUTPUTS, INPUTS)

    return "its operations in torch", decode


def _mlx(layer: Layer) -> Peer:
    if find_spec("mlx") is None:
        return "mlx", None
    import mlx.core as mx

    weight = mx.array(layer.parts[".weight"])
    scales, biases = (mx.array(layer.parts[part].view(np.uint16)).view(mx.bfloat16) for part in (".scales", ".biases"))
    return "mlx.core.dequantize", lambda: mx.eval(mx.dequantize(weight, scales, biases, group_size=64, bits=4))


def _gguf(kind: str) -> Callable[[Any], Peer]:
    def peer(blocks: np.ndarray) -> Peer:
        if find_spec("gguf") is None:
            return "gguf", None
        import gguf

        return "gguf.quants", lambda: gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])

    return peer


#: By the encoding's name: makes the peer of what is stored.
PEERS: dict[str, Callable[[Any], Peer]] = {
    "GPTQ": _gptq,
    "AWQ": _awq,
    "compressed-tensors": _compressed_tensors,
    "NF4": _nf4,
    "MLX": _mlx,
    **{kind: _gguf(kind) for kind in ("Q4_0", "Q8_0", "Q4_K", "Q6_K")},
}
