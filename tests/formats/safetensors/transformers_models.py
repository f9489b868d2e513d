"""Tiny language models by transformers, and what it computes with a folder: in processes of their own, for it warns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LLAMA = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=64,
)
LlamaForCausalLM(config).to(getattr(torch, sys.argv[2])).save_pretrained(sys.argv[1])
"""

#: The experts' blocks and scales are random ones, written over a model of floats.
_GPT_OSS = """
import json, pathlib, sys, torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM
torch.manual_seed(0)
folder = pathlib.Path(sys.argv[1])
config = GptOssConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_local_experts=3, num_experts_per_tok=2, vocab_size=128, max_position_embeddings=64,
    sliding_window=16,
)
model = GptOssForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder)
stored = {}
for key, value in model.state_dict().items():
    if key.endswith((".gate_up_proj", ".down_proj")):
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        stored[key + "_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        stored[key + "_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    else:
        stored[key] = value.contiguous()
save_file(stored, folder / "model.safetensors", {"format": "pt"})
document = json.loads((folder / "config.json").read_text())
document["quantization_config"] = {"quant_method": "mxfp4"}
(folder / "config.json").write_text(json.dumps(document))
"""

_LOGITS = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, Mxfp4Config
options = {"quantization_config": Mxfp4Config(dequantize=True)} if "dequantize-mxfp4" in sys.argv else {}
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, **options)
wrong = {key: sorted(names) for key, names in loading.items() if names}
assert not wrong, wrong
print(model.dtype)
with torch.no_grad():
    logits = model(torch.arange(24)[None] * 5 % model.config.vocab_size).logits
numpy.save(sys.argv[2], logits.float().numpy())
"""


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def tiny_llama(folder: Path, dtype: str = "bfloat16") -> Path:
    """A Llama of random weights, saved by transformers."""
    _run(_LLAMA, str(folder), dtype)
    return folder


def tiny_gpt_oss(folder: Path) -> Path:
    """A gpt-oss of random weights, its experts in MXFP4."""
    _run(_GPT_OSS, str(folder))
    return folder


def logits_of(folder: Path, *options: str) -> tuple[str, NDArray[Any]]:
    """The dtype of the model that transformers loads from a folder, and its logits for some tokens, as float32. Fails
    where a weight is missing, is left over, or has another shape."""
    path = folder.parent / f"{folder.name}-logits.npy"
    dtype = _run(_LOGITS, str(folder), str(path), *options).splitlines()[-1]
    return dtype, np.load(path)
