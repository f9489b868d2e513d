"""The dependency file, as make and ninja read it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import Error, UsageError
from nibblecast.converters.ir import Tensor
from nibblecast.formats.cheader.depfile import dependency_file
from tests.formats.cheader.c_harness import model_of, plan_of
from tests.tools import need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "fixtures" / "tflite"
INT4 = FIXTURES / "cnn_int4_per_channel.tflite"
NAMES = ["plain", "with space", "two  spaces", "a#b", "$HOME", "$$", "back\\slash", "back\\ space", "end\\", "c:d"]
NAMES += ["[a]", "schön", "~tilde", "(x)", "x,y", "-w", "!"]
TOOLS = {
    "make": ("Makefile", "include w.d\n%.h:\n\t@echo made\n"),
    "ninja": ("build.ninja", "rule convert\n  command = echo made; touch w.h\n  depfile = w.d\nbuild w.h: convert\n"),
}
PACKAGES = {"make": "make", "ninja": "ninja-build"}
MODEL = model_of(Tensor.from_array("w", np.zeros(3, np.int8)))


def makes(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return "made" in done.stdout


def test_text():
    text = dependency_file([Path("out/w.h"), Path("out/w.c")], [Path("a b.tflite"), Path("$x#.bin")])
    assert text == b"out/w.h out/w.c: a\\ b.tflite $$x\\#.bin\n\na\\ b.tflite:\n\n$$x\\#.bin:\n"
    assert dependency_file([Path("w.h")], []) == b"w.h:\n"


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", NAMES)
def test_inputs(tmp_path, name, tool):
    need([tool], PACKAGES[tool])
    output, source = tmp_path / "w.h", tmp_path / f"{name}.tflite"
    file, text = TOOLS[tool]
    (tmp_path / file).write_text(text)
    (tmp_path / "w.d").write_bytes(dependency_file([Path("w.h")], [Path(source.name)]))
    output.touch()
    source.touch()
    makes(tmp_path, tool)
    os.utime(output, (2000, 2000))
    os.utime(source, (1000, 1000))
    makes(tmp_path, tool)  # ninja has a log of its own
    assert not makes(tmp_path, tool)
    os.utime(source, (5_000_000_000, 5_000_000_000))
    assert makes(tmp_path, tool)
    source.unlink()
    makes(tmp_path, tool)


@pytest.mark.parametrize("name", NAMES)
def test_outputs(tmp_path, name):
    target = tmp_path / f"{name}.h"
    (tmp_path / "Makefile").write_text(TOOLS["make"][1])
    (tmp_path / "w.d").write_bytes(dependency_file([Path(target.name), Path("w.c")], [Path("source")]))
    target.touch()
    (tmp_path / "source").touch()
    os.utime(target, (1000, 1000))
    assert makes(tmp_path, "make")
    os.utime(tmp_path / "source", (500, 500))
    assert not makes(tmp_path, "make")


@pytest.mark.parametrize("name", ["line\nend", "line\rend", "50%", "a=b", "a;b", "a|b", "tab\tbed", "*"])
def test_names_that_no_rule_holds(tmp_path, name):
    with pytest.raises(UsageError, match="cannot stand in a depfile: give it another name"):
        plan_of(MODEL, tmp_path / f"{name}.h", layout="header", depfile=str(tmp_path / "w.d"))


def convert(folder, source=INT4, **options):
    nibblecast.convert(source, folder / "w.h", depfile=str(folder / "w.d"), **options)
    targets, _, sources = (folder / "w.d").read_text().partition("\n")[0].partition(": ")
    return targets.split(), sources.split()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["w.h", "w.c"]),
        ({"layout": "header"}, ["w.h"]),
        ({"style": "incbin"}, ["w.h", "w.c", "w.bin"]),
    ],
    ids=["split", "header", "incbin"],
)
def test_what_it_names(tmp_path, options, names):
    assert convert(tmp_path, **options) == ([str(tmp_path / name) for name in names], [str(INT4)])
    shared = set() if len(names) == 1 else {"nibblecast.h"}  # which is that of other models, too
    assert {path.name for path in tmp_path.iterdir()} == {*names, "w.d"} | shared


#: Each model's rule declares that model's files. A depfile that named nibblecast.h would stop ninja: "depfile mentions
#: 'nibblecast.h' as an output, but no such output was declared"; declared in both rules: "multiple rules generate" it.
TWO_MODELS = {
    "make": (
        "Makefile",
        "all: a.h b.h\n%.h:\n\t@echo made $*\n\t@$(CONVERT) $*.tflite $*.h --opt depfile=$*.d >/dev/null\n"
        "a.h: a.tflite\nb.h: b.tflite\n-include a.d b.d\n",
    ),
    "ninja": (
        "build.ninja",
        "rule convert\n  command = echo made $name; $$CONVERT $name.tflite $name.h --opt depfile=$name.d >/dev/null\n"
        "  depfile = $name.d\n"
        "build a.h a.c: convert\n  name = a\nbuild b.h b.c: convert\n  name = b\n",
    ),
}


@pytest.mark.parametrize("tool", TWO_MODELS)
def test_two_models_share_a_runtime_header(tmp_path, monkeypatch, tool):
    need([tool], PACKAGES[tool])
    monkeypatch.setenv("CONVERT", f"{sys.executable} -m nibblecast convert")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file, text = TWO_MODELS[tool]
    (tmp_path / file).write_text(text)
    for name in ("a", "b"):
        shutil.copy(INT4, tmp_path / f"{name}.tflite")

    def made():
        done = subprocess.run([tool], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall("^made (.)$", done.stdout, re.MULTILINE)

    assert sorted(made()) == ["a", "b"]
    assert (tmp_path / "nibblecast.h").exists()
    assert made() == []
    os.utime(tmp_path / "b.tflite", (5_000_000_000, 5_000_000_000))
    assert made() == ["b"]


def test_files_that_hold_data(tmp_path):
    source, data = FIXTURES / "external_buffer.tflite", FIXTURES / "external_buffer.weights.bin"
    for options in ({}, {"dequantize": "float32"}):
        assert set(convert(tmp_path, source, **options)[1]) == {str(source), str(data)}


def test_c_as_a_source(tmp_path):
    nibblecast.convert(INT4, tmp_path / "v.h")
    assert set(convert(tmp_path, tmp_path / "v.h")[1]) == {str(tmp_path / "v.h"), str(tmp_path / "v.c")}


def test_it_does_not_change_the_rest(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    convert(tmp_path / "a")
    nibblecast.convert(INT4, tmp_path / "b" / "w.h")
    for name in ("w.h", "w.c"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("depfile", "message"),
    [
        ("w.c", "would be written twice"),
        ("none/w.d", "cannot be written"),
        (str(INT4), "is both the input and"),
        (".", "is a folder|without a folder"),
        ("\0", "the name of a file"),
    ],
)
def test_impossible_places(tmp_path, monkeypatch, depfile, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match=message):
        nibblecast.convert(INT4, "w.h", depfile=depfile)
    assert not list(tmp_path.iterdir())
