"""The table of formats, detection, and third parties' plugins (a real distribution on sys.path)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters import plugins
from nibblecast.converters.errors import CorruptFile, MissingDependency, UsageError
from nibblecast.converters.plugins import Format, Magic

#: The plugin of docs/plugins.md.
PLUGIN = "\n".join(
    re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "plugins.md").read_text(), re.DOTALL)
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts a distribution with an entry point of our group on sys.path."""

    def distribution(name: str, entry_point: str, code: str = "") -> None:
        info = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nibblecast.formats]\n{entry_point}\n")
        if code:
            (tmp_path / "site" / f"{entry_point.split('=')[1].split(':')[0].strip()}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins.all_formats.cache_clear()
    yield distribution
    plugins.all_formats.cache_clear()
    sys.modules.pop("nibblecast_npy", None)


def test_the_weight_of_an_operator_that_only_a_plugin_knows_is_quantized(install, tmp_path: Path) -> None:
    """Its reader says along which axis the operator's sum runs; a bias beside it, with no sum axes, stays."""
    use = "Use('npy.mix', 1, 1, sum_axes=(0,))"
    tensors = "'array': Tensor.from_array('array', np.load(path)), 'table': Tensor.from_array('table', np.load(path))"
    made = f"{{n: replace(t, uses=({use} if n == 'array' else Use('npy.mix', 2),)) for n, t in {{{tensors}}}.items()}}"
    plugin = PLUGIN.replace('{"array": Tensor.from_array("array", np.load(path))}', made)
    plugin = plugin.replace("import Metadata", "import Metadata, Use").replace(
        "import dataclass", "import dataclass, replace"
    )
    install("nibblecast-npy", "npy = nibblecast_npy:FORMAT", plugin)
    floats = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    np.save(tmp_path / "floats.npy", floats)
    done = nibblecast.convert(tmp_path / "floats.npy", tmp_path / "w.safetensors", quantize="int4,block=4", verify=True)
    assert [accuracy.tensor for accuracy in done.quantized] == ["array"]
    written = nibblecast.load(tmp_path / "w.safetensors")
    assert written["array"].quantization is not None
    assert written["array"].quantization.block_shape == (4, 1)
    assert written["array"].uses[0].sum_axes == (0,)
    np.testing.assert_array_equal(written["table"].numpy(), floats)


def test_a_plugin_of_another_distribution_reads_and_writes(install, tmp_path: Path) -> None:
    install("nibblecast-npy", "npy = nibblecast_npy:FORMAT", PLUGIN)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    model = nibblecast.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(model["array"].dequantize(), array)
    nibblecast.convert(tmp_path / "a.npy", tmp_path / "b.safetensors", tmp_path / "b.npy", verify=True)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), array)
    # content comes before the extension
    (tmp_path / "a.npy").rename(tmp_path / "a.bin")
    assert list(nibblecast.load(tmp_path / "a.bin")) == ["array"]


def test_the_planner_refuses_what_a_plugin_cannot_hold(install, tmp_path: Path) -> None:
    install("nibblecast-npy", "npy = nibblecast_npy:FORMAT", PLUGIN)
    np.save(tmp_path / "a.npy", np.zeros(3, np.int32))
    with pytest.raises(
        nibblecast.Error, match="tensor 'array': format 'npy' cannot hold int32 values: leave the tensor"
    ):
        nibblecast.convert(tmp_path / "a.npy", tmp_path / "b.npy")
    assert not (tmp_path / "b.npy").exists()


def test_two_formats_of_one_name_name_both_packages(install) -> None:
    install("nibblecast-npy", "npy = nibblecast_npy:FORMAT", PLUGIN)
    install("other-package", "npy = nibblecast_npy:FORMAT")
    with pytest.raises(UsageError, match="format 'npy' is offered by both .*(nibblecast-npy|other-package)"):
        plugins.all_formats()


def test_a_plugin_may_not_take_a_built_in_name(install) -> None:
    install("thief", "tflite = nibblecast_npy:FORMAT", PLUGIN)
    with pytest.raises(UsageError, match="format 'tflite' is offered by both nibblecast and thief"):
        plugins.all_formats()


def test_a_broken_plugin_is_one_warning_and_an_error_when_used(install, tmp_path: Path) -> None:
    install("broken-package", "broken = module_that_is_not_there:FORMAT")
    with pytest.warns(UserWarning, match="plugin broken-package for format 'broken' is broken: ModuleNotFoundError"):
        formats = plugins.all_formats()
    assert "tflite" in formats
    with pytest.raises(UsageError, match="format 'broken' cannot be read: broken: ModuleNotFoundError"):
        plugins.reader(plugins.format_named("broken"))


def test_an_entry_point_that_is_no_format_is_broken(install) -> None:
    install("odd-package", "odd = json:dumps")
    with pytest.warns(UserWarning, match="json:dumps must be a nibblecast.converters.plugins.Format, not function"):
        plugins.all_formats()


def test_the_command_line_lists_plugins(install, tmp_path: Path) -> None:
    install("nibblecast-npy", "npy = nibblecast_npy:FORMAT", PLUGIN)
    done = subprocess.run(
        [sys.executable, "-m", "nibblecast", "formats"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{tmp_path / 'site'}", "PATH": ""},
        cwd=Path(__file__).parent.parent,
    )
    assert "NumPy arrays" in done.stdout


def test_content_tells_the_format_before_the_extension(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures/tflite/mlp_int4_per_tensor.tflite"
    disguised = tmp_path / "model.onnx"
    disguised.write_bytes(fixture.read_bytes())
    assert plugins.detect(disguised).name == "tflite"


def test_the_longer_magic_decides(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "fixtures/tflite/mlp_int4_per_tensor.tflite"
    content = bytearray(fixture.read_bytes())
    content[0] = 8  # what every ONNX file begins with
    for name in ("model.onnx", "model.tflite", "model"):
        (tmp_path / name).write_bytes(content)
        assert plugins.detect(tmp_path / name).name == "tflite"


def test_an_unknown_file_says_what_it_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "model.xyz"
    path.write_bytes(b"no model at all")
    with pytest.raises(
        CorruptFile,
        match=r"unknown format .first bytes b'no model', extension '.xyz'.; readable formats: .*tflite",
    ):
        nibblecast.load(path)


@pytest.mark.parametrize(("name", "reason"), [("missing.tflite", "No such file"), (".", "no model in this folder")])
def test_what_cannot_be_opened_is_said(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(CorruptFile, match=reason):
        nibblecast.load(tmp_path / name)


def test_an_unknown_format_or_extension_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="unknown format 'tf'; known formats: cheader, gguf, onnx, pytorch, safetensors, tflite"
    ):
        plugins.format_named("tf")
    with pytest.raises(UsageError, match=r"extension '.xyz' does not select a format to write: .*--to NAME"):
        plugins.format_of_target(tmp_path / "a.xyz")
    with pytest.raises(UsageError, match="format 'tflite' cannot be written"):
        plugins.writer(plugins.format_named("tflite"))


def test_a_missing_package_says_what_to_install() -> None:
    format = Format(
        "demo", "", (), (Magic(0, b"x"),), reader="package_nobody_has.reader:Reader", install="pip install it"
    )
    with pytest.raises(
        MissingDependency, match="needs a package that is not installed .*package_nobody_has.*: pip install it"
    ):
        plugins.reader(format)
