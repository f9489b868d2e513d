"""What `pip install nibblecast` puts on the path, from a wheel and from a source distribution: one package, and none of
the links that the checkout has in it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.tools import unavailable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
SCRIPT = """
import sys

import converters
import formats
import nibblecast

assert (converters.MINE, formats.MINE) == (1, 2)
assert nibblecast.__file__.startswith(sys.argv[1]), nibblecast.__file__
print(len(nibblecast.load(sys.argv[2])))
nibblecast.convert(sys.argv[2], "weights.h", "weights.safetensors", "model.onnx", verify=True)
"""


def run(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    """What the interpreter prints; `path` is where it looks for packages first."""
    environment = None if path is None else {"PYTHONPATH": str(path)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """A wheel or an sdist of a folder with our pyproject.toml, by the backend that this names."""
    run("-m", "hatchling", "build", "--target", kind, "--directory", folder, cwd=source)
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of the checkout."""
    try:
        import hatchling  # noqa: F401
    except ModuleNotFoundError:
        unavailable("needs hatchling, which the extra 'test' brings: pip install 'hatchling>=1.26'")
    folder = tmp_path_factory.mktemp("built")
    return build("wheel", ROOT, folder), build("sdist", ROOT, folder)


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has put the wheel into."""
    site = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[0], cwd=site)
    return site


def test_one_package_is_installed(installed: Path) -> None:
    found = {path.name for path in installed.iterdir()} - {"bin"}
    assert {name for name in found if not name.endswith(".dist-info")} == {"nibblecast"}
    assert [path.name for path in (installed / "bin").iterdir() if path.suffix != ".pyc"] == ["nibblecast"]
    assert not [path for path in installed.rglob("*") if path.is_symlink()]


def test_every_file_of_the_checkout_is_installed(installed: Path) -> None:
    for folder in ("converters", "formats"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
        assert len(files) > 50
        for path in files:
            assert (installed / "nibblecast" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert (installed / "nibblecast" / "py.typed").exists()


def test_the_source_distribution_gives_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() for member in archive.getmembers())
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build("wheel", source, tmp_path / "built")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()
        assert all(first.read(name) == second.read(name) for name in first.namelist())


def test_modules_of_the_users_may_be_called_as_our_folders_are(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "converters.py").write_text("MINE = 1\n")
    (tmp_path / "formats.py").write_text("MINE = 2\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run("script.py", installed, MODEL, cwd=tmp_path, path=installed) == "7\n"
    assert (tmp_path / "model.onnx").exists()
    inspected = run("-m", "nibblecast", "inspect", MODEL, cwd=tmp_path, path=installed)
    assert "cnn_1/conv_1/convolution" in inspected
