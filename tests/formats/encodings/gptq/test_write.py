"""GPTQ is written as it is read, and as a packer that puts one code after the other in its place has it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.arithmetic.dtypes import bits_of
from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.bytes import column_blocks
from nibblecast.formats.encodings.gptq.write import configuration, encode
from tests.formats.encodings.awq.packer import checkpoint as awq_checkpoint
from tests.formats.encodings.checkpoints import FIXTURES, loaded
from tests.formats.encodings.checkpoints_in_memory import decoded
from tests.formats.encodings.gptq.packer import packed
from tests.formats.encodings.row_weights import FLOATS, changed, limits, unread, weight, with_index
from tests.formats.encodings.written import check, same, write

CODES = [ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8]
GROUPS = [(1, 8), (1, 24), (1, 1000)]
SHARED = [(4, 16), (2, 3), (1000, 32), (1000, 1000)]


def told(*weights: Tensor, plain: tuple[str, ...] = ()) -> dict[str, Any]:
    """The configuration of a model of these weights."""
    config: dict[str, Any] = configuration({w.name: encode(w) for w in weights}, plain).entries["quantization_config"]
    return config


def named(name: str, tensor: Tensor) -> Tensor:
    return replace(tensor, name=f"{name}.weight")


@settings(max_examples=120)
@given(
    dtype=st.sampled_from(CODES),
    words=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    blocks=st.sampled_from(GROUPS + SHARED),
    zeros=st.sampled_from([None, "codes", np.int16, np.int64, np.float32]),
    at=st.sampled_from([None, 0, 1]),
    scale=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read_again(
    dtype: Any,
    words: tuple[int, int],
    blocks: tuple[int, int],
    zeros: Any,
    at: int | None,
    scale: Any,
    seed: int,
    tmp_path_factory: Any,
) -> None:
    dtype = np.dtype(dtype)
    per_word = 32 // bits_of(dtype)
    shape = (words[0] * per_word, words[1] * per_word)
    blocks = (min(blocks[0], shape[0]), min(blocks[1], shape[1]))
    limit = None if at is None else limits(dtype)[at]
    source = weight(shape, dtype, blocks, zeros=dtype if zeros == "codes" else zeros, at=limit, scale=scale, seed=seed)
    folder = Path(tmp_path_factory.getbasetemp()) / "gptq_written"
    encoded, _ = write(folder, "gptq", [source])
    assert not encoded[source.name].losses
    check(folder, encoded, [source])


@settings(max_examples=40)
@given(
    inputs=st.integers(2, 12),
    size=st.sampled_from([1, 8, 24, 32]),
    order=st.sampled_from(["shuffled", "in order"]),
    dtype=st.sampled_from([np.int32, np.int64, np.uint8]),
    seed=st.integers(0, 1000),
)
def test_group_indexes_are_kept_where_they_say_something(
    inputs: int, size: int, order: str, dtype: Any, seed: int, tmp_path_factory: Any
) -> None:
    inputs *= 8
    size = min(size, inputs)
    index = np.arange(inputs) // size
    if order == "shuffled":
        np.random.default_rng(seed).shuffle(index)
    source = with_index(weight((8, inputs), ml_dtypes.uint4, (1, size), seed=seed), index.astype(dtype))
    folder = Path(tmp_path_factory.getbasetemp()) / "gptq_order"
    encoded, layout = write(folder, "gptq", [source])
    model = check(folder, encoded, [source])
    is_kept = not np.array_equal(index, np.arange(inputs) // size)
    assert layout.entries["quantization_config"]["desc_act"] == is_kept
    quantization = model[source.name].quantization
    assert quantization is not None
    assert (quantization.group_index is not None) == is_kept


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("at", [None, 0])
def test_words_have_each_code_in_its_place(bits: int, at: int | None) -> None:
    dtype = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}[bits]
    source = weight((32, 48), dtype, (1, 16), zeros=dtype, at=None if at is None else 1 << bits - 1)
    encoded = encode(source)
    layout = configuration({source.name: encoded}, [])
    stored = {
        key.rpartition(".")[2]: tensor.numpy() for key, tensor in (*encoded.stored.items(), *layout.stored.items())
    }
    quantization = source.quantization
    assert quantization is not None
    assert quantization.zero_point is not None
    np.testing.assert_array_equal(stored["qweight"], packed(source.codes().astype(np.int64).T, bits))
    subtracted = 0 if at is None else 1  # every one of them is the middle: version 1
    zeros = quantization.zero_point.codes().astype(np.int64) - subtracted
    np.testing.assert_array_equal(stored["qzeros"], packed(zeros, bits).T)
    np.testing.assert_array_equal(stored["scales"], quantization.scale.numpy().T)
    np.testing.assert_array_equal(stored["g_idx"], np.arange(48, dtype=np.int32) // 16)
    assert {key: array.dtype.name for key, array in stored.items()} == {
        "qweight": "int32",
        "qzeros": "int32",
        "scales": "float16",
        "g_idx": "int32",
    }


def test_one_asymmetric_weight_makes_a_model_of_version_2(tmp_path: Path) -> None:
    symmetric = named("model.layers.0.a", weight((16, 32)))
    asymmetric = named("model.layers.0.b", weight((16, 32), ml_dtypes.uint4, zeros=ml_dtypes.uint4))
    assert told(symmetric)["checkpoint_format"] == "gptq"
    assert told(symmetric)["sym"] is True
    encoded, layout = write(tmp_path / "m", "gptq", [symmetric, asymmetric])
    config = layout.entries["quantization_config"]
    assert (config["checkpoint_format"], config["format"], config["sym"]) == ("gptq_v2", "gptq_v2", False)
    assert set(layout.stored) == {"model.layers.0.a.qzeros", "model.layers.0.b.qzeros"}
    assert (layout.stored["model.layers.0.a.qzeros"].numpy().view(np.uint32) == 0x88888888).all()
    assert any("gptq_v2" in note for note in layout.notes)
    check(tmp_path / "m", encoded, [symmetric, asymmetric])


def test_the_configuration_is_in_both_files(tmp_path: Path) -> None:
    write(tmp_path / "m", "gptq", [weight((16, 64), block_shape=(1, 32))], architecture={"model_type": "llama"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == json.loads((tmp_path / "m" / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "lm_head": False}
    assert expected.items() <= config["quantization_config"].items()


def test_zeros_of_a_source_without_any_are_zero() -> None:
    encoded = encode(weight((16, 32), ml_dtypes.uint4))
    assert encoded.weight.quantization is not None
    assert encoded.weight.quantization.zero_point is not None
    assert not encoded.weight.quantization.zero_point.codes().any()


def test_nothing_of_the_codes_is_read_at_planning() -> None:
    source = unread(weight((16, 64), zeros=ml_dtypes.int4))
    encoded = encode(source)
    configuration({source.name: encoded}, [])
    with pytest.raises(AssertionError, match="read at planning"):
        encoded.stored["model.layers.0.self_attn.q_proj.qweight"].numpy()


def test_large_weights_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = weight((64, 256))
    key = "model.layers.0.self_attn.q_proj.qweight"
    whole = encode(source).stored[key].numpy()
    monkeypatch.setattr(column_blocks, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(column_blocks, "_PART_BYTES", 500)
    stored = encode(source).stored[key]
    np.testing.assert_array_equal(stored.numpy(), whole)
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in stored.parts(1000)]), whole)


def test_what_the_libraries_compute_in_another_dtype_is_a_loss(tmp_path: Path) -> None:
    source = weight((16, 64), compute=np.float32)
    encoded, _ = write(tmp_path / "m", "gptq", [source])
    (loss,) = encoded[source.name].losses
    assert loss.kind == "rounded"
    assert "float16" in loss.detail
    read = nibblecast.load(tmp_path / "m")[source.name]
    same(read, encoded[source.name].weight)
    np.testing.assert_array_equal(read.dequantize(np.float16), source.dequantize(np.float16))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (weight((16, 32), name="model.q_proj"), "not named '<module>.weight'"),
        (weight((16, 32), name="model.embed_tokens.weight"), "an embedding by its name"),
        (weight((12, 32)), r"shape \(12, 32\): GPTQ's words of 8 codes"),
        (weight((16, 36)), r"shape \(16, 36\)"),
        (weight((16, 8), ml_dtypes.int2, (1, 8)), "words of 16 codes"),
        (weight((16, 0)), r"shape \(16, 0\)"),
        (weight((16, 32), zeros=np.int16, at=8), "zero points from 16 to 16, outside its codes of 4 bits"),
        (weight((16, 32), zeros=np.int16, at=-9), "zero points from -1 to -1"),
        (with_index(weight((16, 32), block_shape=(8, 32)), np.zeros(16, np.int32), axis=0), "group index along axis 0"),
        (with_index(weight((16, 32), block_shape=(16, 8)), np.arange(32) % 4), r"blocks of \(16, 8\)"),
        (replace(weight((16, 32)), quantization=None), "codes of int4"),
    ],
)
def test_what_gptq_cannot_hold_is_refused(source: Tensor, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        encode(source)
    assert caught.value.tensor == source.name
    assert "\n" not in str(caught.value)


def test_other_forms_of_values_are_refused() -> None:
    plain = weight((16, 32))
    assert plain.quantization is not None
    scale = plain.quantization.scale
    halfway = Tensor.from_array("offset", scale.numpy() / np.float16(2))
    with pytest.raises(Unsupported, match="offsets that are not multiples of its scales"):
        encode(changed(plain, offset=halfway))
    codebook = Tensor.from_array("codebook", np.arange(16, dtype=np.float32))
    with pytest.raises(Unsupported, match="codebook"):
        encode(changed(weight((16, 32), ml_dtypes.uint4), codebook=codebook))
    halves = Tensor.from_array("zero_point", np.full(scale.shape, 0.5, np.float32))
    with pytest.raises(Unsupported, match="zero point 0.5, where integers are needed"):
        encode(changed(plain, zero_point=halves))
    cube = Quantization(Tensor.from_array("scale", np.ones((2, 8, 1), np.float16)), (1, 1, 8))
    with pytest.raises(Unsupported, match=r"shape \(2, 8, 8\)"):
        encode(Tensor.from_array("a.weight", np.zeros((2, 8, 8), np.uint8), cube))


def test_groups_that_no_size_gives_and_indexes_beyond_the_groups_are_refused() -> None:
    seven = Tensor.from_array("scale", np.ones((8, 7), np.float16))
    source = changed(with_index(weight((8, 16), block_shape=(1, 16)), np.zeros(16, np.int32)), scale=seven)
    with pytest.raises(Unsupported, match="7 groups for 16 inputs, which no group size gives"):
        encode(source)
    beyond = with_index(weight((8, 16), block_shape=(1, 8)), np.full(16, 2))
    with pytest.raises(CorruptFile, match="from 2 to 2 for 2 groups"):
        encode(beyond)


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([weight((8, 64), block_shape=(1, 32))], 32),
        ([weight((8, 64), block_shape=(1, 64)), weight((8, 32), block_shape=(8, 32))], -1),
        ([weight((8, 64), block_shape=(1, 32)), weight((8, 32), block_shape=(1, 32))], 32),
        ([weight((8, 96), block_shape=(1, 64)), weight((8, 32), block_shape=(1, 32))], 64),
        ([with_index(weight((8, 96), block_shape=(1, 64)), np.arange(96) % 2)], 48),
        (
            [
                with_index(weight((8, 96), block_shape=(1, 64)), np.arange(96) % 2),
                weight((8, 128), block_shape=(1, 64)),
            ],
            64,
        ),
    ],
)
def test_one_group_size_that_all_weights_have(weights: list[Tensor], size: int, tmp_path: Path) -> None:
    sources = [named(f"layers.{number}.a", one) for number, one in enumerate(weights)]
    encoded, layout = write(tmp_path / "m", "gptq", sources)
    assert layout.entries["quantization_config"]["group_size"] == size
    check(tmp_path / "m", encoded, sources)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (weight((8, 64), block_shape=(1, 16)), "groups of 32, but 'b.weight' of 16"),
        (weight((8, 64), np.int8, (1, 32)), "codes of 8 bits, but 'a.weight' of 4"),
        (weight((8, 64), block_shape=(1, 64)), "groups of 64 or more, but 'a.weight' of 32"),
        (
            with_index(weight((8, 96), block_shape=(1, 48)), np.arange(96) % 2),
            "groups of 48 to 95, but 'a.weight' of 32",
        ),
    ],
)
def test_weights_that_differ_in_what_there_is_one_of_are_both_named(other: Tensor, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        told(named("a", weight((8, 64), block_shape=(1, 32))), named("b", other))
    assert str(caught.value.tensor) in ("a.weight", "b.weight")


def test_a_model_without_quantized_weights_is_refused() -> None:
    with pytest.raises(Unsupported, match="no quantized weight"):
        configuration({}, ["a.weight"])


QUANTIZED = ("layers.0.attn.q_proj", "layers.1.attn.q_proj", "layers.1.mlp.gate", "layers.1.mlp.fc", "lm_head")
PLAIN = (
    "embed_tokens",
    "layers.0.attn.ln_1",
    "layers.0.attn.v_proj",
    "layers.0.mlp.fc",
    "layers.0.mlp.big_gate",
    "layers.1.attn.v_proj",
    "layers.1.attn.q_norm",
    "norm",
)


def test_plain_layers_of_the_blocks_are_excepted_by_name() -> None:
    config = told(
        *(named(name, weight((8, 32))) for name in QUANTIZED), plain=tuple(f"{name}.weight" for name in PLAIN)
    )
    # optimum: convert_model in gptq/quantizer.py
    (names,) = config["modules_in_block_to_quantize"]
    assert names == ["attn.q_proj", "mlp.gate", "layers.1.mlp.fc"]
    in_blocks = [name for name in QUANTIZED + PLAIN if name.startswith("layers.")]
    assert [name for name in in_blocks if any(name.endswith(end) for end in names)] == list(QUANTIZED[:-1])
    # gptqmodel: _resolve_dynamic_override in quantization/config.py
    patterns = [pattern.removeprefix("-:") for pattern in config["dynamic"]]
    assert patterns == [r"(.*\.)?attn\.v_proj$", r"(.*\.)?layers\.0\.mlp\.fc$", r"(.*\.)?mlp\.big_gate$"]
    excepted = [name for name in QUANTIZED + PLAIN if any(re.match(pattern, name) for pattern in patterns)]
    assert excepted == ["layers.0.attn.v_proj", "layers.0.mlp.fc", "layers.0.mlp.big_gate", "layers.1.attn.v_proj"]
    assert config["lm_head"] is True


def test_norms_and_embeddings_need_no_exception() -> None:
    plain = (
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    )
    assert not {"dynamic", "modules_in_block_to_quantize"} & set(told(weight((8, 32)), plain=plain))


@pytest.mark.parametrize(
    ("source", "note"),
    [
        (weight((8, 32), scale=np.float32), "scales are stored in float32"),
        (weight((8, 48), block_shape=(1, 24)), "groups are of 24 inputs; gptqmodel's kernels take groups of 16, 32"),
        (named("lm_head", weight((8, 32))), "not for 'lm_head'"),
    ],
)
def test_what_libraries_do_otherwise_is_noted(source: Tensor, note: str) -> None:
    (found,) = configuration({source.name: encode(source)}, []).notes
    assert note in found


@pytest.mark.parametrize("case", ["compressed_tensors_old_pack_int4", "hqq_f16", "hqq_f32_viewed", "quanto_qint8_bf16"])
def test_codes_move_from_other_checkpoints(case: str, tmp_path: Path) -> None:
    sources = [tensor for tensor in loaded(FIXTURES / case).values() if holds(tensor)]
    assert sources
    for number, source in enumerate(sources):
        encoded, _ = write(tmp_path / str(number), "gptq", [source])
        assert not encoded[source.name].losses
        check(tmp_path / str(number), encoded, [source])


def holds(tensor: Tensor) -> bool:
    if tensor.quantization is None:
        return False
    try:
        encode(tensor)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("model.layers.0.a", "model.layers.1.a"), None),
        (("0.a", "1.a"), None),
        (("model.layers.0.a", "vision.blocks.0.b", "vision.blocks.1.b"), "'vision.blocks.0.b' and 1 more"),
        (("proj", "model.layers.0.a"), "'proj'"),
    ],
)
def test_weights_outside_the_stack_of_blocks_are_noted(names: tuple[str, ...], others: str | None) -> None:
    sources = [named(name, weight((8, 32))) for name in names]
    notes = configuration({source.name: encode(source) for source in sources}, []).notes
    assert [note.partition("not for ")[2] for note in notes] == ([] if others is None else [others])


def test_codes_move_from_awq(tmp_path: Path) -> None:
    arrays, codes, zeros, _ = awq_checkpoint(dtype=np.float16)
    source = decoded(arrays)["m.weight"]
    encoded, layout = write(tmp_path / "m", "gptq", [source])
    assert layout.entries["quantization_config"]["checkpoint_format"] == "gptq_v2"
    read = check(tmp_path / "m", encoded, [source])["m.weight"]
    np.testing.assert_array_equal(read.codes(), codes.T)
    assert read.quantization is not None
    assert read.quantization.zero_point is not None
    np.testing.assert_array_equal(read.quantization.zero_point.codes(), zeros.T)
