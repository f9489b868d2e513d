"""AWQ is written as it is read, and as a packer that puts one code after the other in its place has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.awq.write import configuration, encode
from nibblecast.formats.encodings.bytes import column_blocks
from tests.formats.encodings.awq.packer import packed
from tests.formats.encodings.checkpoints import FIXTURES, write_folder
from tests.formats.encodings.gptq.packer import configuration as gptq_configuration
from tests.formats.encodings.gptq.packer import random_layer, stored
from tests.formats.encodings.row_weights import FLOATS, limits, unread, weight, with_index
from tests.formats.encodings.written import check, write

UINT4 = ml_dtypes.uint4
NAME = "model.layers.0.self_attn.q_proj"


@settings(max_examples=80)
@given(
    dtype=st.sampled_from([ml_dtypes.int4, UINT4]),
    words=st.integers(1, 4),
    groups=st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 16, 32])),
    rows=st.sampled_from([1, 4, 1000]),
    zeros=st.sampled_from([None, "codes", np.int8, np.float32]),
    at=st.sampled_from([None, 0, 1]),
    scale=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read_again(
    dtype: Any,
    words: int,
    groups: tuple[int, int],
    rows: int,
    zeros: Any,
    at: int | None,
    scale: Any,
    seed: int,
    tmp_path_factory: Any,
) -> None:
    shape = (words * 8, groups[0] * groups[1])
    limit = None if at is None else limits(np.dtype(dtype))[at]
    zero_dtype = dtype if zeros == "codes" else zeros
    blocks = (min(rows, shape[0]), groups[1])
    source = weight(shape, dtype, blocks, zeros=zero_dtype, at=limit, scale=scale, seed=seed)
    folder = Path(tmp_path_factory.getbasetemp()) / "awq_written"
    encoded, _ = write(folder, "awq", [source])
    assert not encoded[source.name].losses
    check(folder, encoded, [source])


def test_words_have_each_code_in_its_place() -> None:
    source = weight((24, 48), UINT4, (1, 16), zeros=UINT4)
    parts = {key.rpartition(".")[2]: tensor.numpy() for key, tensor in encode(source).stored.items()}
    quantization = source.quantization
    assert quantization is not None
    assert quantization.zero_point is not None
    np.testing.assert_array_equal(parts["qweight"], packed(source.codes().T))
    np.testing.assert_array_equal(parts["qzeros"], packed(quantization.zero_point.codes().T))
    np.testing.assert_array_equal(parts["scales"], quantization.scale.numpy().T)
    assert [array.dtype.name for array in parts.values()] == ["int32", "int32", "float16"]


def test_the_configuration_says_what_is_plain() -> None:
    names = ("layers.0.mlp.fc", "layers.1.mlp.gate_proj")
    weights = {f"{name}.weight": encode(weight((8, 64), name=f"{name}.weight")) for name in names}
    plain = ["embed.wte", "layers.0.mlp.gate", "layers.0.ln_1", "layers.1.mlp.fc", "tower.projection", "lm_head"]
    layout = configuration(weights, [f"{name}.weight" for name in plain])
    config = layout.entries["quantization_config"]
    assert config.pop("modules_to_not_convert") == ["mlp.gate", "layers.1.mlp.fc", "tower.projection"]
    assert list(config.pop("dynamic")) == [
        r"-:(.*\.)?mlp\.gate$",
        r"-:(.*\.)?layers\.1\.mlp\.fc$",
        r"-:(.*\.)?tower\.projection$",
    ]
    assert config == {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    assert not layout.files
    assert not layout.notes


def test_nothing_of_the_codes_is_read_at_planning() -> None:
    source = unread(weight((16, 64), zeros=ml_dtypes.int4))
    encoded = encode(source)
    configuration({source.name: encoded}, [])
    with pytest.raises(AssertionError, match="read at planning"):
        encoded.stored[f"{NAME}.qweight"].numpy()


def test_large_weights_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = weight((64, 256))
    whole = encode(source).stored[f"{NAME}.qweight"].numpy()
    monkeypatch.setattr(column_blocks, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(column_blocks, "_PART_BYTES", 500)
    words = encode(source).stored[f"{NAME}.qweight"]
    np.testing.assert_array_equal(words.numpy(), whole)
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in words.parts(1000)]), whole)


def test_whole_rows_of_several_sizes_are_one_configuration(tmp_path: Path) -> None:
    sources = [weight((8, size), block_shape=(1, size), name=f"{size}.weight") for size in (32, 48)]
    encoded, layout = write(tmp_path / "m", "awq", sources)
    assert layout.entries["quantization_config"]["group_size"] == -1
    check(tmp_path / "m", encoded, sources)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (weight((8, 32), name="weight"), "not named '<module>.weight'"),
        (weight((8, 32), name="wte.weight"), "an embedding by its name"),
        (weight((8, 32), name="lm_head.weight"), "computes logits, by its name"),
        (weight((8, 32), np.int8), "codes of int8: AWQ's GEMM layout is of 4 bits"),
        (weight((8, 32), ml_dtypes.uint2), "codes of uint2"),
        (weight((12, 32)), r"shape \(12, 32\) and groups of 32: AWQ needs equal groups, and words of 8 outputs"),
        (weight((8, 48), block_shape=(1, 32)), r"shape \(8, 48\) and groups of 32"),
        (weight((8, 32), zeros=np.int16, at=8), "zero points from 16 to 16"),
        (with_index(weight((8, 32), block_shape=(1, 8)), np.arange(32) % 4), "a group index, which AWQ has not"),
        (replace(weight((8, 32)), quantization=None), "codes of int4"),
    ],
)
def test_what_awq_cannot_hold_is_refused(source: Tensor, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        encode(source)
    assert caught.value.tensor == source.name
    assert "\n" not in str(caught.value)


def test_weights_of_several_group_sizes_are_both_named() -> None:
    weights = [weight((8, 64), block_shape=(1, size), name=f"of_{size}.weight") for size in (16, 32)]
    with pytest.raises(Unsupported, match="'of_32.weight': has groups of 32, but 'of_16.weight' of 16"):
        configuration({one.name: encode(one) for one in weights}, [])


@pytest.mark.parametrize("version", [1, 2])
def test_codes_move_from_gptq(version: int, tmp_path: Path) -> None:
    layer = random_layer(7, 4, 16, 64, 32, shuffled=False)
    tensors = stored(layer, version=version, with_groups=True)
    source = nibblecast.load(write_folder(tmp_path / "a", tensors, config=gptq_configuration(layer, 32, version)))
    weights = [source["model.fc.weight"]]
    encoded, _ = write(tmp_path / "b", "awq", weights, {"model.fc.bias": source["model.fc.bias"].numpy()})
    read = check(tmp_path / "b", encoded, weights)
    assert list(read) == list(source)
    np.testing.assert_array_equal(read["model.fc.weight"].codes(), layer.codes)


@pytest.mark.parametrize("case", ["hqq_f16", "hqq_f32_viewed"])
def test_codes_move_from_hqq_where_zero_points_are_integers(case: str, tmp_path: Path) -> None:
    source = nibblecast.load(FIXTURES / case / "model.safetensors")["across.weight"]
    encoded, _ = write(tmp_path / "m", "awq", [source])
    check(tmp_path / "m", encoded, [source])
