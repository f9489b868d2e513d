"""What is refused of exported programs (.pt2), made by hand: each by its message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.pytorch.pickle.bombs import entry, pushed, saved, tensor, zipped
from tests.formats.pytorch.pickle.program_bombs import (
    FLOAT32,
    INT8,
    dequantized,
    node,
    of,
    package,
    stored,
)
from tests.growth import ends

W = {"w": stored("w", (4, 8), (8, 1))}
CONFIG = "data/weights/model_weights_config.json"


def changed(**meta: Any) -> dict[str, bytes]:
    """A program whose only tensor has other settings."""
    one = stored("w", (4, 8), (8, 1))
    one["tensor_meta"] |= meta
    return package([], {"w": one})


def affine(**more: Any) -> dict[str, Any]:
    numbers = {"scale": {"as_float": 1.0}, "zero_point": {"as_int": 0}, "block_size": {"as_ints": [1, 8]}}
    limits = {"quant_min": {"as_int": -8}, "quant_max": {"as_int": 7}, "output_dtype": {"as_scalar_type": FLOAT32}}
    given = {"input": of("p"), **numbers, **limits, **more}
    return node("torchao.dequantize_affine.default", "d0", **{k: v for k, v in given.items() if v is not None})


REFUSED: Mapping[str, tuple[dict[str, bytes], str, type[Error]]] = {
    "machine code": (
        {"archive_format": b"pt2", "data/aotinductor/model/a.so": b"x"},
        "a package of AOTInductor",
        Unsupported,
    ),
    "a record elsewhere": (
        package([], {"w": stored("../w", (1,), (1,))}),
        "the record '../w', which is not a plain name",
        CorruptFile,
    ),
    "a record in a folder": (
        package([], {"w": stored("a/w", (1,), (1,))}),
        "the record 'a/w', which is not a plain name",
        CorruptFile,
    ),
    "a sparse tensor": (changed(layout=1), "is sparse .layout 1.: only dense", Unsupported),
    "a dtype that is not known": (changed(dtype=99), "ScalarType 99 .*not supported", Unsupported),
    "no elements": (package([], W) | {"data/weights/w": b""}, "exported with fake tensors", Unsupported),
    "elements outside": (changed(storage_offset={"as_int": 1 << 20}), "reaches element", CorruptFile),
    "a pickle of no tensor": (
        package([], {"w": stored("q", (), (), is_pickle=True)}) | {"data/weights/q": saved(pushed(7))},
        "is not a tensor but int in the pickle",
        Unsupported,
    ),
    "weights that are no archive": (
        {k: v for k, v in package([], W).items() if k != CONFIG} | {"data/weights/model.pt": b"no archive"},
        "not an archive of torch.save",
        Unsupported,
    ),
    "weights without names": (
        {k: v for k, v in package([], W).items() if k != CONFIG} | {"data/weights/model.pt": saved(pushed([1]))},
        "no tensors by name, but list",
        CorruptFile,
    ),
    "a weight of a number": (
        {k: v for k, v in package([], W).items() if k != CONFIG}
        | {"data/weights/model.pt": saved(entry(tensor(), pushed(1)))},
        "a tensor without a name",
        CorruptFile,
    ),
    "a configuration that is not JSON": (package([], W) | {CONFIG: b"{"}, "not a JSON object", CorruptFile),
    "a configuration of a list": (package([], W) | {CONFIG: b"[]"}, "not a JSON object", CorruptFile),
    "a configuration of a number": (
        package([], W) | {CONFIG: b'{"config": {"w": 1}}'},
        "no object for .*w",
        CorruptFile,
    ),
    "a path that is not a text": (
        package([], W) | {CONFIG: json.dumps({"config": {"w": W["w"] | {"path_name": 1}}}).encode()},
        "no text for .*path_name",
        CorruptFile,
    ),
    "sizes that are no counts": (changed(sizes=[{"as_int": -1}, {"as_int": 8}]), "tensor 'w'", CorruptFile),
    "sizes that are open": (changed(sizes=[{"as_expr": {"expr_str": "s0"}}, {"as_int": 8}]), "tensor 'w'", Error),
    "a limit that is a text": (
        package([dequantized(0, quant_min={"as_string": "x"})], W),
        "an integer is needed",
        CorruptFile,
    ),
    "a scale that is a text": (
        package([dequantized(0, scale={"as_string": "x"})], W),
        "a number is needed",
        CorruptFile,
    ),
    "a result of integers": (
        package([affine(output_dtype={"as_scalar_type": INT8})], W),
        "not a float dtype",
        CorruptFile,
    ),
    "blocks of other axes": (
        package([affine(block_size={"as_ints": [8]})], W),
        r"blocks of .8.* over shape",
        CorruptFile,
    ),
    "blocks that do not divide": (
        package([affine(block_size={"as_ints": [1, 3]})], W),
        "which do not divide it",
        CorruptFile,
    ),
    "blocks of nothing": (package([affine(block_size={"as_ints": [1, 0]})], W), "blocks of", CorruptFile),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_program_that_is_refused(what: str, tmp_path: Path) -> None:
    records, message, kind = REFUSED[what]
    (tmp_path / "m.pt2").write_bytes(zipped(records))
    with ends(), pytest.raises(kind, match=message) as caught:
        nibblecast.load(tmp_path / "m.pt2")
    assert "\n" not in str(caught.value)


def test_a_program_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(zipped(package([dequantized(0)], W)))
    weight = nibblecast.load(tmp_path / "m.pt2")["w"]
    assert weight.granularity == "per-tensor"
    assert weight.dequantize("float32").tolist() == [[1.0] * 8] * 4
