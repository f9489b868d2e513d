"""Names with lone surrogates, which JSON and pickles can hold and UTF-8 cannot; and paths that are no UTF-8."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import nibblecast
from nibblecast.converters.errors import Unsupported, VerificationFailed, printable
from nibblecast.converters.ir import Model, per_axis
from nibblecast.formats.onnx.file.validation import validate
from tests import zoo

ROOT = Path(__file__).parents[2]
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
#: With names that they may be mistaken for.
NAMES = ("a\ud800", "\udcff", "a\\ud800", "a\ud800.scale", "a\\ud800.scale", "\ud83d\ude00"[::-1], "a\ud800:1", "plain")


def named_so() -> Model:
    """Quantized tensors, and one that is a parameter of another."""
    tensors = [zoo.quantized(name, (4, 32), per_axis((4, 32), 0)) for name in NAMES]
    quantization = tensors[0].quantization
    assert quantization is not None
    scale = replace(quantization.scale, name="s\ud800", parameter_of=NAMES[0])
    tensors[0] = replace(tensors[0], quantization=replace(quantization, scale=scale))
    return zoo.model([tensors[0], scale, *tensors[1:]])


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
@pytest.mark.parametrize("dequantize", [None, "float32"])
def test_safetensors_keeps_them(target: str, dequantize: str | None, tmp_path: Path) -> None:
    """Its own keys are escapes of them; the description has the names."""
    model = named_so()
    nibblecast.save(model, tmp_path / "source.safetensors")
    done = nibblecast.convert(
        tmp_path / "source.safetensors", tmp_path / target, to="safetensors", dequantize=dequantize, verify=True
    )
    assert not [note for note in done.notes if "it is named" in note]
    read = nibblecast.load(tmp_path / target)
    assert set(read) >= set(NAMES)
    if dequantize is None:
        zoo.assert_identical(read, model)
    path = tmp_path / target if target.endswith("s") else tmp_path / target / "model.safetensors"
    with safe_open(path, "np") as file:  # the official library, which takes no header that is not Unicode
        keys = list(file.keys())
        assert "plain" in keys
        assert all(key.isascii() for key in keys)
        described = json.loads(file.metadata()["nibblecast"])["tensors"]
        for name in NAMES:
            assert described[name]["data"] in keys


def test_plain_floats_are_described_too(tmp_path: Path) -> None:
    """A folder of floats says nothing of itself otherwise."""
    model = zoo.model([zoo.codes(name, (4, 32), np.float32) for name in NAMES])
    nibblecast.save(model, tmp_path / "out", to="safetensors", shard_size=600)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    read = nibblecast.load(tmp_path / "out")
    assert {name: read[name].numpy().tobytes() for name in read} == {n: t.numpy().tobytes() for n, t in model.items()}


@pytest.mark.parametrize("layout", ["compressed-tensors", "mlx", "torchao"])
def test_other_layouts_refuse_them_by_name(layout: str, tmp_path: Path) -> None:
    weight = zoo.quantized("m.weight", (128, 128), (1, 128), scale=np.float16, zero_point=np.int8)
    model = zoo.model([weight, zoo.codes("n\ud800.weight", (4, 4), np.float32)])
    with pytest.raises(Unsupported, match=r"tensor 'n\\ud800\.weight': has a name that is not Unicode"):
        nibblecast.save(model, tmp_path / "out", to="safetensors", layout=layout, others="dequantize")
    assert list(tmp_path.iterdir()) == []


def test_onnx_renames_them_and_says_so(tmp_path: Path) -> None:
    nibblecast.save(named_so(), tmp_path / "source.safetensors")
    done = nibblecast.convert(tmp_path / "source.safetensors", tmp_path / "out.onnx", verify=True)
    renamed = dict(note.split(": ", 1) for note in done.notes if "it is named" in note)
    names = ("a\ud800", "\udcff", "a\ud800.scale", "\ude00\ud83d", "a\ud800:1", "s\ud800")
    assert set(renamed) == set(map(printable, names))
    assert renamed[r"a\ud800"].startswith(r"it is named 'a\ud800_1'")
    assert set(nibblecast.load(tmp_path / "out.onnx")) >= {r"a\ud800", r"a\ud800_1", r"\udcff", "plain"}


def test_c_keeps_them(tmp_path: Path) -> None:
    nibblecast.save(named_so(), tmp_path / "source.safetensors")
    nibblecast.convert(tmp_path / "source.safetensors", tmp_path / "out.h", verify=True)
    assert set(nibblecast.load(tmp_path / "out.h")) >= set(NAMES)


def test_gguf_refuses_them_by_name(tmp_path: Path) -> None:
    model = zoo.model([zoo.codes("n\ud800", (4, 32), np.float32)])
    with pytest.raises(Unsupported, match=r"tensor 'n\\ud800': has a name .* that is not Unicode"):
        nibblecast.save(model, tmp_path / "out.gguf")


def test_reports_and_listings_show_escapes(tmp_path: Path) -> None:
    nibblecast.save(named_so(), tmp_path / "source.safetensors")
    report = nibblecast.report(tmp_path / "source.safetensors", tmp_path / "out.html")
    assert r"a\ud800" in (tmp_path / "out.html").read_text("utf-8")
    names = json.loads(json.dumps(report.document()))["tensors"]
    assert {tensor["name"] for tensor in names} >= set(NAMES)


@pytest.mark.parametrize("target", [b"m\xff.onnx", b"d\xff/m.onnx", b"d\xff/m\xff.onnx"])
@pytest.mark.parametrize("options", [{}, {"external_data": 64}])
def test_a_model_of_a_name_that_is_no_utf8_is_verified(
    target: bytes, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx.checker takes no such path: it checks what is in the file all the same."""
    path = tmp_path / os.fsdecode(target)
    path.parent.mkdir(exist_ok=True)
    if options and b"\xff" in path.name.encode(errors="surrogateescape"):
        with pytest.raises(nibblecast.Error, match="this name is not Unicode"):
            nibblecast.convert(INT4, path, verify=True, **options)
        return
    done = nibblecast.convert(INT4, path, verify=True, **options)
    assert len(done.files) == (2 if options else 1)
    content = bytearray(path.read_bytes())
    at = content.index(b"DequantizeLinear")
    content[at : at + 4] = b"Nono"
    path.write_bytes(content)
    with pytest.raises(VerificationFailed, match="onnx.checker refuses it"):
        validate(path)
