"""Reports with lines that `batch` cannot have written: each is passed over as a torn one is, whatever is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches.records import REPORT, Failure, Output, Record, read_report, record_of, write_report
from nibblecast.converters.errors import CorruptFile

ROOT = Path(__file__).parents[2]
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
GOOD = Record(
    "a.tflite",
    "0" * 64,
    "to=onnx",
    (Output("a.onnx", 10, "1" * 64),),
    ({"tensor": "t", "kind": "renamed", "detail": "d"},),
    verified=True,
    seconds=1.5,
    peak_memory=1 << 20,
)
BAD = Record("b.tflite", "", "to=onnx", failure=Failure(3, "is broken", transient=True))

#: Values that are of another type than any field, or out of any range.
VALUES = [
    "{}",
    "[]",
    "[{}]",
    "[[]]",
    "1e999",
    "-1e999",
    "NaN",
    "-1",
    "1.5e300",
    "9" * 30,
    "1" + "0" * 400,
    "true",
    "null",
]
VALUES += [
    '"x"',
    '["x"]',
    '{"x": {}}',
    "[" * 1_000 + "]" * 1_000,
    "0.5",
    "9" * 5_000,
    '"\\u0000"',
    '"\\ud800"',
    '"../x"',
    '"/x"',
]


def fields(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in a document."""
    found = [path] if path else []
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            found += fields(value, (*path, key))
    return found


def with_value(record: Record, path: tuple[Any, ...], value: str) -> str:
    """The record's line with JSON at a place."""
    document = json.loads(record.line())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "HERE"
    return json.dumps(document).replace('"HERE"', value) + "\n"


def damaged_lines() -> list[str]:
    lines = [
        with_value(record, path, value)
        for record in (GOOD, BAD)
        for path in fields(json.loads(record.line()))
        for value in VALUES
    ]
    for record in (GOOD, BAD):
        document = json.loads(record.line())
        lines += [json.dumps({**document, "more": 1}) + "\n", json.dumps([document]) + "\n"]
        lines += [
            json.dumps({key: value for key, value in document.items() if key != left}) + "\n" for left in document
        ]
    return [
        *lines,
        "null\n",
        "[]\n",
        "1\n",
        '"text"\n',
        "\n",
        "\0\n",
        "{\n",
        "[" * 100_000 + "\n",
        '{"a":' * 100_000 + "\n",
    ]


def is_sound(record: Record) -> bool:
    """Whether all values are of the types that the dataclasses declare, and numbers neither negative nor endless."""
    numbers = [record.source_bytes, record.attempts, *(output.bytes for output in record.outputs)]
    numbers += [] if record.peak_memory is None else [record.peak_memory]
    texts = [record.source, record.sha256, record.request, record.nibblecast, record.version]
    texts += [text for output in record.outputs for text in (output.path, output.sha256)]
    texts += [text for loss in record.losses for text in (*loss, *loss.values())]
    if record.failure is not None:
        numbers.append(record.failure.exit_code)
        texts.append(record.failure.message)
        assert type(record.failure.transient) is bool
    return (
        all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        and all(type(text) is str for text in texts)
        and type(record.seconds) in (int, float)
        and 0 <= record.seconds < 1 << 63
        and (record.verified is None or type(record.verified) is bool)
    )


def test_each_line_is_a_sound_record_or_none() -> None:
    lines = damaged_lines()
    records = [record_of(line) for line in lines]
    assert len(lines) > 800
    assert all(record is None or is_sound(record) for record in records)
    assert sum(record is None for record in records) > len(lines) * 3 // 4
    assert record_of(GOOD.line()) == GOOD
    assert record_of(BAD.line()) == BAD


@pytest.mark.parametrize("value", ['"/etc/passwd"', '"../x"', '"a/../../x"', '""', '"a\\u0000b"', '"\\ud800"'])
def test_outputs_lie_below_the_target(value: str) -> None:
    assert record_of(with_value(GOOD, ("outputs", 0, "path"), value)) is None


def test_the_status_is_what_the_failure_says() -> None:
    assert record_of(with_value(GOOD, ("status",), '"failed"')) is None
    assert record_of(with_value(BAD, ("status",), '"done"')) is None


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A batch's target whose report has, beside the record of its model, all damaged lines."""
    (tmp_path / "in").mkdir()
    shutil.copy(INT4, tmp_path / "in" / "z.tflite")
    nibblecast.batch(tmp_path / "in", tmp_path / "out", "safetensors")
    report = tmp_path / "out" / REPORT
    own = report.read_text()
    report.write_text(
        "".join(damaged_lines()) + own + "".join(line.rstrip("\n") + "\x00\n" for line in damaged_lines())
    )
    return tmp_path / "out"


def test_report_and_resume_go_on(damaged: Path, tmp_path: Path) -> None:
    document = nibblecast.report(damaged, tmp_path / "page.html").document()
    json.dumps(document, allow_nan=False)
    for arguments in (["report", damaged, "--json"], ["report", damaged, "-o", tmp_path / "b.html"]):
        command = [sys.executable, "-m", "nibblecast", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
    (record,) = nibblecast.batch(tmp_path / "in", damaged, "safetensors", settings=BatchSettings(resume=True)).records
    assert record.kept
    assert [record_of(line) for line in (damaged / REPORT).read_text().splitlines()] == [record]


@pytest.mark.parametrize("line", [line for line in damaged_lines() if record_of(line) is None][::29])
def test_a_report_of_damaged_lines_alone_holds_no_record(line: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(line)
    with pytest.raises(CorruptFile, match="contains no records of a batch"):
        nibblecast.report(tmp_path / "r.jsonl")


def no_file(path: Path) -> None:
    path.mkdir()


def no_end(path: Path) -> None:
    os.mkfifo(path)


def no_text(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 100)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [no_file, no_end, no_text, a_loop])
def test_what_is_no_report_is_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / REPORT)
    assert read_report(tmp_path / REPORT) == {}


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Nothing is left of one that is not written to its end."""
    write_report(tmp_path / REPORT, [GOOD])
    before = (tmp_path / REPORT).read_bytes()

    class NoText(str):
        __slots__ = ()

        def __lt__(self, other: object) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / REPORT, [Record(NoText("b"), "", ""), Record(NoText("a"), "", "")])
    assert (tmp_path / REPORT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]
