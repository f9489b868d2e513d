"""The command line on standard streams that are closed, full, cut off or of another encoding, and when it is
interrupted: an exit code that is documented, one line at most, and every file that was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.batches.places import write_models

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
PYTHON = [sys.executable, "-m", "nibblecast"]
#: What the module of the command line is imported for, one after the other, and things that its runs import.
IMPORTED = (
    "typer",
    "numpy",
    "ml_dtypes",
    "nibblecast.converters.conversion",
    "nibblecast.converters.cli.batch",
    "nibblecast.converters.cli.commands",
)


def shell(redirection: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A command with redirections as `sh` writes them."""
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *PYTHON, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(command, capture_output=True, check=False, env=environment, stdin=subprocess.DEVNULL)


def assert_tidy(done: subprocess.CompletedProcess[bytes], code: int, lines: int = 0) -> None:
    """The exit code and the number of lines on stderr."""
    assert done.returncode == code, done.stderr.decode()
    assert len(done.stderr.splitlines()) == lines, done.stderr.decode()


@pytest.mark.parametrize(
    ("redirection", "code", "lines"),
    [
        ("2>&-", 0, 0),
        (">&-", 0, 0),
        ("<&-", 0, 0),
        ("<&- >&- 2>&-", 0, 0),
        (">/dev/full", 2, 1),
        ("2>/dev/full", 0, 0),
        (">/dev/full 2>/dev/full", 2, 0),
        (">/dev/full 2>&-", 2, 0),
        ('| head -c 1 >/dev/null; exit "${PIPESTATUS[0]}"', 0, 0),
        ('| true; exit "${PIPESTATUS[0]}"', 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["convert", INT4, "out.safetensors", "out.onnx", "--verify"], ["out.onnx", "out.safetensors"]),
        (["report", INT4, "-o", "out.html"], ["out.html"]),
        (["inspect", INT4], []),
        (["inspect", INT4, "--json"], []),
        (["--help"], []),
    ],
    ids=lambda value: " ".join(str(part) for part in value if part != INT4) or "-",
)
def test_streams_that_take_nothing(
    command: list[object], written: list[str], redirection: str, code: int, lines: int, tmp_path: Path
) -> None:
    command = [tmp_path / part if str(part).startswith("out.") else part for part in command]
    done = shell(redirection, *command)
    assert_tidy(done, code, lines)
    if lines:
        assert done.stderr == b"nibblecast: cannot write to standard output: No space left on device\n"
    assert {*written} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "command", [["verify", INT4, INT4], ["formats"], ["formats", "onnx"], ["report", INT4, "--json"], ["--version"]]
)
def test_every_command_says_that_its_output_was_not_taken(command: list[object]) -> None:
    assert_tidy(shell(">/dev/full", *command), 2, 1)
    assert_tidy(shell("2>&-", *command), 0)


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">/dev/full", "2>/dev/full", "| true", "<&- >&- 2>&-"])
def test_an_error_is_told_where_it_can_be(redirection: str) -> None:
    pipe = '; exit "${PIPESTATUS[0]}"' * redirection.startswith("|")
    assert_tidy(shell(redirection + pipe, "inspect", "nothing.tflite"), 3, 0 if "2>" in redirection else 1)


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">/dev/full", "2>/dev/full", "| true", "<&- >&- 2>&-"])
def test_a_batch_is_done_whatever_its_streams_are(redirection: str, tmp_path: Path) -> None:
    """Its workers have the same streams; a worker's pipe is none of them."""
    models = write_models(tmp_path / "models")
    pipe = '; exit "${PIPESTATUS[0]}"' * redirection.startswith("|")
    done = shell(redirection + pipe, "batch", models, tmp_path / "out", "--to", "safetensors", "--exclude", "*.bin")
    assert done.returncode == 7, done.stderr
    lines = done.stderr.decode().splitlines()
    if redirection == ">/dev/full":
        assert lines.pop() == "nibblecast: cannot write to standard output: No space left on device"
    assert all(": " in line and line.split()[1] in ("done:", "failed:") for line in lines), lines
    records = [json.loads(line) for line in (tmp_path / "out" / "nibblecast-report.jsonl").read_text().splitlines()]
    assert [record["source"] for record in records if record["status"] == "failed"] == ["broken.tflite"]
    assert all((tmp_path / "out" / output["path"]).is_file() for record in records for output in record["outputs"])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nothing_that_is_opened_gets_the_number_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    """What a library prints would be in it, and what a program that is started prints."""
    shown = tmp_path / "shown"
    program = (
        "import os, subprocess\nfrom nibblecast.converters.cli import streams\nstreams.open_standard_streams()\n"
        f"handle = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "open = [number for number in range(3) if os.get_inheritable(number)]\n"
        f"os.write(os.open({str(shown)!r}, os.O_WRONLY | os.O_CREAT), f'{{handle}} {{open}}'.encode())\n"
    )
    command = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", program]
    subprocess.run(command, check=True, cwd=ROOT)
    number, _, inherited = shown.read_text().partition(" ")
    assert int(number) > 2
    assert inherited == "[0, 1, 2]"


ENCODINGS: Mapping[str, Mapping[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
    "LC_ALL=C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_that_lack_characters(encoding: str, tmp_path: Path) -> None:
    """Names, the sign × of shapes, and paths appear as escapes."""
    more = ENCODINGS[encoding]
    source = tmp_path / "模型.safetensors"
    save_file({"中/weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), "é": np.zeros(3)}, source)
    shown = shell("", "inspect", source, **more)
    assert_tidy(shown, 0)
    assert rb"\u4e2d/weight" in shown.stdout
    assert rb"2\xd732" in shown.stdout or b"2\xd732" in shown.stdout
    title, row = (next(line for line in shown.stdout.splitlines() if word in line) for word in (b"shape", rb"\u4e2d"))
    assert title.index(b"shape") == row.index(b"2", len(rb"\u4e2d/weight")), "widths are counted with the escapes"
    gone = shell("", "inspect", tmp_path / "無.gguf", **more)
    assert_tidy(gone, 3, 1)
    assert gone.stderr.isascii()


def test_every_command_where_only_ascii_can_be_printed(tmp_path: Path) -> None:
    source = tmp_path / "模型.safetensors"
    save_file({"中/weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)}, source)
    for command in (
        ["inspect", source, "--json"],
        ["convert", source, tmp_path / "中.safetensors", "--quantize", "int4,block=32", "--verify"],
        ["verify", source, tmp_path / "中.safetensors"],
        ["report", source, "-o", tmp_path / "中.html"],
        ["batch", tmp_path, tmp_path / "中", "--to", "safetensors", "--jobs", 1, "--quiet"],
        ["formats"],
        ["convert", "--help"],
    ):
        done = shell("", *command, **ENCODINGS["LC_ALL=C"])
        assert_tidy(done, 6 if command[0] == "verify" else 0)
    assert {"中.safetensors", "中.html", "中"} <= {path.name for path in tmp_path.iterdir()}


def test_a_list_on_standard_input_may_have_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"n\xff.tflite")
    (tmp_path / name).write_bytes(INT4.read_bytes())
    command = ["bash", "-c", r"""printf '%s/n\xff.tflite\n' "$1" | "${@:2}" """, "bash", str(tmp_path), *PYTHON]
    command += ["batch", "-", str(tmp_path / "out"), "--to", "safetensors", "--quiet"]
    done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
    assert_tidy(done, 0)
    assert (tmp_path / "out" / os.fsdecode(b"n\xff.safetensors")).is_file()


def interrupted(module: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line; the moment a module begins to be imported, the signal comes."""
    program = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            os.kill(os.getpid(), {number})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['nibblecast', *{list(arguments)!r}]\n"
        "from nibblecast.converters.cli import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("module", IMPORTED)
def test_an_interruption_while_it_starts(module: str) -> None:
    done = interrupted(module, signal.SIGINT, "--help")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "nibblecast: interrupted: nothing was left half written\n"
    done = interrupted(module, signal.SIGTERM, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize(
    "module",
    [
        "nibblecast.formats.tflite.reader",
        "nibblecast.formats.onnx.writer",
        "onnx_ir",
        "nibblecast.converters.arithmetic.accuracy",
    ],
)
def test_an_interruption_while_it_works(module: str, tmp_path: Path) -> None:
    """Also where a KeyboardInterrupt goes through Python's exec(), for which it would end itself by a signal."""
    target = str(tmp_path / "out.onnx")
    command = ["convert", str(INT4), target, "--quantize", "int4,block=32,requantize", "--verify"]
    done = interrupted(module, signal.SIGINT, *command)
    assert (done.returncode, done.stderr) == (130, "nibblecast: interrupted: nothing was left half written\n")
    done = interrupted(module, signal.SIGTERM, *command)
    assert (done.returncode, done.stderr) == (143, "")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_that_python_can_only_print_comes_again() -> None:
    """It came while a finalizer ran, in which no exception leads anywhere."""
    program = (
        "import os, signal, sys, time\n"
        "from nibblecast.converters.cli import commands\n"
        "class Finalized:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(10): pass\n"
        "def work(**_):\n"
        "    Finalized()\n"
        "    time.sleep(60)\n"
        "commands.app = work\n"
        "from nibblecast.converters.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "nibblecast: interrupted: nothing was left half written\n")


def test_an_interruption_within_exec_is_the_same(tmp_path: Path) -> None:
    """Where a KeyboardInterrupt goes through exec() of text, as of dataclasses, `python -m` ends by SIGINT itself."""
    (tmp_path / "probe.py").write_text(
        "import os, signal\n"
        "from nibblecast.converters.cli import commands, main\n"
        "commands.app = lambda **_: exec('os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(99): pass')\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-m", "probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (130, "nibblecast: interrupted: nothing was left half written\n")


def test_an_interruption_that_is_to_be_ignored_is() -> None:
    """As `nohup` and shells in scripts have it for what runs in the background."""
    program = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program += "from nibblecast.converters.cli import main\nimport sys, os\nos.kill(os.getpid(), signal.SIGINT)\n"
    program += "sys.argv = ['nibblecast', '--version']\nmain()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_imported_before_signals_are_seen_to_is_next_to_nothing() -> None:
    program = (
        "import sys\nbefore = set(sys.modules)\n"
        "import nibblecast.converters.cli\nprint(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = done.stdout.split()
    assert "nibblecast.converters.cli" in imported
    assert [name for name in imported if name.startswith("nibblecast")] == [
        "nibblecast",
        "nibblecast.converters",
        "nibblecast.converters.cli",
        "nibblecast.converters.cli.signals",
    ]
    assert not {"typing", "pathlib", "contextlib", "dataclasses", "numpy", "typer"}.intersection(imported)


def test_warnings_of_libraries_are_not_shown_and_our_own_are_one_line(tmp_path: Path) -> None:
    program = (
        "import logging, sys, warnings\n"
        "from nibblecast.converters.cli import commands\n"
        "from nibblecast.converters.errors import Notice\n"
        "def work(**_):\n"
        "    import numpy as np\n"
        "    np.array([np.inf]).astype(np.int8)\n"
        "    warnings.warn('old', DeprecationWarning, stacklevel=1)\n"
        "    logging.getLogger('urllib3').error('GET https://u:p@h/x')\n"
        "    warnings.warn('a\\nplugin is broken https://u:p@h/x?sig=s ' + 'n' * 1000000, Notice, stacklevel=1)\n"
        "commands.app = work\n"
        "from nibblecast.converters.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(r"nibblecast: warning: a\nplugin is broken https://***@h/x?sig=*** nnn")
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 3_000


LONG = "n" * 1_000_000


def test_lines_and_cells_are_of_limited_length_and_json_has_names_whole(tmp_path: Path) -> None:
    source = tmp_path / "long.safetensors"
    save_file({LONG: np.ones((2, 32), np.float32), "b": np.ones((2, 32), np.float32)}, source)
    for command, code in (
        (["inspect", source], 0),
        (["convert", source, tmp_path / "a.gguf"], 4),
        (["convert", source, tmp_path / "a.onnx", "--quantize", "int4,block=32"], 0),
        (["convert", source, tmp_path / "a.h"], 0),
        (["verify", source, INT4], 6),
        (["convert", source, tmp_path / "b.h", "--only", LONG[:1_000] + "x"], 2),
        (["report", source, "-o", tmp_path / "a.html"], 0),
    ):
        done = shell("", *command)
        assert done.returncode == code, done.stderr[-500:]
        for line in (*done.stdout.splitlines(), *done.stderr.splitlines()):
            assert len(line) < 4_000, (command[0], len(line))
    assert len((tmp_path / "a.html").read_bytes()) < 200_000
    names = [tensor["name"] for tensor in json.loads(shell("", "inspect", source, "--json").stdout)["tensors"]]
    assert names == ["b", LONG] or names == [LONG, "b"]


def test_a_bug_is_a_traceback_and_exit_1(tmp_path: Path) -> None:
    program = "from nibblecast.converters.cli import commands, main\ncommands.app = lambda **_: 1 / 0\nmain()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_what_the_system_refuses_unforeseen_is_one_line(tmp_path: Path) -> None:
    program = (
        "from nibblecast.converters.cli import commands, main\n"
        "def work(**_):\n    open('/nowhere/x')\n"
        "commands.app = work\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "nibblecast: /nowhere/x: No such file or directory\n")
