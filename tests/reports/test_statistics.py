"""The numbers of a report are what NumPy finds in the tensors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.arithmetic.accuracy import Accuracy
from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.converters.errors import UsageError
from nibblecast.converters.ir import Model, Quantization, Tensor, per_axis, per_tensor
from nibblecast.converters.reports import counts
from nibblecast.converters.reports.counts import codes_of, spread_of
from nibblecast.converters.reports.documents import model_document
from nibblecast.converters.reports.statistics import accuracy_against, layer_of, measure
from nibblecast.converters.sizes import bits_per_weight, model_bytes, weights_of
from nibblecast.converters.storage import Computed

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SOURCES = [
    "tflite/cnn_int4_per_channel.tflite",
    "tflite/mlp_int4_asymmetric.tflite",
    "tflite/mlp_int4_odd.tflite",
    "tflite/mlp_int2_per_channel.tflite",
    "tflite/uint4_weights.tflite",
    "tflite/cnn_int8_full.tflite",
    "checkpoints/bitsandbytes_nf4_double",
    "checkpoints/mxfp4",
    "checkpoints/quanto_qfloat8",
    "checkpoints/compressed_tensors_pack_int4",
    "gguf/types.gguf",
    "onnx/matmul_nbits.onnx",
]


def codes(tensor: Tensor) -> np.ndarray:
    """The codes as numbers."""
    return tensor.numpy().astype(np.float32 if is_float(tensor.dtype) else np.int64).reshape(-1)


@pytest.mark.parametrize("source", SOURCES)
def test_codes_are_counted(source: str) -> None:
    model = nibblecast.load(FIXTURES / source)
    measured = measure(model)
    assert measured.quantized
    for found in measured.quantized:
        tensor = model[found.name]
        if tensor.bits > 8:
            assert found.codes is None
            continue
        assert found.codes is not None
        numbers = codes(tensor)
        assert list(found.codes.values) == sorted(found.codes.values)
        for value in set(found.codes.values):  # 0 and -0 are two codes of one value
            count = sum(n for v, n in zip(found.codes.values, found.codes.counts, strict=True) if v == value)
            assert count == (numbers == value).sum()
        assert found.codes.total == tensor.size
        assert found.codes.not_finite == (~np.isfinite(numbers)).sum()
        assert found.codes.unused == found.codes.counts.count(0)
        assert found.codes.lowest_share == (numbers == min(found.codes.values)).mean()
        assert found.codes.highest_share == (numbers == max(found.codes.values)).mean()


@pytest.mark.parametrize("source", SOURCES)
def test_scales_and_zero_points_are_measured(source: str) -> None:
    model = nibblecast.load(FIXTURES / source)
    assert measure(model).quantized
    for found in measure(model).quantized:
        quantization = model[found.name].quantization
        assert quantization is not None
        for parameter, spread in ((quantization.scale, found.scale), (quantization.zero_point, found.zero_point)):
            assert (parameter is None) == (spread is None)
            if parameter is None or spread is None:
                continue
            numbers = parameter.dequantize(np.float32).reshape(-1).astype(np.float64)
            assert (spread.count, spread.lowest, spread.highest) == (numbers.size, numbers.min(), numbers.max())
            assert spread.mean == pytest.approx(numbers.mean(), rel=1e-12)
            assert (spread.zeros, spread.negative) == ((numbers == 0).sum(), (numbers < 0).sum())
            magnitudes = np.abs(numbers)
            for i, count in spread.bins:
                assert count == ((magnitudes >= 2 ** (i / 4)) & (magnitudes < 2 ** ((i + 1) / 4))).sum()
            assert sum(count for _, count in spread.bins) == (numbers != 0).sum()


@pytest.mark.parametrize("source", SOURCES)
def test_sizes_are_those_of_inspect(source: str) -> None:
    model = nibblecast.load(FIXTURES / source)
    measured = measure(model)
    assert [tensor.name for tensor in measured.tensors] == list(weights_of(model))
    assert measured.whole.bytes == model_bytes(model) == sum(layer.bytes for layer in measured.layers)
    for found in measured.tensors:
        assert found.bits_per_weight == bits_per_weight(model[found.name])


DTYPES = [np.dtype(getattr(ml_dtypes, name)) for name in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")]
DTYPES += [np.dtype(t) for t in (np.int8, np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)]


@given(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(1, 5), st.sampled_from([1, 3, 1 << 20]), st.data())
def test_codes_are_counted_in_pieces_of_any_size(
    dtype: np.dtype, rows: int, row: int, piece: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1 << 16))
    patterns = np.random.default_rng(seed).integers(0, 256, (rows, row), np.uint8)
    array = patterns.view(dtype) if dtype.itemsize == 1 and dtype not in DTYPES[:5] else patterns.astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_PIECE_BYTES", piece)
        found = codes_of(Tensor.from_array("t", array))
    assert found is not None
    numbers = array.astype(np.float32)
    for value in set(found.values):
        count = sum(n for v, n in zip(found.values, found.counts, strict=True) if v == value)
        assert count == (numbers == value).sum()
    assert found.total == array.size


def test_memory_is_bounded() -> None:
    nbytes = 1 << 26
    data = Computed(nbytes, lambda start, stop: np.full(stop - start, 0x71, np.uint8))
    scale = Tensor.from_array("scale", np.ones((1, 1), np.float32))
    shape = (1 << 14, 1 << 13)
    tensor = Tensor("t", shape, np.dtype(ml_dtypes.int4), data, Quantization(scale, per_tensor(shape)))
    tracemalloc.start()
    found = codes_of(tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert (found.counts[1 + 8], found.counts[7 + 8], found.unused) == (nbytes, nbytes, 14)
    assert peak < nbytes // 4


def test_the_accuracy_is_that_of_quantizing(tmp_path: Path) -> None:
    source, target = FIXTURES / "tflite/mlp_float32.tflite", tmp_path / "codes.safetensors"
    done = nibblecast.convert(source, target, quantize="int4,block=8")
    measured = measure(nibblecast.load(target), nibblecast.load(source))
    by_name = {tensor.name: tensor.accuracy for tensor in measured.tensors}
    assert done.quantized
    for wanted in done.quantized:
        found = by_name[wanted.tensor]
        assert found is not None
        assert found.max_error == wanted.max_error
        assert found.mean_square_error == pytest.approx(wanted.mean_square_error, rel=1e-5)
        assert found.signal_to_noise == pytest.approx(wanted.signal_to_noise, rel=1e-5)
    values = nibblecast.load(source)
    floats = nibblecast.load(target).tensors
    errors = [np.abs(floats[n].dequantize() - values[n].dequantize()).max() for n in floats if n in values]
    assert measured.accuracy is not None
    assert measured.accuracy.max_error == max(errors)
    assert measured.unmatched == ()


def test_a_reference_of_other_shapes_or_names_is_refused_or_told() -> None:
    def model(**shapes: tuple[int, ...]) -> Model:
        return Model({n: Tensor.from_array(n, np.ones(shape, np.float32)) for n, shape in shapes.items()})

    measured = measure(model(a=(2, 3), b=(4,), c=(1,)), model(a=(2, 3), b=(5,)))
    assert measured.unmatched == ("b", "c")
    assert [tensor.accuracy is None for tensor in measured.tensors] == [False, True, True]
    with pytest.raises(UsageError, match="no tensor of the same name and shape"):
        measure(model(a=(2, 3)), model(a=(3, 2)))


def test_what_is_not_finite_is_null_in_json() -> None:
    scale = np.array([[np.nan], [np.inf], [-0.5], [0.0]], np.float32)
    quantization = Quantization(Tensor.from_array("s", scale), per_axis((4, 2), 0))
    tensor = Tensor.from_array("t", np.ones((4, 2), np.int8), quantization)
    spread = spread_of(quantization.scale)
    assert (spread.not_finite, spread.zeros, spread.negative, spread.bins) == (2, 1, 1, ((-4, 1),))
    assert (spread.lowest, spread.highest, spread.mean) == (-0.5, 0.0, -0.25)
    reference = Tensor.from_array("t", np.ones((4, 2), np.float32))
    document = model_document(measure(Model({"t": tensor}), Model({"t": reference})))
    assert document["accuracy"]["mean_square_error"] is None
    json.dumps(document, allow_nan=False)
    nothing = spread_of(Tensor.from_array("s", np.full(3, np.nan, np.float32)))
    assert (nothing.count, nothing.not_finite, nothing.bins) == (3, 3, ())


def test_an_infinite_error_has_no_signal() -> None:
    infinite = Tensor.from_array("t", np.array([np.inf, 1], np.float32))
    found = accuracy_against(Tensor.from_array("t", np.ones(2, np.float32)), infinite)
    assert (found.max_error, found.signal_to_noise) == (np.inf, -np.inf)
    assert Accuracy.total([]).signal_to_noise == np.inf


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("blk.12.attn_q.weight", "blk.12"),
        ("0.weight", "0"),
        ("model/layers/7/kernel", "model/layers/7"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("conv1.weight", "conv1"),
        ("dense", "dense"),
        (".hidden", ".hidden"),
        ("", ""),
    ],
)
def test_layers_are_found_by_names(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = ["head.weight", "layers.0.w", "layers.10.w", "layers.2.w", "layers.2.v", "norm.weight", "blocks.1.w"]
    model = Model({name: Tensor.from_array(name, np.ones(2, np.float32)) for name in names})
    layers = measure(model).layers
    assert [layer.name for layer in layers] == ["head", "layers.0", "layers.2", "layers.10", "norm", "blocks.1"]
    assert [len(layer.tensors) for layer in layers] == [1, 1, 2, 1, 1, 1]
