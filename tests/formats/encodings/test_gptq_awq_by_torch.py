"""What is written as GPTQ and as AWQ, decoded with the operations of torch that gptqmodel's and autoawq's modules use,
and a model of transformers that has these weights.

gptqmodel itself must be built, so that it is not among the libraries of the tests. By hand, gptqmodel 7.7 (alone, and
under transformers 5.23 with optimum 2.3) loaded models like the one here on a CPU, and decoded the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblecast
from nibblecast.converters.ir import Tensor
from nibblecast.converters.stages.quantize import parse_scheme, quantize_model
from tests.formats.encodings.checkpoints import library_values
from tests.formats.encodings.row_weights import weight, with_index
from tests.formats.encodings.written import own_dtype, write

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", name="torch")
def _torch() -> Any:
    return pytest.importorskip("torch", reason="pip install torch==2.13.0")


def fields(torch: Any, words: Any, bits: int) -> Any:
    """The fields of words along a new last axis, lowest first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return torch.bitwise_and(torch.bitwise_right_shift(words.unsqueeze(-1), shifts), (1 << bits) - 1)


def by_gptq(torch: Any, parts: dict[str, Any], config: dict[str, Any]) -> Any:
    """The weight (O, I): zeros of version 1 get what its writer subtracted, as words of int32."""
    bits, qzeros, scales = config["bits"], parts["qzeros"], parts["scales"]
    if config["checkpoint_format"] == "gptq":
        qzeros = qzeros + {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    zeros = fields(torch, qzeros, bits).flatten(1)
    codes = fields(torch, parts["qweight"], bits).transpose(1, 2).flatten(0, 1)
    groups = parts["g_idx"].long()
    return (scales[groups] * (codes - zeros[groups])).T


def by_awq(torch: Any, parts: dict[str, Any], config: dict[str, Any]) -> Any:
    """The weight (O, I): the order of the outputs in a word is undone after unpacking."""
    undone = [0, 4, 1, 5, 2, 6, 3, 7]
    codes, zeros = (fields(torch, parts[name], 4)[..., undone].flatten(1) for name in ("qweight", "qzeros"))
    size = codes.shape[0] if config["group_size"] == -1 else config["group_size"]
    zeros, scales = (each.repeat_interleave(size, dim=0) for each in (zeros, parts["scales"]))
    return ((codes - zeros) * scales).T


DECODED_BY = {"gptq": by_gptq, "awq": by_awq}


def decoded_by_torch(torch: Any, folder: Path, layout: str, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every module with a `qweight` in a folder's file, and its weight."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        module = key.removesuffix(".qweight")
        if module != key:
            parts = {end: tensors[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales")}
            if layout == "gptq":
                parts["g_idx"] = tensors[f"{module}.g_idx"]
            yield module, DECODED_BY[layout](torch, parts, config)


@pytest.mark.parametrize("scale", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ("gptq", {"dtype": ml_dtypes.int4}),
        ("gptq", {"dtype": ml_dtypes.uint4, "zeros": ml_dtypes.uint4}),
        ("gptq", {"dtype": ml_dtypes.uint4, "zeros": ml_dtypes.uint4, "at": 0}),
        ("gptq", {"dtype": np.uint8, "zeros": np.uint8, "at": 255}),
        ("gptq", {"dtype": np.int8, "block_shape": (1, 128)}),
        ("gptq", {"dtype": ml_dtypes.int2, "zeros": np.int8, "block_shape": (1, 48)}),
        ("awq", {"dtype": ml_dtypes.int4}),
        ("awq", {"dtype": ml_dtypes.uint4, "zeros": ml_dtypes.uint4}),
        ("awq", {"dtype": ml_dtypes.uint4, "zeros": ml_dtypes.uint4, "at": 15, "block_shape": (1, 128)}),
    ],
)
def test_torch_decodes_the_same_bits(
    torch: Any, layout: str, source: dict[str, Any], scale: Any, tmp_path: Path
) -> None:
    said = weight((64, 128), scale=scale, **source)
    _same_by_torch(torch, tmp_path, layout, said)


def test_torch_decodes_the_same_bits_of_groups_in_another_order(torch: Any, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(128) // 32
    _same_by_torch(torch, tmp_path, "gptq", with_index(weight((64, 128), ml_dtypes.uint4, zeros=np.uint8), order))


def _same_by_torch(torch: Any, folder: Path, layout: str, source: Tensor) -> None:
    encoded, configuration = write(folder, layout, [source])
    ((module, got),) = decoded_by_torch(torch, folder, layout, configuration.entries["quantization_config"])
    wanted = library_values(encoded[f"{module}.weight"].weight)
    assert got.dtype == getattr(torch, np.dtype(source.quantization.scale.dtype).name)  # type: ignore[union-attr]
    np.testing.assert_array_equal(got.float().numpy(), wanted)
    np.testing.assert_array_equal(got.float().numpy(), source.dequantize(own_dtype(source)).astype(np.float32))


@pytest.fixture(scope="module")
def llama(torch: Any, tmp_path_factory: Any) -> tuple[Any, nibblecast.Model]:
    """A tiny Llama of transformers with random weights, and the same as it is read."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, nibblecast.load(folder / "model.safetensors")


@pytest.mark.parametrize("plain", [(), ("q_proj", "layers.0.mlp.down_proj")])
@pytest.mark.parametrize("scheme", ["int4,block=32,scale=float16", "uint4,block=32,scale=bfloat16"])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_model_of_transformers_computes_the_same(
    torch: Any, llama: tuple[Any, nibblecast.Model], layout: str, scheme: str, plain: tuple[str, ...], tmp_path: Path
) -> None:
    model, floats = llama
    quantized = quantize_model(floats, parse_scheme(scheme))
    chosen = [t for n, t in quantized.items() if ".layers." in n and t.quantization and not any(p in n for p in plain)]
    names = {tensor.name for tensor in chosen}
    kept = {name: tensor.numpy() for name, tensor in floats.items() if name not in names}
    _, configuration = write(tmp_path / "m", layout, chosen, kept, model.config.to_dict())
    config = configuration.entries["quantization_config"]

    decoded = dict(decoded_by_torch(torch, tmp_path / "m", layout, config))
    assert set(decoded) == _replaced_modules(torch, model, layout, config)
    read = nibblecast.load(tmp_path / "m")
    ours = {name: torch.from_numpy(library_values(tensor).copy()) for name, tensor in read.items()}
    theirs = ours | {f"{module}.weight": each.float() for module, each in decoded.items()}
    tokens = torch.arange(16)[None]
    logits = []
    for weights in (ours, theirs):
        model.load_state_dict(weights, strict=True)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _replaced_modules(torch: Any, model: Any, layout: str, config: dict[str, Any]) -> set[str]:
    """The linear layers that a library looks for quantized weights of."""
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if layout == "gptq":  # optimum: those in blocks, less what is not listed
        ends = config.get("modules_in_block_to_quantize", [[""]])[0]
        return {name for name in linear if name.startswith("model.layers.") and name.endswith(tuple(ends))}
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = get_keys_to_not_convert(model) + (config["modules_to_not_convert"] or [])
    return {name for name in linear if should_convert_module(name, patterns)}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_the_configuration_is_one_of_transformers(layout: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    write(tmp_path, layout, [weight((64, 128))], architecture={"model_type": "llama"})
    told = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    config = {"gptq": transformers.GPTQConfig, "awq": transformers.AwqConfig}[layout].from_dict(told)
    assert (config.quant_method, config.bits, config.group_size) == (layout, 4, 32)
    assert config.format == {"gptq": "gptq", "awq": "gemm"}[layout]
