"""The PyTorch reader against what torch decodes from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import nibblecast
from nibblecast import Tensor

FIXTURES = Path(__file__).parents[3] / "fixtures" / "pytorch"
MODELS = sorted(path for path in FIXTURES.glob("*.pt") if path.with_suffix(".npz").exists())
#: What readers must be told about a case for it to be as its truth.
OPTIONS: dict[str, dict[str, Any]] = {"qat_converted": {"fold_batch_norm": True}}


def truth_of(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path.with_suffix(".npz")) as file:
        return {key: file[key] for key in file.files}


def values_of(tensor: Tensor) -> NDArray[Any]:
    if tensor.quantization is not None or tensor.dtype.kind == "f" or tensor.dtype.kind == "V":
        return tensor.dequantize(np.float32)
    return tensor.numpy()


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_tensor_is_what_torch_decodes(path: Path) -> None:
    model = nibblecast.load(path, **OPTIONS.get(path.stem, {}))
    for key, wanted in truth_of(path).items():
        kind, name = key.split("/", 1)
        assert name in model, f"{name} is missing among {', '.join(model)}"
        tensor = model[name]
        if kind == "codes":
            np.testing.assert_array_equal(tensor.codes(), wanted, err_msg=name)
        else:
            got = values_of(tensor)
            assert got.shape == wanted.shape, name
            np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_codes_survive_to_safetensors_and_back(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    conversion = nibblecast.convert(path, target, verify=True)
    comparison = conversion.verified[target]
    assert comparison is not None
    assert comparison.equal


def test_a_weight_in_training_has_the_narrowest_dtype() -> None:
    dtypes = {
        "qat_int4_per_channel": ml_dtypes.int4,
        "qat_int4_narrow": ml_dtypes.int4,
        "qat_uint4_per_channel": ml_dtypes.uint4,
        "qat_int2": ml_dtypes.int2,
        "qat_int8": np.int8,
        "qat_module": ml_dtypes.int4,
    }
    for case, dtype in dtypes.items():
        model = nibblecast.load(FIXTURES / f"{case}.pt")
        assert {model[name].dtype for name in ("conv.weight", "plain.weight", "fc.weight")} == {np.dtype(dtype)}, case
