"""Codes that no encoding here takes do not come out as numbers without a word."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint

FLOAT8 = ml_dtypes.float8_e4m3fn
BYTES = np.ones((4, 8), np.uint8)
SCALES = np.ones((4, 1), np.float32)


def losses(arrays: dict[str, Any]) -> list[str]:
    tensors = {key: Tensor.from_array(key, array) for key, array in arrays.items()}
    decoded, found = decode_checkpoint(Checkpoint(tensors))
    assert list(decoded) == list(arrays)
    return [str(loss) for loss in found]


@pytest.mark.parametrize(
    "arrays",
    [
        {"experts.down_proj": np.ones((2, 4, 8), np.uint8), "experts.down_proj_weight_scale": np.ones((2, 8, 1), "f4")},
        {"m.weight": np.ones((4, 8), FLOAT8), "m.scale_weight": np.ones((), np.float32)},
        {"m.weight": np.ones((4, 8), np.int8), "m.weight_scale_inv": SCALES},
        {"m.weight": BYTES, "m.weight.absmax": SCALES},
        {"m.weight": np.ones((4, 8), np.int8), "m.scales": SCALES},
        {"m.qweight": np.ones((4, 8), np.int16), "m.qzeros": SCALES},
        {"fc1._weight_qdata": BYTES, "fc1._weight_scale": SCALES},  # torchao's, without its metadata
        {"m_packed": np.ones((4, 8), np.int32), "m_scale": SCALES},
    ],
)
def test_codes_with_a_scale_beside_them_are_said(arrays: dict[str, Any]) -> None:
    (loss,) = losses(arrays)
    assert loss.startswith(
        f"changed: the model: '{next(iter(arrays))}' look like codes with scales of an unknown encoding"
    )


@pytest.mark.parametrize(
    "arrays",
    [
        {"conv.weight": np.ones((4, 8), np.float32), "conv.scale": SCALES},
        {"m.weight": np.ones((4, 8), ml_dtypes.bfloat16), "m.weight_scale": SCALES},
        {"position_ids": np.ones(8, np.int64), "position_scale": SCALES},
        {"bn.num_batches_tracked": np.ones((), np.int32), "bn.scale": SCALES},
        {"attn.k": BYTES, "attn.q_scale": SCALES},
        {"mask": np.ones((4, 8), np.bool_), "mask_scale": SCALES},
    ],
)
def test_other_tensors_are_no_alarm(arrays: dict[str, Any]) -> None:
    assert losses(arrays) == []


def test_many_are_one_loss() -> None:
    arrays: dict[str, Any] = {}
    for number in range(3):
        arrays |= {f"m{number}.weight": np.ones((4, 8), FLOAT8), f"m{number}.scale_weight": SCALES}
    (loss,) = losses(arrays)
    assert "'m0.weight' and 2 more look like codes" in loss
