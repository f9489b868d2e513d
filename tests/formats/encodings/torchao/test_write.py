"""What is written as torchao's tensors is read again, by us and by torchao."""

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
from nibblecast.converters.arithmetic.dtypes import FLOAT8_E8M0
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor, per_axis
from nibblecast.converters.storage import Computed, InMemory
from nibblecast.formats.encodings.bytes.widths import widened
from nibblecast.formats.encodings.torchao.write import configuration, encode
from tests.formats.encodings import random_weights
from tests.formats.encodings.random_weights import CODES, FLOATS, integers, matrices
from tests.formats.encodings.tiny_llama import TinyLlama
from tests.formats.encodings.written import check, write

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[4] / "fixtures"
SOURCES = sorted(
    [folder for folder in (FIXTURES / "checkpoints").iterdir() if folder.is_dir()]
    + list((FIXTURES / "torchao").glob("*.safetensors"))
)
LAYOUT = "torchao"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BY_NAME = {dtype.name: dtype for dtype in FLOATS}
PLAIN = {"h.norm.weight": np.ones(4, np.float32), "logit_scale": np.ones(1, np.float32)}


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def float4(shape, scale, size, name="m.weight", compute=FLOATS[2]):
    return random_weights.float4(random(), name, shape, scale, size, compute)


def small_floats() -> list[Tensor]:
    """MXTensors and NVFP4Tensors, of matrices and of experts."""
    source = random()
    mx = Quantization(random_weights.exponents(source, (6, 3)), (1, 32))
    weights = [
        Tensor.from_array("mxfp8.e4m3.weight", random_weights.float8(source, (6, 96)), mx),
        Tensor(
            "mxfp8.e5m2.weight",
            (6, 96),
            np.dtype(ml_dtypes.float8_e5m2),
            InMemory(np.arange(576).astype(np.uint8) % 64),
            mx,
        ),
    ]
    for compute in FLOATS:
        scale = random_weights.exponents(source, (6, 3))
        weights.append(float4((6, 96), scale, 32, f"mxfp4.{compute.name}.weight", compute))
    weights.append(float4((2, 6, 64), random_weights.exponents(source, (2, 6, 2)), 32, "mxfp4.experts.up"))
    for number, outer in enumerate((None, 0.25, 0.0123, 1.7e-5)):
        scale = random_weights.float8_scales(source, (6, 6), outer)
        weights.append(float4((6, 96), scale, 16, f"nvfp4.m{number}.weight"))
    experts = random_weights.float8_scales(source, (3, 6, 2), None)
    outer = Quantization(Tensor.from_array("scale", source.random((3, 1, 1)).astype(np.float32)), (1, 6, 2))
    weights.append(float4((3, 6, 32), replace(experts, quantization=outer), 16, "nvfp4.experts.up"))
    return weights


def all_integers() -> list[Tensor]:
    source = random()
    cases = (((5, 13), (5, 13)), ((5, 13), (1, 13)), ((9, 64), (1, 32)), ((9, 48), (1, 32)), ((20, 40), (4, 16)))
    return [
        integers(
            source,
            f"int.m{n}_{d}_{z}.weight",
            dtype,
            shape,
            blocks,
            zero_points=z,
            scale=FLOATS[(n + d) % 3],
            compute=FLOATS[n % 3],
        )
        for d, dtype in enumerate(CODES)
        for n, (shape, blocks) in enumerate((*cases, ((4, 3, 2, 8), (1, 3, 2, 8)), ((2, 3, 32), (1, 1, 16))))
        for z in ("none", "codes", "highest")
    ] + [with_float_zero_points(dtype, f"float_zeros.{dtype.name}.weight") for dtype in CODES[:5]]


def with_float_zero_points(dtype: np.dtype, name: str) -> Tensor:
    weight = integers(random(), name, dtype, (6, 64), (1, 16), scale=FLOATS[0])
    zeros = (random().random((6, 4)) * 15).astype(np.float16)
    return replace(weight, quantization=replace(weight.quantization, zero_point=Tensor.from_array("z", zeros)))


@settings(max_examples=60)
@given(weight=matrices())
@example(weight=integers(random(), "a.b.weight", CODES[3], (3, 33), (3, 33), zero_points="highest"))
def test_integers_are_read_as_they_were(tmp_path, weight):
    blocks = zip(weight.quantization.block_shape, weight.shape, strict=True)
    if any(block < size and size % block for block, size in blocks):
        try:
            encode(weight)
        except Unsupported as error:
            assert "do not divide" in str(error)
            return
    encoded, _ = write(tmp_path, LAYOUT, [weight], PLAIN)
    check(tmp_path, encoded, [weight])
    assert not encoded["a.b.weight"].losses


def test_weights_of_every_kind_are_read_as_they_were(tmp_path):
    weights = [*small_floats(), *all_integers()]
    encoded, _ = write(tmp_path, LAYOUT, weights, PLAIN)
    model = check(tmp_path, encoded, weights)
    assert set(model) == set(encoded) | set(PLAIN)
    losses = {name: [loss.kind for loss in one.losses] for name, one in encoded.items() if one.losses}
    assert losses == {"mxfp4.float16.weight": ["rounded"]}
    for name in ("mxfp4.float32.weight", "mxfp4.bfloat16.weight"):
        assert encoded[name].weight.quantization.value_dtype == BFLOAT16


def test_the_files_of_a_model_all_have_its_metadata(tmp_path):
    weights = [*small_floats(), *all_integers()]
    encoded, made = write(tmp_path, LAYOUT, weights, PLAIN, shards=3)
    check(tmp_path, encoded, weights)
    names = json.loads(made.metadata["tensor_names"])
    assert names == [*encoded, "h.norm.weight"]  # torchao cannot take a name without a dot
    assert {"format": "pt"}.items() <= made.metadata.items()


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


def test_scales_of_float64_are_computed_with_as_float32(tmp_path):
    weight = integers(random(), "m.weight", CODES[2], (4, 32), (1, 16))
    scale = Tensor.from_array("scale", random().random((4, 2)))
    weight = replace(weight, quantization=replace(weight.quantization, scale=scale, compute_dtype=scale.dtype))
    encoded, _ = write(tmp_path, LAYOUT, [weight])
    check(tmp_path, encoded, [weight])
    assert [loss.kind for loss in encoded["m.weight"].losses] == ["rounded", "rounded"]


def test_blocks_that_do_not_divide_the_shape_are_made_smaller(tmp_path):
    weight = integers(random(), "m.weight", CODES[3], (3, 48), (1, 32), zero_points="codes")
    encoded, _ = write(tmp_path, LAYOUT, [weight])
    check(tmp_path, encoded, [weight])
    assert encoded["m.weight"].weight.quantization.block_shape == (1, 16)


@pytest.mark.parametrize(
    ("codes", "wide"),
    [*((codes, CODES[4]) for codes in CODES[:4]), (CODES[0], CODES[2]), (CODES[1], CODES[2])],
    ids=str,
)
def test_any_range_of_widened_codes_is_part_of_the_whole(codes, wide):
    weight = integers(random(), "m.weight", codes, (3, 7), (3, 7))
    data = widened(weight, wide)
    whole = Tensor("m", weight.shape, wide, data)
    np.testing.assert_array_equal(whole.codes(), weight.codes())
    for start in range(data.nbytes):
        for stop in range(start, data.nbytes + 1):
            np.testing.assert_array_equal(data.read(start, stop), whole.packed()[start:stop])


QUANTIZED = integers(random(), "m.weight", CODES[3], (4, 32), (1, 16), zero_points="codes")

UINT8 = integers(random(), "m.weight", CODES[5], (4, 32), (1, 16))


def changed(weight=QUANTIZED, **parameters):
    return replace(weight, quantization=replace(weight.quantization, **parameters))


def zeros(value, dtype):
    return Tensor.from_array("z", np.full((4, 2), value, dtype))


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (replace(QUANTIZED, quantization=None), "(4, 32)"),
        (integers(random(), "m.weight", CODES[3], (0, 32), (1, 16)), "(0, 32)"),
        (replace(QUANTIZED, name="weight"), "<module>.weight"),
        (changed(offset=Tensor.from_array("o", np.full((4, 2), 1.7, np.float32))), "offsets"),
        (changed(small_floats()[0], offset=Tensor.from_array("o", np.ones((6, 3), np.float32))), "(1, 32)"),
        (changed(codebook=Tensor.from_array("codebook", np.ones(16, np.float32))), "codebook"),
        (changed(group_index=GroupIndex(1, Tensor.from_array("i", np.zeros(32, np.int32)))), "group index"),
        (changed(zero_point=zeros(300, np.int16)), "292"),
        (changed(zero_point=zeros(7.3, np.float32), compute_dtype=FLOATS[0]), "float16"),
        (changed(UINT8, zero_point=zeros(7.5, FLOATS[0])), "uint8"),
        (integers(random(), "m.weight", CODES[3], (3, 33), (1, 32)), "(1, 32)"),
        (replace(UINT8, dtype=np.dtype(np.uint16), data=InMemory(np.zeros(256, np.uint8))), "uint16"),
        (float4((2, 16), random_weights.exponents(random(), (2, 1)), 16), "(1, 16)"),
        (float4((2, 48), random_weights.exponents(random(), (2, 2)), 32), "(1, 32)"),
        (float4((2, 32), random_weights.float8_scales(random(), (2, 1), 1.0), 32), "(1, 32)"),
        (changed(small_floats()[-2], zero_point=Tensor.from_array("z", np.ones((6, 6), np.int8))), "float8_e4m3fn"),
        (changed(small_floats()[0], factor=0.5), "float8_e8m0fnu"),
    ],
)  # fmt: skip
def test_what_there_is_no_place_for_is_refused(weight, word):
    with pytest.raises(Unsupported) as caught:
        encode(weight)
    assert word in str(caught.value)
    assert weight.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 32), (4, 4, 32)])
def test_several_second_level_scales_are_only_for_experts(shape):
    grid = (*shape[:-1], 2)
    nested = Quantization(
        Tensor.from_array("scale", np.ones((4, *(1,) * (len(grid) - 1)), np.float32)), per_axis(grid, 0)
    )
    weight = float4(shape, replace(random_weights.float8_scales(random(), grid, None), quantization=nested), 16)
    if len(shape) == 3:
        assert encode(weight).stored["m._weight_per_tensor_scale"].shape == (4, 1, 1)
        return
    with pytest.raises(Unsupported, match="one number"):
        encode(weight)


def test_notes_say_which_dtype_to_load_with():
    assert configuration({}, ["m.weight"]).metadata == {"format": "pt"}
    weights = {name: encode(replace(small_floats()[3], name=name)) for name in ("a.weight", "b.weight")}
    notes = configuration(weights, ()).notes
    assert ["to bfloat16:" in notes[0], "float8" in notes[1], len(notes)] == [True, True, 2]
    (note,) = configuration({"m.weight": encode(QUANTIZED)}, ()).notes
    assert "to float32:" in note


def torchao_tensors(folder: Path):
    """What torchao makes of the file, and the file's tensors and metadata."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors, left = unflatten_tensor_state_dict(state, metadata)
    return tensors, left, state, metadata


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_torchao_dequantizes_the_same_values(tmp_path):
    weights = [*small_floats(), *all_integers()]
    encoded, _ = write(tmp_path, LAYOUT, weights, PLAIN)
    tensors, left, _, _ = torchao_tensors(tmp_path)
    assert list(left) == ["logit_scale"]
    for name, one in encoded.items():
        shown = str(tensors[name].dtype).removeprefix("torch.")
        theirs = tensors[name].dequantize().float().numpy()
        ours = one.weight.dequantize(BY_NAME[shown]).astype(np.float32)
        np.testing.assert_array_equal(theirs.view(np.uint32), ours.view(np.uint32), name)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_torchao_writes_the_same_metadata(tmp_path):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    write(tmp_path, LAYOUT, [*small_floats(), *all_integers()], {"h.norm.weight": PLAIN["h.norm.weight"]})
    tensors, left, state, metadata = torchao_tensors(tmp_path)
    assert not left
    flat, written = flatten_tensor_state_dict(tensors)
    assert written | {"format": "pt"} == metadata
    assert flat.keys() == state.keys()
    assert all(flat[key].dtype == state[key].dtype and flat[key].shape == state[key].shape for key in state)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_configuration_is_what_torchao_writes(tmp_path):
    from torchao.core.config import config_from_dict, config_to_dict
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig

    several = {weight.name: encode(weight) for weight in (*small_floats(), *all_integers())}
    told = configuration(several, ()).entries["quantization_config"]["quant_type"]["default"]
    found = config_from_dict(told)
    assert isinstance(found, FqnToConfig)
    written = config_to_dict(found)["_data"]
    assert written["fqn_to_config"] == told["_data"]["fqn_to_config"]
    one = configuration({"m.weight": encode(QUANTIZED)}, ()).entries["quantization_config"]["quant_type"]["default"]
    assert isinstance(config_from_dict(one), IntxWeightOnlyConfig)
    assert config_to_dict(config_from_dict(one)) == one


def kinds(name: str, shape: tuple[int, int], kind: str, dtype: np.dtype) -> Tensor:
    """A weight of a tiny model."""
    source = np.random.default_rng(sum(name.encode()))
    rows, columns = shape
    if kind == "mxfp4":
        scale = source.integers(118, 123, (rows, columns // 32)).astype(np.uint8).view(FLOAT8_E8M0)
        return random_weights.float4(source, name, shape, Tensor.from_array("scale", scale), 32)
    if kind == "nvfp4":
        scale = random_weights.float8_scales(source, (rows, columns // 16), 1.3e-5)
        return random_weights.float4(source, name, shape, scale, 16)
    codes = CODES[{"asymmetric": 3, "int8": 4, "several": 4 if "down" in name else 2}.get(kind, 2)]
    zero_points = "codes" if kind == "asymmetric" else "none"
    weight = integers(source, name, codes, shape, (1, 32), zero_points=zero_points, scale=dtype)
    scales = (weight.quantization.scale.numpy().astype(np.float32) / 2**weight.bits).astype(dtype)
    return changed(weight, scale=Tensor.from_array("scale", scales))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dtype", "shards"),
    [
        ("int4", FLOATS[2], 1),
        ("int8", FLOATS[0], 2),
        ("asymmetric", BFLOAT16, 3),
        ("several", FLOATS[2], 1),
        ("embeddings", FLOATS[2], 1),
        ("mxfp4", BFLOAT16, 1),
        ("nvfp4", FLOATS[2], 2),
    ],
)
def test_transformers_computes_the_same_logits(tmp_path, kind, dtype, shards):
    """To the bit, but for activations that torchao rounds to float8 where weights are MXTensors."""
    tiny = TinyLlama(dtype, tied=kind == "int8")
    tiny.write(tmp_path, LAYOUT, partial(kinds, kind=kind, dtype=dtype), shards, embeddings=kind == "embeddings")
    theirs, ours = tiny.logits(tmp_path / "encoded"), tiny.logits(tmp_path / "float")
    if kind == "mxfp4":
        assert 0 < np.abs(theirs - ours).max() < 0.1 * np.abs(ours).max()
        return
    np.testing.assert_array_equal(theirs, ours)
