"""What the reader of torchao's tensors refuses, by its message: a sound tensor of a class, one attribute changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.ir import Tensor
from nibblecast.formats.encodings.torchao import safetensors_keys
from nibblecast.formats.encodings.torchao.read import WrappedTensor, decoded, dynamic_activation_linear

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def zeros(shape: tuple[int, ...], dtype: Any = np.int8) -> Tensor:
    return Tensor.from_array("part", np.zeros(shape, dtype))


def ones(*shape: int, dtype: Any = np.float32) -> Tensor:
    return Tensor.from_array("part", np.ones(shape, dtype))


def impl(class_name: str, **attributes: Any) -> WrappedTensor:
    return WrappedTensor(class_name, (4, 32), "float32", attributes)


#: By what they are: class, shape, attributes. Each of these is read.
SOUND: Mapping[str, tuple[str, tuple[int, ...], Mapping[str, Any]]] = {
    "int8": ("Int8Tensor", (4, 32), {"qdata": zeros((4, 32)), "scale": ones(4, 1), "block_size": (1, 32)}),
    "float8": ("Float8Tensor", (4, 32), {"qdata": zeros((4, 32), FLOAT8), "scale": ones(4, 1)}),
    "int4": (
        "Int4Tensor",
        (4, 32),
        {"qdata": zeros((4, 16)), "scale": ones(1, 4), "zero_point": ones(1, 4), "block_size": (1, 32)},
    ),
    "int4 of Intel GPUs": (
        "Int4PlainInt32Tensor",
        (4, 32),
        {"qdata": zeros((4, 4), np.int32), "scale": ones(1, 4), "zero_point": zeros((1, 4)), "block_size": (1, 32)},
    ),
    "mx": (
        "MXTensor",
        (4, 32),
        {
            "qdata": zeros((4, 32), FLOAT8),
            "scale": ones(4, 1, dtype=ml_dtypes.float8_e8m0fnu),
            "block_size": 32,
            "elem_dtype": "float8_e4m3fn",
        },
    ),
    "nvfp4": (
        "NVFP4Tensor",
        (4, 32),
        {"qdata": zeros((4, 16), np.uint8), "scale": ones(4, 2, dtype=FLOAT8), "block_size": 16},
    ),
    "nf4": (
        "NF4Tensor",
        (4, 32),
        {
            "quantized_data": zeros((64,), np.uint8),
            "nf4": ones(16),
            "block_size": 64,
            "scaler_block_size": 2,
            "quantized_scalers": zeros((2,)),
            "quantization_factor": ones(1),
            "scaler_mean": ones(),
        },
    ),
    "affine": (
        "AffineQuantizedTensor",
        (4, 32),
        {
            "tensor_impl": impl(
                "PlainAQTTensorImpl", int_data=zeros((4, 32)), scale=ones(4, 1), zero_point=zeros((4, 1))
            ),
            "block_size": (1, 32),
            "quant_min": -8,
            "quant_max": 7,
            "zero_point_domain": "INT",
        },
    ),
    "affine for a CPU": (
        "AffineQuantizedTensor",
        (4, 32),
        {
            "tensor_impl": impl(
                "Int4CPUAQTTensorImpl", packed_weight=zeros((4, 16), np.uint8), scale_and_zero=ones(1, 4, 2)
            ),
            "block_size": (1, 32),
            "zero_point_domain": "FLOAT",
        },
    ),
}


def read(what: str, shape: tuple[int, ...] | None = None, **changed: Any) -> Tensor:
    class_name, sound, attributes = SOUND[what]
    tensor, _ = decoded(
        "w", WrappedTensor(class_name, sound if shape is None else shape, "float32", {**attributes, **changed})
    )
    tensor.dequantize()
    return tensor


@pytest.mark.parametrize("what", SOUND)
def test_each_is_read_as_it_is(what: str) -> None:
    assert read(what).shape == (4, 32)


REFUSED: list[tuple[str, Mapping[str, Any], type[Error], str]] = [
    ("int8", {"qdata": zeros((4, 32), np.int16)}, CorruptFile, "codes of int16, where int8"),
    ("int8", {"qdata": zeros((4, 31))}, CorruptFile, r"of shape \(4, 31\), where \(4, 32\)"),
    ("int8", {"block_size": (1,)}, CorruptFile, "one for each axis"),
    ("int8", {"block_size": (0, 32)}, CorruptFile, "positive integers"),
    ("int8", {"scale": ones(3, 1)}, CorruptFile, r"scale of shape \(3, 1\)"),
    ("int8", {"scale": "float32"}, CorruptFile, "not a plain tensor but str"),
    ("int8", {"scale": zeros((4, 1), np.bool_)}, CorruptFile, "no real numbers"),
    ("float8", {"scale": ones(3)}, CorruptFile, r"scales of shape \(3,\) for shape \(4, 32\) and no block_size"),
    (
        "int4",
        {"shape": (32,), "qdata": zeros((16,)), "block_size": (32,)},
        CorruptFile,
        r"the shape \(32,\), where a matrix",
    ),
    ("int4", {"block_size": (2, 16)}, CorruptFile, "groups along the last axis"),
    ("int4", {"qdata": zeros((4, 16), np.int16)}, CorruptFile, "packed codes of int16"),
    ("int4", {"qdata": zeros((4, 15))}, CorruptFile, r"packed codes of shape \(4, 15\)"),
    (
        "int4 of Intel GPUs",
        {"shape": (1, 4, 32), "qdata": zeros((1, 4, 4), np.int32), "block_size": (1, 1, 32)},
        CorruptFile,
        r"the shape \(1, 4, 32\), where a matrix",
    ),
    ("int4 of Intel GPUs", {"zero_point": ones(1, 4)}, Unsupported, "zero points of float32, as it is packed for NPUs"),
    ("mx", {"elem_dtype": "fp6_e3m2"}, Unsupported, "of fp6_e3m2"),
    ("mx", {"elem_dtype": "float8_e5m2"}, CorruptFile, "codes of float8_e4m3fn for elements of 'float8_e5m2'"),
    ("nvfp4", {"scale": ones(4, 2)}, CorruptFile, "scales of float32, where float8_e4m3fn"),
    (
        "nvfp4",
        {"shape": (8, 32), "qdata": zeros((4, 32), np.uint8), "scale": ones(8, 2, dtype=FLOAT8)},
        Unsupported,
        "saved transposed",
    ),
    ("nf4", {"quantized_data": zeros((63,), np.uint8)}, CorruptFile, "63 bytes of uint8"),
    ("nf4", {"block_size": 48}, Unsupported, "in blocks of 48, which do not fit rows of 32"),
    ("nf4", {"block_size": 96}, Unsupported, r"in blocks of 96, which do not fit the shape \(4, 32\)"),
    ("nf4", {"quantized_scalers": zeros((3,))}, CorruptFile, r"scales of shape \(3,\) of int8 for 2 blocks"),
    ("nf4", {"scaler_block_size": 3}, CorruptFile, "for 2 blocks"),
    ("nf4", {"scaler_mean": ones(2)}, CorruptFile, "a mean of float32"),
    ("affine", {"zero_point_domain": "NO"}, CorruptFile, "the unknown zero_point_domain 'NO'"),
    ("affine", {"quant_min": 0.5}, CorruptFile, "the quant_min 0.5, where an integer"),
    ("affine", {"quant_min": 8}, CorruptFile, "8"),
    ("affine", {"zero_point_domain": "FLOAT", "quant_max": 8}, Unsupported, "without a middle"),
    ("affine", {"tensor_impl": None}, CorruptFile, "not a tensor of torchao but NoneType"),
    (
        "affine",
        {"tensor_impl": impl("PlainAQTTensorImpl", int_data=zeros((32, 4)), scale=ones(4, 1))},
        CorruptFile,
        r"codes of shape \(32, 4\), where \(4, 32\)",
    ),
    (
        "affine",
        {"tensor_impl": impl("PlainAQTTensorImpl", int_data=ones(4, 32), scale=ones(4, 1))},
        CorruptFile,
        "codes of float32, where integers",
    ),
    (
        "affine",
        {
            "tensor_impl": impl(
                "Int4XPUAQTTensorImpl", packed_weight=zeros((4, 4), np.int32), scale_and_zero=ones(1, 4, 2)
            )
        },
        Unsupported,
        "packed for Intel GPUs as torchao did before",
    ),
    (
        "affine",
        {
            "tensor_impl": impl(
                "UintxAQTTensorImpl",
                int_data=WrappedTensor(
                    "UintxTensor",
                    (4, 32),
                    "uint8",
                    {"bit_width": 4, "packed_shape": (4, 32), "pack_dim": 0, "int4_shard": zeros((4, 16), np.uint8)},
                ),
                scale=ones(4, 1),
            )
        },
        Unsupported,
        "packed along axis 0",
    ),
    (
        "affine for a CPU",
        {"shape": (1, 4, 32), "block_size": (1, 1, 32)},
        Unsupported,
        r"of shape \(1, 4, 32\): only matrices",
    ),
    (
        "affine for a CPU",
        {
            "shape": (1, 4, 32),
            "block_size": (1, 1, 32),
            "tensor_impl": impl(
                "TensorCoreTiledAQTTensorImpl",
                packed_weight=zeros((1, 2, 32, 4), np.int32),
                scale_and_zero=ones(1, 4, 2),
            ),
        },
        Unsupported,
        r"of shape \(1, 4, 32\): only matrices",
    ),
]


@pytest.mark.parametrize(("what", "changed", "kind", "message"), REFUSED, ids=range(len(REFUSED)))
def test_an_attribute_that_does_not_fit(what: str, changed: Mapping[str, Any], kind: type[Error], message: str) -> None:
    attributes = dict(changed)
    with pytest.raises(kind, match=f"tensor 'w': is a torchao .*{message}") as caught:
        read(what, attributes.pop("shape", None), **attributes)
    assert "\n" not in str(caught.value)


def test_the_first_linear_of_quantization_aware_training() -> None:
    for weight in (zeros((3, 64), np.int16), zeros((64,)), zeros((1, 3, 64))):
        with pytest.raises(CorruptFile, match="a matrix of int8 is needed"):
            dynamic_activation_linear("fc.weight", weight, ones(3, 2), ones(3, 2))
    with pytest.raises(CorruptFile, match="a matrix of int8 is needed"):
        dynamic_activation_linear("fc.weight", zeros((3, 64)), ones(3), ones(3))


INT8_ENTRY = {
    "_type": "Int8Tensor",
    "_tensor_data_names": ["qdata", "scale"],
    "_data": {"block_size": [1, 32]},
}


def grouped(entries: Mapping[str, Any], **tensors: Tensor) -> Mapping[str, Tensor]:
    metadata = {name: json.dumps(entry) for name, entry in entries.items()}
    metadata["tensor_names"] = json.dumps(list(entries))
    named = {name.replace("__", ":"): tensor for name, tensor in tensors.items()}
    return safetensors_keys.grouped(named, metadata)[0]


def test_keys_of_a_file_are_read_and_refused() -> None:
    parts = {"w__qdata": zeros((4, 32)), "w__scale": ones(4, 1)}
    assert grouped({"w": INT8_ENTRY}, **parts)["w"].shape == (4, 32)
    for entries, tensors, message in (
        ({"w": INT8_ENTRY}, {"w__scale": ones(4, 1)}, "tensor 'w': has no qdata"),
        ({"w": INT8_ENTRY}, {**parts, "w": ones(1)}, "tensor 'w': is stored as it is and in parts"),
        ({"w": {"_type": "Tensor"}}, parts, "tensor 'w': is a plain tensor, but has the parts qdata, scale"),
        ({"w": {}}, parts, "tensor 'w': .*must be a JSON object with a _type"),
        ({"w": {"_type": "Int8Tensor"}}, {"w": ones(1)}, "tensor 'w': .*_tensor_data_names"),
        ({"w": {k: v for k, v in INT8_ENTRY.items() if k != "_data"}}, parts, "tensor 'w': .*without _data"),
        ({"w": INT8_ENTRY}, {"_w_qdata": zeros((4, 32))}, "tensor 'w': has no '_w_scale', which its metadata promise"),
        (
            {"a": INT8_ENTRY, "_a_qdata": {"_type": "Tensor"}},
            {"_a_qdata": zeros((4, 32)), "_a_scale": ones(4, 1)},
            "tensor '_a_qdata': shares its '_a_qdata' with 'a'",
        ),
    ):
        with pytest.raises(CorruptFile, match=message):
            grouped(entries, **tensors)
