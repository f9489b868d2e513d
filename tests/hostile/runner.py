"""Runs commands on files in processes that have imported everything before: python -m tests.hostile.runner.

Thousands of commands in as many interpreters would take an hour. Here one process imports what commands need, and forks
another for each file; that runs the commands one after the other, each under limits of time and memory, with files of
its own as standard output and error. Where a command ends the process, another one goes on with the next command.

The task is a JSON file: {"folder": where to work, "jobs": how many at a time, "tasks": [[kind, path], …]}; each task's
results are lines of JSON in a file of the folder.
"""

from __future__ import annotations

import functools
import gc
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import typer.main

from tests.fuzz import preparation
from tests.fuzz.limits import Limits, end_with_traces, limited
from tests.hostile.commands import BYTES, GOOD, GOOD_ONNX, REPORT, SECONDS, Ended, commands_for, more_commands_for

_PRELOADED = ("onnxruntime", "rich.table", "rich.progress", "matplotlib.figure", "onnx_ir")
RESULTS = "results"
_LIMITS = Limits(processor=2 * SECONDS, clock=150.0, memory=BYTES)
_MOST_PRINTED = 1 << 24


class Place:
    """Where a file's commands run: the file in a folder of its own, an empty folder for outputs, and one to be in."""

    def __init__(self, folder: Path, kind: str, source: Path) -> None:
        self.folder, self.kind = folder, kind
        self.out, self.cwd, self.inputs = folder / "out", folder / "cwd", folder / "in"
        for each in (self.out, self.cwd):
            each.mkdir(parents=True, exist_ok=True)
        if kind == "batch" or not source.is_dir():
            self.input = self.inputs / source.name
            if kind == "report":
                self.input = self.inputs / REPORT
        else:
            self.input = self.inputs / source.name
        if not self.inputs.exists():
            self._copy(source)
        main = self.input / "model.h"
        self.given = main if main.exists() else self.input
        self.before = self._files(self.inputs)
        self.models = len(self.before) if kind == "batch" else 1

    def _copy(self, source: Path) -> None:
        self.inputs.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, self.input)
        else:
            shutil.copy(source, self.input)
        if self.kind == "report":
            models = self.folder / "good"
            models.mkdir()
            shutil.copy(GOOD, models / "model.tflite")

    def arguments(self, command: str) -> list[str]:
        """The command with the paths in it."""
        paths = {
            "input": str(self.given),
            "folder": str(self.input if self.kind == "batch" else self.inputs),
            "out": str(self.out),
            "good": str(GOOD),
            "good_onnx": str(GOOD_ONNX),
            "good_folder": str(self.folder / "good"),
        }
        return [word.format(**paths) for word in shlex.split(command)]

    def outputs(self) -> list[str]:
        """What is in the folder for outputs."""
        return [str(path.relative_to(self.out)) for path in sorted(self.out.rglob("*")) if not path.is_dir()]

    def strays(self) -> list[str]:
        """What is elsewhere, and was not there before. A report that is gone on with is written anew."""
        found = self._files(self.inputs) if self.kind != "report" else self.before
        changed = [path for path, content in found.items() if self.before.get(path) != content]
        return [*changed, *(path for path in self.before if path not in found), *self._files(self.cwd)]

    def clean(self) -> None:
        """Makes the folders as they were; a batch goes on with what it has."""
        if self.kind != "batch":
            shutil.rmtree(self.out, ignore_errors=True)
            self.out.mkdir()

    @staticmethod
    def _files(folder: Path) -> dict[str, tuple[int, int]]:
        statuses = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
        return {path: (status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


def run(place: Place, command: str) -> Ended:
    """Runs a command in this process."""
    arguments = place.arguments(command)
    paths = [place.folder / "stdout", place.folder / "stderr"]
    kept = [os.dup(number) for number in (1, 2)]
    began = time.process_time() + _of_children()
    try:
        for number, path in enumerate(paths, 1):
            handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(handle, number)
            os.close(handle)
        code, traces = _code(arguments)
    finally:
        for number, handle in enumerate(kept, 1):
            os.dup2(handle, number)
            os.close(handle)
    seconds = time.process_time() + _of_children() - began
    out, err = (path.read_bytes()[:_MOST_PRINTED].decode("utf-8", "backslashreplace") for path in paths)
    return Ended(command, code, out, err, seconds, place.outputs(), place.strays(), place.models, traces)


def _code(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code that the interpreter would have had, and a traceback."""
    from nibblecast.converters.cli import main

    sys.argv = ["nibblecast", *arguments]
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), "utf-8", "backslashreplace", write_through=number == 2)
        for number in (1, 2)
    )
    try:
        with limited(_LIMITS, 0):
            main()
        code, traces = 0, ""
    except SystemExit as ended:
        code, traces = int(ended.code or 0) if isinstance(ended.code, int | None) else 1, ""
    except BaseException:
        traces = traceback.format_exc()
        code = 1
        sys.stderr.write(traces)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code, traces


def _warm_up(folder: Path) -> None:
    """Runs the commands on a good file, so that what is done once in a process is done here."""
    place = Place(folder, "tflite", GOOD)
    for command in commands_for("tflite"):
        run(place, command)
        place.clean()


def _of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _work(folder: Path, kind: str, source: Path) -> None:
    """Runs what is left to be run of a file's commands."""
    parent = os.getppid()
    place = Place(folder, kind, source)
    os.chdir(place.cwd)
    with (folder / "trace").open("w") as log, (folder / RESULTS).open("a") as lines:
        end_with_traces(log)
        while os.getppid() == parent and (command := _next(folder, kind)):
            lines.write(f"{json.dumps(asdict(run(place, command)))}\n")
            lines.flush()
            place.clean()


def _next(folder: Path, kind: str) -> str | None:
    """The command after those that have ended."""
    done = results_in(folder)
    commands = commands_for(kind) + (more_commands_for(kind, done[0]) if done else [])
    return commands[len(done)] if len(done) < len(commands) else None


def results_in(folder: Path) -> list[Ended]:
    """How commands have ended so far."""
    results = folder / RESULTS
    return [Ended(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []


class _Turn:
    """A file's commands, in one process after the other."""

    def __init__(self, folder: Path, kind: str, source: str) -> None:
        self._folder, self._kind, self._source = folder, kind, Path(source)
        self._folder.mkdir(parents=True)
        self.process = self._start()

    def _start(self) -> BaseProcess:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_work, args=(self._folder, self._kind, self._source))
        process.start()
        return process

    def goes_on(self) -> bool:
        """Whether there is more to do, once the process has ended."""
        self.process.join()
        command = _next(self._folder, self._kind)
        if command is None:
            return False
        code = self.process.exitcode or 0
        traces = (self._folder / "trace").read_text() or "the process is gone"
        with (self._folder / RESULTS).open("a") as lines:
            lines.write(f"{json.dumps(asdict(Ended(command, code if code < 0 else 1, traces=traces)))}\n")
        if _next(self._folder, self._kind) is None:
            return False
        self.process = self._start()
        return True


def main() -> None:
    """Runs the task that the first argument names."""
    task = json.loads(Path(sys.argv[1]).read_text())
    preparation.prepare(guided=False)
    os.environ.pop("NIBBLECAST_MAX_EXPANSION")  # what users have
    preparation.preload(_PRELOADED)
    typer.main.get_command = functools.cache(typer.main.get_command)  # all commands anew would be most of the time
    _warm_up(Path(task["folder"]) / "good")
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = list(enumerate(task["tasks"]))
    running: list[_Turn] = []
    while waiting or running:
        while waiting and len(running) < task["jobs"]:
            number, (kind, source) = waiting.pop(0)
            running.append(_Turn(Path(task["folder"]) / str(number), kind, source))
        multiprocessing.connection.wait([turn.process.sentinel for turn in running])
        running = [turn for turn in running if turn.process.is_alive() or turn.goes_on()]


if __name__ == "__main__":
    main()
