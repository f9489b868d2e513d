import numpy as np
import pytest

from nibblecast.converters.errors import CorruptFile
from tests.formats.encodings.checkpoints_in_memory import FIXTURES, check_fixture, decoded, refused


def checkpoint():
    random = np.random.default_rng(0)
    return {
        "experts.down_proj_blocks": random.integers(0, 256, (2, 3, 2, 16), np.uint8),
        "experts.down_proj_scales": random.integers(120, 130, (2, 3, 2), np.uint8),
        "experts.down_proj_bias": np.ones((2, 3), np.float32),
    }


def test_values_are_those_of_transformers():
    check_fixture(FIXTURES / "mxfp4")


def test_codes_keep_the_orientation_and_the_bytes_of_the_file():
    arrays = checkpoint()
    tensors = decoded(arrays, {"quant_method": "mxfp4"})
    assert list(tensors) == ["experts.down_proj", "experts.down_proj_bias"]
    weight = tensors["experts.down_proj"]
    assert (weight.shape, weight.quantization.block_shape) == ((2, 3, 64), (1, 1, 32))
    np.testing.assert_array_equal(weight.packed(), arrays["experts.down_proj_blocks"].reshape(-1))


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("scales", np.zeros((2, 3, 1), np.uint8), "(2, 3, 1)"),
        ("scales", np.zeros((2, 3, 2), np.int8), "int8"),
        ("scales", np.zeros((2, 3, 2), np.float32), "float32"),
        ("blocks", np.zeros((2, 16), np.uint8), "(2, 16)"),
    ],
)
def test_wrong_parts_are_refused(part, value, word):
    arrays = checkpoint() | {f"experts.down_proj_{part}": value}
    refused(arrays, {"quant_method": "mxfp4"}, word, kind=CorruptFile)


def test_other_tensors_of_that_name_are_no_weights():
    arrays = {"memory_blocks": np.zeros((2, 3), np.float32), "other_blocks": np.zeros((2, 16), np.uint8)}
    assert list(decoded(arrays)) == list(arrays)


def test_a_contradicting_configuration_is_refused():
    refused(checkpoint(), {"quant_method": "gptq"}, "mxfp4", "gptq", kind=CorruptFile)
