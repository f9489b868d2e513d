"""Models of every family of operators that Keras's and TensorFlow's converters made: onnxruntime, with all its
optimizations, computes what LiteRT computed."""

from __future__ import annotations

import numpy as np
import pytest

import nibblecast
from fixtures.tflite.operator_probe import problem, runs
from nibblecast.formats.tflite.runner import LiteRTRunner
from tests.formats.tflite.models import FIXTURES

pytestmark = pytest.mark.slow

MODELS = sorted((FIXTURES / "operators").glob("*/*.tflite"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_of_operators_computes_what_litert_computed(path, tmp_path):
    found = problem(path, tmp_path / "model.onnx")
    assert not found, found


@pytest.mark.peers
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_what_is_stored_is_what_litert_computes(path):
    runner = LiteRTRunner(path)
    tolerance = {"float32": 1e-5, "float16": 1e-5}.get(path.suffixes[-2][1:], 0.03)
    for run in runs(path.with_suffix(".npz")).values():
        for name, array in runner.run(run["inputs"]).items():
            stored = run["outputs"][name]
            top = max(1.0, float(np.abs(stored[np.isfinite(stored)].astype(float)).max(initial=0.0)))
            np.testing.assert_allclose(array.astype(float), stored.astype(float), rtol=0, atol=tolerance * top + 1e-9)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["unary_ceil.float32", "reduce_log_sum_exp.int8", "norm_op_lrn.int8"])
def test_models_are_run_whose_reference_kernels_lack_or_are_wrong(name, tmp_path):
    nibblecast.convert(named(name), tmp_path / "model.onnx")
    for found in nibblecast.compare_outputs(named(name), tmp_path / "model.onnx"):
        assert found.relative <= 1e-5 or (found.steps is not None and found.steps <= 1)


def named(name: str):
    return FIXTURES / "operators" / name.partition("_")[0] / f"{name}.tflite"


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("an output that is an input has another name", "shape_identity_of.float32"),
        ("Resize keeps a batch whose size is open", "conv_keras_upsample.float32"),
        ("a FULLY_CONNECTED of two open sizes keeps both", "open_dense.float32"),
        ("strides over open sizes are padded by what is there", "open_conv_strided.float32"),
        ("SPACE_TO_BATCH_ND keeps a batch whose size is open", "open_batch_to_space.float32"),
        ("the ONE_HOT of a scalar is a vector", "slice_given_one_hot.float32"),
        ("int8 activations are moved, and onnxruntime optimizes the model", "conv_same.int8"),
        ("MIRROR_PAD repeats the edge", "pad_symmetric.float32"),
        ("GATHER along an axis behind those of the batch", "gather_batched_later.float32"),
    ],
    ids=lambda value: value.replace(" ", "-") if " " in value else "",
)
def test_what_was_wrong_is_right(reason, name, tmp_path):
    assert problem(named(name), tmp_path / "model.onnx") == "", reason


def test_models_of_int8_activations_have_an_operator_set_that_onnxruntime_optimizes(tmp_path):
    import onnx

    sets = {}
    for name in ("conv_same.int8", "conv_same.int16x8", "conv_same.float32"):
        nibblecast.convert(named(name), tmp_path / "model.onnx")
        sets[name] = onnx.load(tmp_path / "model.onnx").opset_import[0].version
    assert sets == {"conv_same.int8": 20, "conv_same.int16x8": 21, "conv_same.float32": 21}
