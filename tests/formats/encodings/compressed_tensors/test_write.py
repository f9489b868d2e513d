"""What is written as compressed-tensors is read again, by us and by the library."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings

import nibblecast
from nibblecast.converters.arithmetic.dtypes import FLOAT8_E4M3, FLOAT8_E8M0
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, grid_shape
from nibblecast.converters.storage import Computed, InMemory
from nibblecast.formats.encodings.compressed_tensors.write import configuration, encode
from nibblecast.formats.encodings.writable import Configuration
from tests.formats.encodings import random_weights
from tests.formats.encodings.random_weights import CODES, FLOATS, integers, limits, matrices
from tests.formats.encodings.tiny_llama import TinyLlama
from tests.formats.encodings.written import check, own_dtype, write

FIXTURES = Path(__file__).parents[4] / "fixtures"
SOURCES = sorted(
    [folder for folder in (FIXTURES / "checkpoints").iterdir() if folder.is_dir()]
    + list((FIXTURES / "torchao").glob("*.safetensors"))
)
LAYOUT = "compressed-tensors"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def small_floats() -> list[Tensor]:
    """A weight for each layout of small floats, and each granularity of float8."""
    source = random()
    weights = []
    for number, (shape, blocks) in enumerate(
        (((5, 13), (5, 13)), ((5, 13), (1, 13)), ((9, 64), (1, 32)), ((9, 70), (1, 32)), ((20, 40), (8, 16)))
    ):
        for scale in FLOATS:
            scales = Tensor.from_array("scale", source.random(grid_shape(shape, blocks)).astype(scale))
            quantization = Quantization(scales, blocks, compute_dtype=scale)
            codes = random_weights.float8(source, shape)
            weights.append(Tensor.from_array(f"float8.{scale.name}_{number}.weight", codes, quantization))
    mx = Quantization(random_weights.exponents(source, (6, 3)), (1, 32))
    weights.append(Tensor.from_array("mxfp8.weight", random_weights.float8(source, (6, 96)), mx))
    for compute in FLOATS:
        scale = random_weights.exponents(source, (6, 3))
        weights.append(random_weights.float4(source, f"mxfp4.{compute.name}.weight", (6, 96), scale, 32, compute))
    for number, outer in enumerate((None, 0.25, 0.0123, 1.7e-5)):
        scale = random_weights.float8_scales(source, (6, 6), outer)
        weights.append(random_weights.float4(source, f"nvfp4.m{number}.weight", (6, 96), scale, 16))
    return weights


def all_integers() -> list[Tensor]:
    source = random()
    cases = (((5, 13), (5, 13)), ((5, 13), (1, 13)), ((9, 64), (1, 32)), ((9, 70), (1, 32)), ((20, 40), (8, 16)))
    return [
        integers(source, f"int.m{n}_{d}_{z}.weight", dtype, shape, blocks, zero_points=z, scale=FLOATS[(n + d) % 3])
        for d, dtype in enumerate(CODES)
        for n, (shape, blocks) in enumerate((*cases, ((20, 40), (20, 1)), ((1, 8), (1, 8))))
        for z in ("none", "codes", "highest")
    ]


@settings(max_examples=60)
@given(weight=matrices())
@example(weight=integers(random(), "a.b.weight", CODES[3], (3, 33), (1, 32), zero_points="highest"))
def test_integers_are_read_as_they_were(tmp_path, weight):
    encoded, _ = write(tmp_path, LAYOUT, [weight])
    model = check(tmp_path, encoded, [weight])
    low = limits(weight.dtype)[0]
    assert (model["a.b.weight"].codes().astype(int) == weight.codes().astype(int) - low - (1 << weight.bits - 1)).all()
    assert not encoded["a.b.weight"].losses


def test_small_floats_are_read_as_they_were(tmp_path):
    weights = small_floats()
    encoded, _ = write(tmp_path, LAYOUT, weights)
    check(tmp_path, encoded, weights)
    losses = {name: [loss.kind for loss in one.losses] for name, one in encoded.items() if one.losses}
    assert losses == {
        "mxfp4.float16.weight": ["rounded"],
        "nvfp4.m0.weight": ["rounded"],
        "nvfp4.m1.weight": ["rounded"],
        "nvfp4.m2.weight": ["rounded", "rounded"],
        "nvfp4.m3.weight": ["rounded", "rounded"],
    }


def test_dividing_by_a_reciprocal_is_said_only_where_it_gives_other_scales():
    seen = set()
    for outer in (2.0**-7, 0.0123, 0.3, 1 / 3, 1 / 1811.3, 3.0):
        scale = random_weights.float8_scales(random(), (2, 1), outer)
        encoded = encode(random_weights.float4(random(), "m.weight", (2, 16), scale, 16))
        every = np.arange(127, dtype=np.uint8).view(FLOAT8_E4M3).astype(np.float32)
        quotients = every / encoded.stored["m.weight_global_scale"].numpy()
        is_same = bool((quotients == every * np.float32(outer)).all())
        assert sum("divided" in loss.detail for loss in encoded.losses) == (not is_same)
        seen.add(is_same)
    assert seen == {False, True}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_weights_of_other_encodings(tmp_path, source):
    model = nibblecast.load(source / "model.pt" if (source / "model.pt").exists() else source)
    weights, refused = [], 0
    for tensor in model.values():
        if tensor.quantization is not None:
            try:
                encode(tensor)
                weights.append(tensor)
            except Unsupported as error:
                refused += 1
                assert "\n" not in str(error)
                assert tensor.name in str(error)
    assert weights or refused
    if weights:
        encoded, _ = write(tmp_path, LAYOUT, weights)
        check(tmp_path, encoded, weights)


def test_zero_points_that_are_all_zero_are_left_out():
    for dtype in CODES:
        encoded = encode(integers(random(), "m.weight", dtype, (4, 32), (1, 16), zero_points="middle"))
        assert "m.weight_zero_point" not in encoded.stored
        assert encoded.weight.quantization.zero_point is None
        assert encoded.setting.symmetric


def strategy(made: Configuration) -> str:
    (group,) = made.entries["quantization_config"]["config_groups"].values()
    return group["weights"]["strategy"]


@pytest.mark.parametrize(
    ("zeros", "wanted"),
    [((-8, 7), "group"), ((-9, 7), "block"), ((-8, 8), "block"), ((-128, 127), "block")],
)
def test_zero_points_of_more_bits_than_the_codes_are_not_packed(tmp_path, zeros, wanted):
    weight = integers(random(), "m.weight", CODES[2], (4, 32), (1, 16))
    weight = changed(weight, zero_point=Tensor.from_array("zero_point", np.tile(np.array(zeros, np.int8), (4, 1))))
    encoded, made = write(tmp_path, LAYOUT, [weight])
    check(tmp_path, encoded, [weight])
    assert strategy(made) == wanted
    assert encoded["m.weight"].stored["m.weight_zero_point"].dtype == (np.int32 if wanted == "group" else np.int8)


@pytest.mark.parametrize(
    ("shape", "blocks", "wanted"),
    [
        ((4, 32), (4, 32), "tensor"),
        ((4, 32), (9, 99), "tensor"),
        ((4, 32), (1, 32), "channel"),
        ((4, 32), (1, 16), "group"),
        ((4, 30), (1, 16), "block"),  # the library refuses groups that do not divide
        ((4, 32), (2, 16), "block"),
        ((4, 32), (4, 1), "block"),
    ],
)
def test_the_strategy_is_that_of_the_blocks(tmp_path, shape, blocks, wanted):
    _, made = write(tmp_path, LAYOUT, [integers(random(), "m.weight", CODES[3], shape, blocks, zero_points="codes")])
    assert strategy(made) == wanted


def test_offsets_that_are_multiples_of_scales_become_zero_points(tmp_path):
    weight = integers(random(), "m.weight", CODES[3], (4, 32), (1, 16), scale=FLOATS[2])
    scale = Tensor.from_array("scale", 2.0 ** random().integers(-8, 0, (4, 2)).astype(np.float32))
    offset = Tensor.from_array("offset", scale.numpy() * random().integers(-15, 1, (4, 2)).astype(np.float32))
    weight = changed(weight, scale=scale, offset=offset)
    encoded, _ = write(tmp_path, LAYOUT, [weight])
    check(tmp_path, encoded, [weight])
    assert not encoded["m.weight"].losses
    assert encoded["m.weight"].weight.quantization.offset is None


def test_nothing_of_the_codes_is_read_until_it_is_asked_for():
    def unread(start, stop):
        raise AssertionError(f"bytes {start} to {stop} are read")

    for weight in (*small_floats(), *all_integers()):
        unreadable = replace(weight, data=Computed(weight.data.nbytes, unread))
        configuration({weight.name: encode(unreadable)}, ["lm_head.weight"])


def float4(shape, scale, size):
    return random_weights.float4(random(), "m.weight", shape, scale, size)


WHOLE = integers(random(), "m.weight", CODES[4], (2, 4), (2, 4))
QUANTIZED = integers(random(), "m.weight", CODES[3], (4, 32), (1, 16), zero_points="codes")


def changed(weight=QUANTIZED, **parameters):
    return replace(weight, quantization=replace(weight.quantization, **parameters))


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (replace(QUANTIZED, quantization=None), "(4, 32)"),
        (integers(random(), "m.weight", CODES[3], (2, 4, 32), (1, 1, 16)), "(2, 4, 32)"),
        (integers(random(), "m.weight", CODES[3], (0, 32), (1, 16)), "(0, 32)"),
        (replace(QUANTIZED, name="m.other"), "<module>.weight"),
        (replace(QUANTIZED, name="weight"), "<module>.weight"),
        (changed(offset=Tensor.from_array("o", np.full((4, 2), 1.7, np.float32))), "offsets"),
        (changed(small_floats()[0], offset=small_floats()[0].quantization.scale), "offsets"),
        (changed(codebook=Tensor.from_array("codebook", np.ones(16, np.float32))), "codebook"),
        (changed(group_index=GroupIndex(1, Tensor.from_array("i", np.zeros(32, np.int32)))), "group index"),
        (changed(zero_point=Tensor.from_array("z", np.full((4, 2), 7.5, np.float32))), "7.5"),
        (changed(zero_point=Tensor.from_array("z", np.full((4, 2), 300, np.int16))), "292"),
        (replace(WHOLE, dtype=np.dtype(np.int16), data=InMemory(np.zeros(16, np.uint8))), "int16"),
        (replace(small_floats()[0], dtype=np.dtype(ml_dtypes.float8_e5m2)), "float8_e5m2"),
        (changed(small_floats()[0], zero_point=Tensor.from_array("z", np.ones((1, 1), np.int8))), "zero points"),
        (changed(small_floats()[-1], zero_point=Tensor.from_array("z", np.ones((6, 6), np.int8))), "zero points"),
        (changed(small_floats()[-1], factor=0.5), "factor"),
        (float4((2, 16), random_weights.float8_scales(random(), (2, 1), 0.0), 16), "0.0"),
        (float4((2, 32), random_weights.exponents(random(), (2, 2)), 16), "(1, 16)"),
        (float4((2, 48), random_weights.exponents(random(), (2, 2)), 32), "(1, 32)"),
        (float4((2, 32), random_weights.float8_scales(random(), (2, 1), 1.0), 32), "(1, 32)"),
    ],
)  # fmt: skip
def test_what_there_is_no_place_for_is_refused(weight, word):
    with pytest.raises(Unsupported) as caught:
        encode(weight)
    assert word in str(caught.value)
    assert weight.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_second_level_scales_are_refused():
    scale = random_weights.float8_scales(random(), (4, 2), None)
    outer = Quantization(Tensor.from_array("scale", np.ones((2, 1), np.float32)), (2, 2))
    weight = random_weights.float4(random(), "m.weight", (4, 32), replace(scale, quantization=outer), 16)
    with pytest.raises(Unsupported, match="one number"):
        encode(weight)


def test_the_most_common_kind_is_for_linear_and_the_others_for_names(tmp_path):
    source = random()
    common = [integers(source, f"h.{n}.weight", CODES[3], (6, 4), (1, 4)) for n in range(3)]
    others = [integers(source, f"{name}.weight", CODES[5], (6, 4), (1, 4)) for name in ("lm_head", "h.head")]
    embedding = integers(source, "wte.weight", CODES[3], (6, 4), (1, 4))
    plain = {"h.0.bias": np.ones(6, np.float32), "h.norm.weight": np.ones(4, np.float32)}
    encoded, made = write(tmp_path, LAYOUT, [*others, *common, embedding], plain)
    told = made.entries["quantization_config"]
    assert [group["targets"] for group in told["config_groups"].values()] == [["Linear", "wte"], ["lm_head", "h.head"]]
    assert [group["weights"]["num_bits"] for group in told["config_groups"].values()] == [4, 8]
    assert told["ignore"] == ["h.norm"]
    assert told["format"] == "pack-quantized"
    # 4 columns are one word whether codes have 4 or 8 bits: the configuration alone tells
    model = check(tmp_path, encoded, [*others, *common, embedding])
    assert set(model) == set(encoded) | set(plain)


def test_the_head_is_ignored_where_it_may_be_the_embedding():
    encoded = {"m.weight": encode(replace(QUANTIZED, name="m.weight"))}
    assert configuration(encoded, ["wte.weight"]).entries["quantization_config"]["ignore"] == ["wte", "lm_head"]


def test_kinds_of_several_layouts_are_of_mixed_precision(tmp_path):
    weights = [*small_floats(), *all_integers()]
    encoded, made = write(tmp_path, LAYOUT, weights, shards=3)
    assert made.entries["quantization_config"]["format"] == "mixed-precision"
    check(tmp_path, encoded, weights)


def test_notes_say_what_transformers_must_be_told():
    assert configuration({}, ["m.weight"]).entries == {}
    symmetric = encode(integers(random(), "m.weight", CODES[2], (4, 32), (1, 16), scale=BFLOAT16))
    assert len(configuration({"m.weight": symmetric}, ()).notes) == 1
    assert "dtype=bfloat16" in configuration({"m.weight": symmetric}, ()).notes[0]
    both = {"m.weight": symmetric, "embed_tokens.weight": encode(replace(QUANTIZED, name="embed_tokens.weight"))}
    words = ("bfloat16 and float32", "packed zero points", "embeddings", "first group")
    for note, word in zip(configuration(both, ()).notes, words, strict=True):
        assert word in note


def library_values(folder: Path) -> dict[str, np.ndarray]:
    """What the library decompresses, as float32, by the name of the weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = list(QuantizationConfig.model_validate(told).config_groups.values())
    values = {}
    for module in {key.rpartition(".")[0] for key in state}:
        scheme = next((group for group in groups if module in group.targets), groups[0])
        own = {key.removeprefix(f"{module}."): value for key, value in state.items() if key.startswith(f"{module}.")}
        decompressed = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)
        values[f"{module}.weight"] = decompressed["weight"].float().numpy()
    return values


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_library_decompresses_the_same_values(tmp_path):
    weights = [*small_floats(), *all_integers()]
    encoded, _ = write(tmp_path, LAYOUT, weights)
    values = library_values(tmp_path)
    assert values.keys() == encoded.keys()
    for name, one in encoded.items():
        ours = one.weight.dequantize(own_dtype(one.weight)).astype(np.float32)
        np.testing.assert_array_equal(values[name].view(np.uint32), ours.view(np.uint32), name)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_library_writes_the_same_bytes(tmp_path):
    from compressed_tensors.compressors import pack_to_int32
    from torch import from_numpy

    for weight in all_integers():
        encoded = encode(weight)
        codes = encoded.weight.codes().astype(np.int8)
        packed = pack_to_int32(from_numpy(codes), weight.bits)
        module = weight.name.removesuffix(".weight")
        np.testing.assert_array_equal(encoded.stored[f"{module}.weight_packed"].numpy(), packed.numpy())
        zero_point = encoded.stored.get(f"{module}.weight_zero_point")
        if zero_point is not None and zero_point.dtype == np.int32:
            zeros = encoded.weight.quantization.zero_point.codes().astype(np.int8)
            packed = pack_to_int32(from_numpy(zeros), weight.bits, packed_dim=0)
            np.testing.assert_array_equal(zero_point.numpy(), packed.numpy())


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_configuration_is_what_the_library_writes(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    _, made = write(tmp_path, LAYOUT, [*small_floats(), *all_integers()])
    told = made.entries["quantization_config"]
    written = json.loads(QuantizationConfig.model_validate(told).model_dump_json())
    assert {key: written[key] for key in told if key != "version"} == {
        key: value for key, value in told.items() if key != "version"
    }


#: What transformers 5.23 does not load compressed, and the words of the note that says so.
ONLY_DECOMPRESSED = {"asymmetric": "packed zero points", "embeddings": "quantized embeddings"}


def kinds(name: str, shape: tuple[int, int], kind: str, dtype: np.dtype) -> Tensor:
    """A weight of a tiny model."""
    source = np.random.default_rng(sum(name.encode()))
    if kind == "mxfp4":
        return random_weights.float4(source, name, shape, small_exponents(source, (shape[0], shape[1] // 32)), 32)
    if kind == "nvfp4":
        scale = random_weights.float8_scales(source, (shape[0], shape[1] // 16), 2.0**-16)
        return random_weights.float4(source, name, shape, scale, 16)
    bits = "int8" if kind == "int8" or (kind == "several" and "down" in name) else "int4"
    if kind == "float8":
        scales = Tensor.from_array("scale", (source.random((shape[0], 1)) * 2.0**-10).astype(dtype))
        codes = random_weights.float8(source, shape)
        return Tensor.from_array(name, codes, Quantization(scales, (1, shape[1]), compute_dtype=dtype))
    codes, zero_points = ("uint4", "codes") if kind == "asymmetric" else (bits, "none")
    weight = integers(
        source, name, np.dtype(getattr(ml_dtypes, codes, np.int8)), shape, (1, 32), zero_points=zero_points, scale=dtype
    )
    scales = (weight.quantization.scale.numpy().astype(np.float32) / 2**weight.bits).astype(dtype)
    return changed(weight, scale=Tensor.from_array("scale", scales))


def small_exponents(source: np.random.Generator, grid: tuple[int, int]) -> Tensor:
    return Tensor.from_array("scale", source.integers(118, 123, grid).astype(np.uint8).view(FLOAT8_E8M0))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "shards"),
    [
        ("int4", FLOATS[2], 1),
        ("int8", FLOATS[0], 2),
        ("asymmetric", BFLOAT16, 1),
        ("embeddings", FLOATS[2], 1),
        ("several", FLOATS[2], 1),
        ("float8", BFLOAT16, 1),
        ("mxfp4", BFLOAT16, 3),
        ("nvfp4", BFLOAT16, 1),
    ],
)
def test_transformers_computes_the_same_logits(tmp_path, kind, dtype, shards, dequantize):
    """With the weights compressed, and decompressed at once. What it cannot do is what the notes say."""
    from transformers import CompressedTensorsConfig

    tiny = TinyLlama(dtype, tied=kind == "int8")
    of_kind = partial(kinds, kind=kind, dtype=dtype)
    made = tiny.write(tmp_path, LAYOUT, of_kind, shards, embeddings=kind == "embeddings")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=dequantize)}
    if kind in ONLY_DECOMPRESSED and not dequantize:
        assert any(ONLY_DECOMPRESSED[kind] in note for note in made.notes)
        with pytest.raises((RuntimeError, AttributeError)):
            tiny.logits(tmp_path / "encoded", **options)
        return
    is_same = np.array_equal(tiny.logits(tmp_path / "encoded", **options), tiny.logits(tmp_path / "float"))
    assert is_same == (kind != "several" or not dequantize)
    assert any("first group" in note for note in made.notes) == (kind == "several")
