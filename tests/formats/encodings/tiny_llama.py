"""A model of transformers with random weights, written in a layout, loaded by transformers and run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.writable import Configuration
from tests.formats.encodings.checkpoints import write_folder
from tests.formats.encodings.written import check, write


class TinyLlama:
    """Two layers of 64; `tied`: the head's weight is the embedding's, and not in the checkpoint."""

    def __init__(self, dtype: np.dtype[Any], *, tied: bool = False) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            tie_word_embeddings=tied,
            architectures=["LlamaForCausalLM"],
        )
        torch.manual_seed(0)
        state = LlamaForCausalLM(config).state_dict()
        if tied:
            del state["lm_head.weight"]
        self.architecture = config.to_dict() | {"dtype": dtype.name}
        self.plain: dict[str, NDArray[Any]] = {name: tensor.numpy().astype(dtype) for name, tensor in state.items()}
        self.dtype = dtype

    def write(
        self,
        folder: Path,
        layout: str,
        make: Callable[[str, tuple[int, int]], Tensor],
        shards: int = 1,
        *,
        embeddings: bool = False,
    ) -> Configuration:
        """`folder`/encoded with what `make` gives for each projection, which must be read again as it was, and
        `folder`/float with the values of that. With `embeddings` also for the embeddings and the head."""
        chosen = [name for name in self.plain if "_proj" in name or (embeddings and self.plain[name].shape[0] == 96)]
        weights = [make(name, self.plain[name].shape) for name in chosen]
        plain = {name: array for name, array in self.plain.items() if name not in chosen}
        encoded, configuration = write(folder / "encoded", layout, weights, plain, self.architecture, shards)
        model = check(folder / "encoded", encoded, weights)
        values = {name: tensor.dequantize(np.float32).astype(self.dtype) for name, tensor in model.items()}
        write_folder(folder / "float", values, config=json.loads(json.dumps(self.architecture)))
        return configuration

    def logits(self, folder: Path, **options: Any) -> NDArray[np.float32]:
        """Those of a few tokens, by the model that transformers loads from a folder."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        with torch.no_grad():
            found: NDArray[np.float32] = model(torch.arange(12)[None]).logits.float().numpy()
        assert np.isfinite(found).all()
        return found
