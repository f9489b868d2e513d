"""Options of readers: where they go, and what is said of those that no reader has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nibblecast
from nibblecast.converters.cli import app
from nibblecast.converters.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
QAT = FIXTURES / "pytorch" / "qat_converted.pt"
TFLITE = FIXTURES / "tflite" / "mlp_int4_odd.tflite"


def test_load_takes_the_readers_options() -> None:
    assert nibblecast.load(QAT, bits=8)["fc.weight"].dtype == np.int8
    assert "conv.bn.weight" in nibblecast.load(QAT)
    assert "conv.bn.weight" not in nibblecast.load(QAT, fold_batch_norm=True)


def test_convert_divides_options_between_reader_and_writer(tmp_path: Path) -> None:
    nibblecast.convert(QAT, tmp_path / "w.h", fold_batch_norm=True, prefix="kws")
    assert "kws_tensors" in (tmp_path / "w.h").read_text()
    assert "conv.bn.weight" not in nibblecast.load(tmp_path / "w.h")


def test_an_option_may_name_the_readers_format(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    nibblecast.convert(QAT, target, **{"pytorch.bits": 8})
    assert nibblecast.load(target)["fc.weight"].dtype == np.int8


def test_unknown_options_name_what_there_is() -> None:
    with pytest.raises(UsageError, match="has no option 'bats': it has bits, fold-batch-norm, int4-cpu-layout"):
        nibblecast.load(QAT, bats=4)
    with pytest.raises(UsageError, match="the reader of format 'tflite' has no options, but bits is given"):
        nibblecast.load(TFLITE, bits=4)
    with pytest.raises(UsageError, match="no reader of these files has an option 'prefix'"):
        nibblecast.verify(TFLITE, TFLITE, prefix="x")


def test_verify_gives_each_file_the_options_of_its_format(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    nibblecast.convert(QAT, target, fold_batch_norm=True)
    assert nibblecast.verify(QAT, target, fold_batch_norm=True).equal
    assert not nibblecast.verify(QAT, target).equal


def test_the_command_line_takes_them_everywhere(tmp_path: Path) -> None:
    target = str(tmp_path / "w.safetensors")
    for arguments in (
        ["inspect", str(QAT), "--opt", "bits=4"],
        ["convert", str(QAT), target, "--opt", "fold-batch-norm=true", "--verify"],
        ["verify", str(QAT), target, "--opt", "fold-batch-norm=true"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(app, ["formats", "pytorch"]).output
    assert "fold-batch-norm" in listed
