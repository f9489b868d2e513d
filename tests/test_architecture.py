"""The rules of who may import whom, and of what a run may import at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from nibblecast.converters import plugins
from nibblecast.formats.onnx.weights import operators as onnx_operators
from nibblecast.formats.tflite import schema
from tests.import_graph import cycles, files, imports

ROOT = Path(__file__).parent.parent
#: What formats may import of `converters`: what lies below its stages.
FOR_FORMATS = {
    "nibblecast.converters.input.allowance",
    "nibblecast.converters.input.containment",
    "nibblecast.converters.errors",
    "nibblecast.converters.interfaces",
    "nibblecast.converters.ir",
    "nibblecast.converters.input.json_object",
    "nibblecast.converters.input.shapes",
    "nibblecast.converters.storage",
    "nibblecast.converters.output.streaming",
    "nibblecast.converters.metadata",
    "nibblecast.converters.names",
    "nibblecast.converters.version",
}
#: A test with a user's own modules of those names.
USERS_MODULES = ROOT / "tests" / "package" / "test_installing.py"
CONVERTERS, FORMATS, ARITHMETIC = "nibblecast.converters.", "nibblecast.formats.", "nibblecast.converters.arithmetic."


def python_files() -> list[Path]:
    """All that is written in Python here; nibblecast/ holds links to the folders beside it."""
    folders = ("nibblecast", "converters", "formats", "tests", "benchmarks", "fixtures")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if not _is_linked(path)]


def _is_linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(ROOT / "nibblecast"))


def of(package: str) -> dict[str, frozenset[str]]:
    """The modules of a package with what they import."""
    return {module: imported for module, imported in imports().items() if f"{module}.".startswith(package)}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert len(imports()) > 200
    assert cycles() == []


def test_only_the_public_module_imports_it() -> None:
    assert not [module for module, imported in imports().items() if "nibblecast" in imported]


def test_formats_import_of_converters_only_what_is_meant_for_them() -> None:
    for module, imported in of(FORMATS).items():
        foreign = {name for name in imported if name.startswith(CONVERTERS)} - FOR_FORMATS
        assert not {name for name in foreign if not name.startswith(ARITHMETIC)}, module


def test_arithmetic_knows_arrays_only() -> None:
    for module, imported in of(ARITHMETIC).items():
        ours = {name for name in imported if name.startswith("nibblecast.")}
        assert not {name for name in ours if not name.startswith((ARITHMETIC, f"{CONVERTERS}errors"))}, module


def test_no_format_imports_another() -> None:
    for module, imported in of(FORMATS).items():
        own = module.split(".")[2:3]
        others = {name.split(".")[2] for name in imported if name.startswith(FORMATS)} - {*own, "encodings"}
        assert not others, module


def test_converters_name_no_format() -> None:
    for module, imported in of(CONVERTERS).items():
        assert not {name for name in imported if name.startswith(FORMATS)}, module


def test_converters_know_no_operator_of_a_format() -> None:
    names = {*schema.BUILTIN_OPERATORS, *(each.name for each in onnx.defs.get_all_schemas())}
    names |= {name for _, name in onnx_operators.CODES_OPERATORS}
    names -= {"ADD", "Shape", "Size"}  # of two numbers in compiled code, columns of a page
    assert {"MatMul", "FULLY_CONNECTED", "QGemm"} <= names
    for module, path in files().items():
        if module.startswith(CONVERTERS):
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not {text for text in texts if text in names or str(text).startswith(("aten.", "prims."))}, module


def test_every_format_package_is_in_the_table() -> None:
    packages = {path.name for path in (ROOT / "formats").iterdir() if (path / "__init__.py").exists()}
    listed = {location.split(".")[2] for f in plugins.FORMATS for location in (f.reader, f.writer) if location}
    assert packages - {"encodings"} == listed


def test_every_reader_and_writer_of_the_table_loads() -> None:
    for format in plugins.FORMATS:
        if format.reader:
            assert callable(plugins.reader(format).read)
        if format.writer:
            assert callable(plugins.writer(format).plan)


def test_the_table_is_alphabetical() -> None:
    names = [format.name for format in plugins.FORMATS]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], ["nibblecast.formats", "onnx", "torch", "safetensors"]),
        (
            ["convert", "fixtures/tflite/cnn_int4_per_channel.tflite", "{tmp}/weights.h"],
            [
                "nibblecast.converters.stages.quantize",
                "nibblecast.converters.reports",
                "jinja2",
                "matplotlib",
                "nibblecast.formats.cheader.reader",
                "onnx",
                "onnx_ir",
                "torch",
                "tflite",
                "safetensors",
                "flatbuffers",
                "rich",
                "pydantic",
                "importlib.metadata",
            ],
        ),
        (
            ["convert", "fixtures/tflite/cnn_int4_per_channel.tflite", "{tmp}/weights.safetensors", "--verify"],
            ["onnx", "onnx_ir", "torch", "tflite", "rich"],
        ),
        (
            ["inspect", "fixtures/tflite/cnn_int4_per_channel.tflite"],
            ["onnx", "onnx_ir", "torch", "tflite", "jinja2", "matplotlib"],
        ),
        (
            ["report", "fixtures/tflite/cnn_int4_per_channel.tflite", "--json"],
            ["onnx", "torch", "jinja2", "matplotlib"],
        ),
    ],
    ids=["help", "to C", "to safetensors", "inspect", "report as JSON"],
)
def test_a_run_imports_no_more_than_it_needs(arguments: list[str], forbidden: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom nibblecast.converters.cli import main\n"
        f"sys.argv = ['nibblecast', *{[a.format(tmp=tmp_path) for a in arguments]!r}]\n"
        "try:\n    main()\nfinally:\n"
        f"    print('IMPORTED', [m for m in {forbidden!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED []"


def test_importing_it_imports_no_executor_and_no_file_system() -> None:
    program = (
        "import sys, nibblecast, nibblecast.converters.batches.run, nibblecast.converters.batches.workers\n"
        "print([name for name in ('dask', 'distributed', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_no_file_is_long() -> None:
    for path in python_files():
        assert len(path.read_text().splitlines()) <= 500, path


def test_no_folder_is_full() -> None:
    folders = Counter(path.parent for path in python_files())
    assert not {folder: files for folder, files in folders.items() if files > 15}


def test_no_file_imports_the_folders_by_their_own_names() -> None:
    """`converters` and `formats` may be modules of the user's."""
    for path in python_files():
        if path != USERS_MODULES:
            assert not re.search(r"^\s*(from|import) (converters|formats)\b", path.read_text("utf-8"), re.MULTILINE), (
                path
            )


#: A module of ours, as code and docstrings name it.
NAMED = re.compile(r"(?<![\w./])(?:nibblecast\.)?((?:converters|formats)(?:\.\w+)+)")


def test_every_module_that_a_text_names_is_there() -> None:
    for path in [*python_files(), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]:
        if path != USERS_MODULES:
            assert not {name for name in named_in(path.read_text("utf-8")) if not is_there(name)}, path


def named_in(text: str) -> Iterator[str]:
    """The modules of ours that a text names, programs in it that are run elsewhere too."""
    yield from (match[1] for match in NAMED.finditer(text) if not match[1].endswith((".py", ".md")))
    for match in re.finditer(r"from nibblecast\.([\w.]+) import ([\w, ]+)", text):
        yield from (f"{match[1]}.{name.split()[0]}" for name in match[2].split(",") if name.strip())


def is_there(name: str) -> bool:
    """Whether a dotted name is a module or a package of ours, or something in one."""
    place = ROOT
    for part in name.split("."):
        if not (place / part).is_dir():
            init = place / "__init__.py"
            return (place / f"{part}.py").exists() or (init.exists() and part in init.read_text("utf-8"))
        place /= part
    return True


def test_no_test_module_is_imported() -> None:
    """What several test modules need lies in a helper module, so that each of them can be changed alone."""
    for path in python_files():
        imported = re.search(
            r"^\s*(from tests\b.*|import tests\b.*|from \.\S* import )\btest_", path.read_text("utf-8"), re.MULTILINE
        )
        assert imported is None, path


def test_no_file_has_what_a_merge_left_in_it() -> None:
    marks = ("<<<<<<< ", ">>>>>>> ")
    for path in ROOT.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        if not hidden and "build" not in path.parts and path.suffix in (".md", ".py", ".toml", ".template"):
            assert not [line for line in path.read_text("utf-8").splitlines() if line.startswith(marks)], path


#: Calls that make, open or remove files by their names.
FILE_CALLS = frozenset(
    "open read_bytes read_text write_bytes write_text touch symlink_to hardlink_to unlink rmdir rmtree mkdtemp mkstemp "
    "TemporaryDirectory NamedTemporaryFile memmap fromfile tofile".split()
)
#: What opens files otherwise than by name: classes of ours, and a plan's `open`, which gets streams.
OPENED_OTHERWISE = frozenset(("open", owner) for owner in ("MappedFile", "Archive", "_ModelFile", "plan"))
#: Our own files, and the system's about this process.
FILES_OF_OURS = frozenset(
    (
        "converters/batches/run_job.py",
        "converters/batches/run.py",
        "converters/cli/streams.py",
        "converters/reports/page.py",
        "formats/cheader/render.py",
        "formats/onnx/file/validation.py",
        "formats/tflite/to_onnx/documentation.py",
    )
)
#: Where files are opened for reading, and made. Each checks what it opens: a FIFO would be waited for, a link followed.
FILE_MODULES = ("converters/storage.py", "converters/output/")


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_files_are_opened_and_made_in_one_place() -> None:
    for package in ("converters", "formats"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name in FILES_OF_OURS or name.startswith(FILE_MODULES):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _name(node.func) in FILE_CALLS:
                    owner = _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
                    assert (_name(node.func), owner) in OPENED_OTHERWISE, f"{name}:{node.lineno}"
