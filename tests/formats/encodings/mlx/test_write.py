from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.compare.comparison import compare_tensors
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import GroupIndex, Quantization, Tensor
from nibblecast.converters.storage import Computed
from nibblecast.formats.encodings.mlx.write import configuration, encode
from nibblecast.formats.encodings.writable import WRITABLE, writable_encoding
from tests.formats.encodings.checkpoints import FIXTURES, write_file, write_folder
from tests.formats.encodings.mlx.mlx_weights import (
    BFLOAT16,
    E4M3,
    FLOAT4,
    FLOAT16,
    FLOAT32,
    FLOAT_MODES,
    FLOATS,
    OF_NONE,
    SOURCES,
    fixture_weights,
    quantized,
)


def written(folder, *encoded):
    """A folder of what was encoded, and a bias that is not."""
    stored = {key: tensor.numpy() for each in encoded for key, tensor in each.stored.items()}
    told = configuration({each.weight.name: each for each in encoded}, ["m.bias"])
    write_folder(folder, {}, config={"hidden_size": 64, **told.entries})
    write_file(folder / "model.safetensors", {**stored, "m.bias": np.zeros(3, np.float16)}, told.metadata)
    return folder


def is_read_back(folder, *encoded):
    """Reading gives what encoding said that it would."""
    model = nibblecast.load(written(folder, *encoded))
    assert set(model) == {*(each.weight.name for each in encoded), "m.bias"}
    for each in encoded:
        got, wanted = model[each.weight.name], each.weight
        assert compare_tensors(got, wanted) == []
        assert (got.dtype, got.shape, got.quantization.block_shape) == (
            wanted.dtype,
            wanted.shape,
            wanted.quantization.block_shape,
        )
        assert got.quantization.compute_dtype == wanted.quantization.compute_dtype
        assert got.quantization.value_dtype == wanted.quantization.value_dtype
        np.testing.assert_array_equal(got.dequantize(), wanted.dequantize())
    return model


def own_values(tensor, dtype):
    return tensor.dequantize(dtype).astype(np.float32)


def is_faithful(source, encoded):
    """The codes are those of the source, and values too, or else there is a loss that says how far they change."""
    got, quantization = encoded.weight, source.quantization
    shift = 0 if got.dtype == source.dtype else 1 << source.bits - 1
    np.testing.assert_array_equal(got.codes().astype(int), source.codes().astype(int) + shift)
    if not encoded.losses:
        np.testing.assert_array_equal(got.dequantize(), source.dequantize())
        return
    (loss,) = encoded.losses
    assert (loss.tensor, loss.kind) == (source.name, "rounded")
    own = quantization.value_dtype or quantization.compute_dtype
    own = own if own in FLOATS.values() else FLOAT32
    difference = np.abs(own_values(got, own) - own_values(source, own)).max()
    assert f"as {own} they" in loss.detail
    if "they stay" in loss.detail:
        assert difference == 0
    else:
        told = float(loss.detail.partition("at most ")[2].split()[0])
        assert difference <= told * 1.05  # two digits are told
        assert told > 0


@st.composite
def affine_weights(draw):
    dtype = draw(st.sampled_from([ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8]))
    rows, columns = draw(st.integers(1, 5)), 32 * draw(st.integers(1, 7))
    shape = (*draw(st.sampled_from([(), (2,)])), rows, columns)
    block = draw(st.sampled_from([32, 64, 96, 128, 160, columns, 1000]))
    above = draw(st.sampled_from([tuple(1 for _ in shape[:-1]), shape[:-1]]))
    kind = draw(st.sampled_from(["none", "zero point", "offset", "both"]))
    scale, compute = draw(
        st.sampled_from(
            [
                *((dtype, dtype) for dtype in (FLOAT32, FLOAT16, BFLOAT16, np.dtype(np.float64))),
                *((FLOAT16, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT16)),
            ]
        )
    )
    value = draw(st.sampled_from([None, FLOAT16, BFLOAT16])) if compute == FLOAT32 else None
    return quantized(
        shape,
        dtype,
        (*above, block),
        scale=scale,
        zero_point=draw(st.sampled_from([ml_dtypes.uint4, np.int8, np.int32]))
        if kind in ("zero point", "both")
        else None,
        offset=scale if kind in ("offset", "both") else None,
        seed=draw(st.integers(0, 99)),
        compute_dtype=compute,
        value_dtype=value,
        factor=draw(st.sampled_from([1.0, 1.0, 0.3])),
    )


@settings(max_examples=150)
@given(affine_weights())
def test_integer_codes_move(tmp_path_factory, weight):
    encoded = encode(weight)
    is_faithful(weight, encoded)
    is_read_back(tmp_path_factory.mktemp("mlx"), encoded)
    assert encoded.weight.quantization.zero_point is None
    assert encoded.setting.size in (32, 64, 128)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        ({"scale": FLOAT16}, FLOAT32),  # GGUF's Q4_0, Q8_0
        ({"scale": BFLOAT16, "zero_point": np.int8}, FLOAT32),
        ({"scale": FLOAT16, "offset": FLOAT16}, FLOAT32),  # Q4_1
        ({"scale": FLOAT16, "offset": FLOAT16, "compute_dtype": FLOAT16}, FLOAT16),  # optimum-quanto's shifts
        ({"scale": BFLOAT16, "offset": BFLOAT16, "compute_dtype": BFLOAT16}, BFLOAT16),  # MLX's own
        ({"scale": FLOAT32, "offset": FLOAT32}, FLOAT32),
    ],
)
@pytest.mark.parametrize("codes", [ml_dtypes.int4, ml_dtypes.uint4, np.int8])
def test_what_mlx_computes_alike_has_no_loss(source, dtype, codes):
    if "offset" in source and codes != ml_dtypes.uint4:
        return
    weight = quantized((5, 64), codes, **source)
    encoded = encode(weight)
    assert encoded.losses == ()
    assert {part.dtype for key, part in encoded.stored.items() if key != "m.weight"} == {dtype}
    np.testing.assert_array_equal(encoded.weight.dequantize(), weight.dequantize())


def test_scales_are_of_the_dtype_of_the_values():
    weight = quantized((5, 64), ml_dtypes.uint4, scale=FLOAT16, zero_point=ml_dtypes.uint4, value_dtype=FLOAT16)
    encoded = encode(weight)  # GPTQ
    assert encoded.stored["m.biases"].dtype == FLOAT16
    assert "change by" in encoded.losses[0].detail
    scale, zero = (
        part.numpy().astype(np.float32) for part in (weight.quantization.scale, weight.quantization.zero_point)
    )
    np.testing.assert_array_equal(encoded.stored["m.biases"].numpy(), (-scale * zero).astype(np.float16))
    whole = quantized((5, 64), ml_dtypes.uint4, scale=np.full((5, 2), 0.5, np.float16), value_dtype=FLOAT16)
    assert encode(whole).losses == ()  # powers of two round nowhere
    zeros = Tensor.from_array("zero_point", np.zeros((5, 2), np.int8))  # one rounding, as the source's own
    encoded = encode(replace(weight, quantization=replace(weight.quantization, zero_point=zeros)))
    assert encoded.losses[0].detail.endswith("as float16 they stay")


def test_zero_points_between_integers_become_biases():
    scale, zero = np.full((2, 1), 0.25, np.float16), np.array([[7.5], [-0.25]], np.float16)
    weight = quantized((2, 32), ml_dtypes.uint4, scale=scale, compute_dtype=FLOAT16)
    quantization = replace(weight.quantization, zero_point=Tensor.from_array("zero_point", zero))
    encoded = encode(replace(weight, quantization=quantization))  # HQQ
    np.testing.assert_array_equal(encoded.stored["m.biases"].numpy(), -scale * zero)
    is_faithful(replace(weight, quantization=quantization), encoded)


def test_scales_that_are_no_numbers_stay_so():
    scale = np.array([[np.inf], [-np.inf], [np.nan], [1]], np.float16)
    weight = quantized((4, 32), ml_dtypes.uint4, scale=scale, zero_point=np.int8)
    zeros = Tensor.from_array("zero_point", np.array([[0], [20], [3], [4]], np.int8))
    weight = replace(weight, quantization=replace(weight.quantization, zero_point=zeros))
    with pytest.raises(Unsupported, match="beyond"):  # infinity less infinity
        encode(weight)
    unshifted = replace(weight, quantization=replace(weight.quantization, zero_point=None))
    np.testing.assert_array_equal(encode(unshifted).weight.dequantize(), unshifted.dequantize())


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.uint8, FLOAT4])
def test_codes_are_not_read_for_it(dtype):
    weight = quantized((4, 64), dtype, scale=np.ones((4, 2), np.float16))

    def compute(start, stop):
        raise AssertionError("codes were read")

    encoded = encode(replace(weight, data=Computed(weight.nbytes, compute)))
    assert encoded.weight.quantization.scale.dequantize().max() == 1
    with pytest.raises(AssertionError, match="were read"):
        encoded.stored["m.weight"].packed()


@settings(max_examples=80)
@given(
    mode=st.sampled_from(list(FLOAT_MODES)),
    columns=st.integers(1, 6),
    groups=st.sampled_from([1, 2, 100]),
    scale_dtype=st.sampled_from(["own", "float32", "nested"]),
    value_dtype=st.sampled_from([None, BFLOAT16]),
    factor=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_small_floats_move(tmp_path_factory, mode, columns, groups, scale_dtype, value_dtype, factor, seed):
    dtype, own, size = FLOAT_MODES[mode]
    random = np.random.default_rng(seed)
    shape, block_shape = (2, 3, columns * size), (1, 1, groups * size)
    grid = (2, 3, -(-columns // groups))
    scale = random.integers(0x30, 0x60, grid).astype(np.uint8).view(own)  # with room for the factor and a second scale
    weight = quantized(shape, dtype, block_shape, scale=scale, seed=seed, factor=factor, value_dtype=value_dtype)
    quantization = weight.quantization
    if scale_dtype == "float32":
        quantization = replace(quantization, scale=Tensor.from_array("scale", scale.astype(np.float32)))
    elif scale_dtype == "nested":  # a second scale that is a power of two
        outer = Quantization(Tensor.from_array("scale", np.full((1, 1, 1), 2, np.float32)), grid)
        quantization = replace(quantization, scale=replace(quantization.scale, quantization=outer))
    weight = replace(weight, quantization=quantization)
    encoded = encode(weight)
    assert encoded.losses == ()
    assert encoded.setting.entries() == {"group_size": size, "bits": weight.bits, "mode": mode}
    assert encoded.stored["m.scales"].dtype == np.uint8
    np.testing.assert_array_equal(encoded.weight.codes().view(np.uint8), weight.codes().view(np.uint8))
    np.testing.assert_array_equal(encoded.weight.dequantize(), weight.dequantize())
    is_read_back(tmp_path_factory.mktemp("mlx"), encoded)


def indexed():
    weight = quantized((4, 64), ml_dtypes.uint4)
    index = Tensor.from_array("group_index", np.arange(64, dtype=np.int32) % 2)
    return replace(weight, quantization=replace(weight.quantization, group_index=GroupIndex(1, index)))


def looked_up():
    weight = quantized((4, 64), ml_dtypes.uint4)
    codebook = Tensor.from_array("codebook", np.arange(16, dtype=np.float32))
    return replace(weight, quantization=replace(weight.quantization, codebook=codebook))


def huge(**more):
    return quantized((1, 32), ml_dtypes.uint4, scale=np.full((1, 1), 8000, np.float16), **more)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Tensor.from_array("m.weight", np.zeros((4, 64), np.float32)), "is not quantized"),
        (replace(quantized((4, 64), np.int8), name="m.experts"), "'<module>.weight'"),
        (replace(quantized((4, 64), np.int8), name=".weight"), "'<module>.weight'"),
        (quantized((64,), np.int8, (64,)), r"\(64,\)"),
        (quantized((2, 2, 2, 64), np.int8), r"\(2, 2, 2, 64\)"),
        (quantized((0, 64), np.int8, scale=np.ones((1, 2), np.float32)), r"\(0, 64\)"),
        (quantized((4, 40), np.int8), "rows of 40 codes"),
        (quantized((4, 64), np.int8, (1, 16)), r"blocks of \(1, 16\)"),
        (quantized((4, 96), np.int8, (1, 48)), r"blocks of \(1, 48\)"),
        (quantized((4, 64), np.int8, (4, 1)), r"blocks of \(4, 1\)"),
        (quantized((4, 64), ml_dtypes.float8_e5m2), "float8_e5m2"),
        (indexed(), "group index"),
        (looked_up(), "codebook"),
        (quantized((4, 64), FLOAT4, (1, 16), scale=np.full((4, 4), 0.3, np.float32)), "no mode"),
        (
            quantized((4, 64), FLOAT4, (1, 16), scale=np.full((4, 4), 1024, np.float32)),
            "no mode",
        ),  # beyond float8_e4m3fn
        (quantized((4, 64), FLOAT4, (1, 32), scale=np.full((4, 2), np.nan, np.float32)), "no mode"),
        (quantized((4, 64), E4M3, scale=np.zeros((4, 2), np.float32)), "no mode"),  # which has no exponent
        (quantized((4, 64), E4M3, scale=np.full((4, 2), 3, np.float32)), "no mode"),
        (quantized((4, 64), FLOAT4, offset=np.float32), "an offset"),
        (quantized((4, 64), FLOAT4, zero_point=np.int8), "a zero point"),
        (huge(zero_point=np.int8, value_dtype=FLOAT16, seed=1), "beyond what float16 holds"),
    ],
)
def test_what_mlx_cannot_hold_is_refused(weight, message):
    with pytest.raises(Unsupported, match=message) as caught:
        encode(weight)
    assert caught.value.tensor == weight.name
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_weights_of_other_encodings(path, tmp_path):
    encoded = []
    for weight in fixture_weights(path):
        try:
            found = encode(weight)
        except Unsupported:
            continue
        is_faithful(weight, found)
        encoded.append(found)
    assert bool(encoded) == (path.name not in OF_NONE)
    if encoded:
        is_read_back(tmp_path, *encoded)


def test_mlx_is_written_as_it_was(tmp_path):
    source = nibblecast.load(FIXTURES / "mlx")
    weights = [tensor for tensor in source.values() if tensor.quantization is not None]
    encoded = [encode(weight) for weight in weights]
    assert len(encoded) == len(weights) == 26
    model = is_read_back(tmp_path, *encoded)
    for weight, found in zip(weights, encoded, strict=True):
        assert found.losses == ()
        assert compare_tensors(model[weight.name], weight) == []


def test_the_most_common_setting_is_the_one_of_the_model():
    weights = {}
    for number, (bits, size) in enumerate([(8, 32), (4, 64), (4, 64), (4, 128), (4, 64)]):
        dtype = ml_dtypes.uint4 if bits == 4 else np.uint8
        weight = quantized((2, 128), dtype, (1, size), scale=FLOAT16, offset=FLOAT16, compute_dtype=FLOAT16)
        weights[f"layers.{number}.weight"] = encode(replace(weight, name=f"layers.{number}.weight"))
    told = configuration(weights, ["norm.weight"])
    common = {"group_size": 64, "bits": 4, "mode": "affine"}
    others = {
        "layers.0": {"group_size": 32, "bits": 8, "mode": "affine"},
        "layers.3": {"group_size": 128, "bits": 4, "mode": "affine"},
    }
    assert told.entries == {"quantization": common | others, "quantization_config": common | others}
    assert told.metadata == {"format": "mlx"}
    assert (told.files, told.notes) == ({}, ())


def test_scales_of_float32_are_told_of():
    told = configuration({"m.weight": encode(quantized((2, 64), np.int8)), "n.weight": encode(fixture_mxfp4())}, [])
    assert told.notes == ("1 of 2 weights have scales of float32, in which MLX computes with these then",)


def fixture_mxfp4():
    return next(weight for weight in fixture_weights(FIXTURES / "mlx") if weight.name == "mxfp4.weight")


def test_a_model_without_weights_has_no_setting():
    told = configuration({}, ["norm.weight"])
    assert (told.entries, told.metadata) == ({}, {"format": "mlx"})


def test_a_module_that_is_called_as_a_setting_is_refused():
    weights = {"m.weight": encode(quantized((2, 64), np.int8)), "bits.weight": encode(fixture_mxfp4())}
    with pytest.raises(Unsupported, match="name of a setting") as caught:
        configuration(weights, [])
    assert caught.value.tensor == "bits.weight"


def test_mlx_is_a_layout():
    assert "mlx" in WRITABLE
    assert writable_encoding("mlx").encode is encode
