import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Unsupported
from nibblecast.formats.encodings.configuration import quantization_config
from tests.formats.encodings.awq.packer import checkpoint
from tests.formats.encodings.checkpoints_in_memory import decoded, refused

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


@settings(max_examples=25)
@given(
    inputs=st.integers(1, 40),
    words=st.integers(1, 4),
    size=st.sampled_from([8, 16, 64]),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]),
    seed=st.integers(0, 9),
)
def test_codes_and_values_are_those_that_were_packed(inputs, words, size, dtype, seed):
    arrays, codes, zeros, scales = checkpoint(inputs, words * 8, size, dtype, seed)
    tensors = decoded(arrays, CONFIG | {"group_size": size})
    assert list(tensors) == ["m.weight", "m.bias"]
    np.testing.assert_array_equal(tensors["m.weight"].codes(), codes.T)
    of = np.arange(inputs) // size
    steps = codes.astype(np.float32) - zeros.astype(np.float32)[of]
    wanted = steps * scales.astype(np.float32)[of]
    np.testing.assert_array_equal(tensors["m.weight"].dequantize(np.float32), wanted.T)
    library = tensors["m.weight"].dequantize(dtype)
    np.testing.assert_array_equal(library.astype(np.float32), wanted.astype(dtype).T.astype(np.float32))


def test_one_group_of_all_inputs():
    arrays, codes, _, _ = checkpoint(size=32)
    tensors = decoded(arrays, CONFIG | {"group_size": -1})
    assert tensors["m.weight"].quantization.block_shape == (1, 32)
    np.testing.assert_array_equal(decoded(arrays)["m.weight"].codes(), codes.T)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"version": "gemv"}, "'gemv'"),
        ({"version": "GEMV_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"version": "new"}, "'new'"),
        ({"bits": 8}, "8 bits"),
    ],
)
def test_other_layouts_are_refused_by_name(changed, word):
    refused(checkpoint()[0], CONFIG | changed, word, kind=Unsupported)


@pytest.mark.parametrize(
    ("shapes", "dtype", "name"),
    [
        ({"qweight": (24, 4), "qzeros": (24, 1), "scales": (24, 8)}, np.int32, "gemv"),
        ({"qweight": (6, 32), "qzeros": (8, 24), "scales": (8, 24)}, np.int16, "gemv_fast"),
        ({"qweight": (2, 48), "scales": (2, 24)}, np.int32, "marlin"),
    ],
)
def test_layouts_of_kernels_are_recognized_by_their_tensors(shapes, dtype, name):
    arrays = {f"m.{part}": np.zeros(shape, dtype) for part, shape in shapes.items()}
    arrays["m.scales"] = arrays["m.scales"].astype(np.float16)
    refused(arrays, {"quant_method": "awq"}, name, kind=Unsupported)


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("qweight", np.zeros((32, 3), np.int64), "int64"),
        ("qzeros", np.zeros((2, 3), np.uint8), "uint8"),
        ("qzeros", np.zeros((1, 3), np.int32), "qzeros of (1, 3)"),
        ("qzeros", np.zeros((2, 3, 1), np.int32), "(2, 3, 1)"),
        ("scales", np.zeros((2, 24), np.float64), "float64"),
        ("scales", np.zeros((3, 24), np.float16), "3"),
        ("scales", np.zeros((2, 16), np.float16), "(2, 16)"),
        ("scales", np.zeros((0, 24), np.float16), "(0, 3)"),
    ],
)
def test_wrong_parts_are_refused(part, value, word):
    arrays = checkpoint()[0] | {f"m.{part}": value}
    if word == "(0, 3)":
        arrays["m.qzeros"] = np.zeros((0, 3), np.int32)
        word = "0 groups"
    refused(arrays, CONFIG, word, kind=CorruptFile)


def test_missing_zeros_and_contradicting_configurations_are_refused():
    arrays = checkpoint()[0]
    refused({k: v for k, v in arrays.items() if k != "m.qzeros"}, CONFIG, "m.qzeros")
    refused(arrays, CONFIG | {"group_size": 32}, "2 groups")
    refused(arrays, CONFIG | {"group_size": "16"}, "'16'")
    refused(arrays, {"quant_method": "gptq"}, "awq", "gptq")
    refused(arrays | {"m.weight": np.zeros((2, 2), np.float32)}, CONFIG, "twice")


def test_the_configuration_that_autoawq_once_wrote(tmp_path):
    text = '{"zero_point": true, "q_group_size": 16, "w_bit": 4, "version": "GEMV"}'
    (tmp_path / "quant_config.json").write_text(text)
    config = quantization_config(tmp_path)
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 16)
    refused(checkpoint()[0], config, "'gemv'", kind=Unsupported)


def test_zeros_without_an_axis_are_no_layout_of_awq() -> None:
    """Found by random tensors: an IndexError."""
    arrays = {
        "m.qweight": np.zeros((0, 0), np.uint8),
        "m.qzeros": np.array(0, np.uint8),
        "m.scales": np.zeros((0, 1), np.uint8),
    }
    assert set(decoded(arrays)) == set(arrays)
