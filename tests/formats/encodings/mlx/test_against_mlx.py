"""What MLX makes of the tensors that are written for it."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Quantization, Tensor
from nibblecast.formats.encodings.mlx.write import configuration, encode
from tests.formats.encodings.checkpoints import write_file
from tests.formats.encodings.mlx.mlx_weights import (
    FLOAT4,
    FLOAT16,
    FLOAT_MODES,
    FLOATS,
    OF_NONE,
    SOURCES,
    fixture_weights,
    quantized,
)

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
pytestmark = pytest.mark.peers

BITS = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}


def loaded(path, *encoded, **plain):
    """What MLX loads of a file with these weights."""
    stored = {key: tensor.numpy() for each in encoded for key, tensor in each.stored.items()}
    told = configuration({each.weight.name: each for each in encoded}, list(plain))
    write_file(path / "model.safetensors", {**stored, **plain}, told.metadata)
    arrays, metadata = mx.load(str(path / "model.safetensors"), return_metadata=True)
    assert metadata["format"] == "mlx"
    return arrays, told.entries["quantization"]


def values_of_mlx(arrays, encoded):
    module, settings = encoded.weight.name.removesuffix(".weight"), encoded.setting.entries()
    dtype = getattr(mx, encoded.weight.quantization.compute_dtype.name)
    parts = (arrays.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
    values = mx.dequantize(*parts, **settings, dtype=dtype)
    return np.array(values.astype(mx.float32))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_affine_values_are_mlx_s(bits, size, dtype, tmp_path):
    dtype = FLOATS[dtype]
    for rows in (1, 7):
        shape, block_shape = (2, rows, 3 * size), (1, 1, size)
        given = {"scale": dtype, "compute_dtype": dtype, "seed": bits * size}
        for more in ({"zero_point": np.int8}, {"offset": dtype}, {}):
            encoded = encode(quantized(shape, BITS[bits], block_shape, **given, **more))
            assert encoded.setting.entries() == {"group_size": size, "bits": bits, "mode": "affine"}
            arrays, _ = loaded(tmp_path, encoded)
            np.testing.assert_array_equal(values_of_mlx(arrays, encoded), encoded.weight.dequantize())


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_every_scale_and_code_of_small_floats_is_mlx_s(mode, tmp_path):
    dtype, scale_dtype, size = FLOAT_MODES[mode]
    scales = np.arange(256, dtype=np.uint8).view(scale_dtype)
    scales = scales[np.isfinite(scales.astype(np.float32))]  # MLX's 2 ** 128 for the exponent that is none is not held
    for codes in np.arange(256, dtype=np.uint8).reshape(-1, size):  # all codes, twice for those of 4 bits
        nibbles = codes if dtype != FLOAT4 else codes & 15
        weight = Tensor.from_array("m.weight", np.tile(nibbles.view(dtype), (scales.size, 1)))
        quantization = Quantization(Tensor.from_array("scale", scales[:, None]), (1, size))
        encoded = encode(replace(weight, quantization=quantization))
        arrays, _ = loaded(tmp_path, encoded)
        np.testing.assert_array_equal(values_of_mlx(arrays, encoded), encoded.weight.dequantize())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_values_of_other_encodings_are_mlx_s(path, tmp_path):
    count = 0
    for weight in fixture_weights(path):
        try:
            encoded = encode(weight)
        except Unsupported:
            continue
        count += 1
        arrays, _ = loaded(tmp_path, encoded)
        np.testing.assert_array_equal(values_of_mlx(arrays, encoded), encoded.weight.dequantize())
    assert bool(count) == (path.name not in OF_NONE)


class Experts(nn.Module):
    """Stacked layers, as mlx-lm has them."""

    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x, indices):
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=indices)

    def to_quantized(self, group_size=None, bits=None, mode="affine"):
        return QuantizedExperts(self.weight, group_size, bits, mode)


class QuantizedExperts(nn.Module):
    def __init__(self, weight, group_size, bits, mode):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode)
        self.biases = biases[0] if biases else None

    def __call__(self, x, indices):
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


class Layers(nn.Module):
    """Modules of every kind that can be quantized, and two that are not."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 128)
        self.experts = Experts(3, 128, 64)
        self.norm = nn.RMSNorm(64)
        self.plain = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 50, bias=False)

    def __call__(self, tokens):
        hidden = nn.silu(self.up(self.embed_tokens(tokens)))
        hidden = self.experts(hidden[:, None, :], tokens % 3)[:, 0, :]
        return self.head(self.plain(self.norm(hidden)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (FLOAT16, 4e-3)], ids=str)
def test_a_model_of_mlx_runs_with_them(dtype, tolerance, tmp_path):
    """Modules are made as mlx-lm's loader does, by the configuration and by what has scales."""
    scale = np.full((64, 4), 0.0625, np.float32)
    weights = {
        "embed_tokens": quantized((50, 64), ml_dtypes.int4, scale=FLOAT16, value_dtype=dtype, seed=1),
        "up": quantized((128, 64), ml_dtypes.uint4, (1, 64), scale=FLOAT16, zero_point=np.int8, value_dtype=dtype),
        "experts": quantized((3, 64, 128), np.int8, (1, 1, 128), scale=FLOAT16, value_dtype=dtype, seed=3),
        "head": quantized((50, 64), FLOAT4, (1, 16), scale=np.resize(scale, (50, 4)), value_dtype=dtype),
    }
    encoded = [encode(replace(weight, name=f"{module}.weight")) for module, weight in weights.items()]
    random = np.random.default_rng(0)
    plain = {
        "up.bias": random.normal(size=128).astype(dtype or np.float32),
        "norm.weight": np.ones(64, dtype or np.float32),
        "plain.weight": random.normal(size=(64, 64)).astype(dtype or np.float32),
    }
    arrays, settings = loaded(tmp_path, *encoded, **plain)

    def of_module(path, module):
        if path in settings:
            return settings[path]
        return hasattr(module, "to_quantized") and f"{path}.scales" in arrays

    common = {key: settings[key] for key in ("group_size", "bits", "mode")}
    model, reference = Layers(), Layers()
    nn.quantize(model, **common, class_predicate=of_module)
    model.load_weights(list(arrays.items()), strict=True)
    floats = {each.weight.name: mx.array(each.weight.dequantize()) for each in encoded}
    reference.load_weights([*floats.items(), *((key, mx.array(array)) for key, array in plain.items())], strict=True)
    tokens = mx.array(np.arange(50))
    got, wanted = (np.array(each(tokens).astype(mx.float32)) for each in (model, reference))
    assert isinstance(model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(model.head, nn.QuantizedLinear)
    assert type(model.plain) is nn.Linear
    np.testing.assert_allclose(got, wanted, rtol=0, atol=np.abs(wanted).max() * tolerance)  # of sums
