"""Two models on the same inputs: what does not go together is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import nibblecast
from nibblecast.converters.compare.running import read_inputs
from nibblecast.converters.errors import CorruptFile, UsageError
from tests.formats.onnx.writing.onnx_graphs import info, node, save

FIXTURES = Path(__file__).parents[2] / "fixtures"


def model(path: Path, *inputs: str, outputs: tuple[str, ...] = ("y",), shape: tuple[int, ...] = (2, 3)) -> Path:
    """The sum of its inputs, as each output."""
    nodes = [node("Sum", [*inputs], [output]) for output in outputs]
    return save(path, nodes, [], [info(name, *shape) for name in inputs], [info(name, *shape) for name in outputs])


def test_models_that_compute_the_same(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a.onnx", "x", "z"), model(tmp_path / "b.onnx", "p", "q", outputs=("r",))
    (difference,) = nibblecast.compare_outputs(a, b, inputs={"x": np.full((2, 3), 5.0), "z": np.ones((2, 3))})
    assert (difference.name, difference.shape, difference.largest, difference.relative) == ("y", (2, 3), 0, 0)
    assert difference.scale_of_values == 6


def test_inputs_of_one_name_are_the_same_in_any_order(tmp_path: Path) -> None:
    """And those of other names are taken by their places."""
    minus = [node("Sub", ["x", "z"], ["y"])]
    a = save(tmp_path / "a.onnx", minus, [], [info("x", 2), info("z", 2)], [info("y", 2)])
    b = save(tmp_path / "b.onnx", minus, [], [info("z", 2), info("x", 2)], [info("y", 2)])
    renamed = [node("Sub", ["p", "q"], ["y"])]
    c = save(tmp_path / "c.onnx", renamed, [], [info("q", 2), info("p", 2)], [info("y", 2)])
    given = {"x": np.float32([5, 5]), "z": np.float32([1, 1])}
    assert nibblecast.compare_outputs(a, b, inputs=given)[0].largest == 0
    assert nibblecast.compare_outputs(a, c, inputs=given)[0].largest == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nope": np.ones((2, 3))}, r"a\.onnx: unknown input 'nope': the model has x, z"),
        ({"x": np.ones(6)}, r"a\.onnx: input 'x' has 1 axes, but the model expects 2"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    a, b = model(tmp_path / "a.onnx", "x", "z"), model(tmp_path / "b.onnx", "x", "z")
    with pytest.raises(UsageError, match=message):
        nibblecast.compare_outputs(a, b, inputs=given)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    a = model(tmp_path / "a.onnx", "x", "z")
    with pytest.raises(UsageError, match=r"b\.onnx: has 1 inputs or outputs where the other model has 2"):
        nibblecast.compare_outputs(a, model(tmp_path / "b.onnx", "p"))
    with pytest.raises(UsageError, match=r"b\.onnx: has 1 inputs or outputs where the other model has 2"):
        nibblecast.compare_outputs(
            model(tmp_path / "two.onnx", "x", outputs=("y", "w")), model(tmp_path / "b.onnx", "x", outputs=("r",))
        )
    flat = [node("Reshape", ["x", "s"], ["y"])]
    shape = helper.make_tensor("s", TensorProto.INT64, [1], [6])
    b = save(tmp_path / "b.onnx", flat, [shape], [info("x", 2, 3)], [info("y", 6)])
    with pytest.raises(UsageError, match=r"output 'y' has shape \(6,\) where the other model's has \(2, 3\)"):
        nibblecast.compare_outputs(model(tmp_path / "one.onnx", "x"), b)


def test_an_input_of_words_is_not_made_up(tmp_path: Path) -> None:
    words = [node("Identity", ["x"], ["y"])]
    ports = [info("x", 2, dtype=TensorProto.STRING)], [info("y", 2, dtype=TensorProto.STRING)]
    source = save(tmp_path / "a.onnx", words, [], *ports)
    with pytest.raises(UsageError, match="input 'x' is not numeric"):
        nibblecast.compare_outputs(source, source)


def test_a_format_without_a_runtime(tmp_path: Path) -> None:
    source = next((FIXTURES / "gguf").glob("*.gguf"))
    with pytest.raises(UsageError, match="models of format 'gguf' cannot be run; only those of onnx, tflite can"):
        nibblecast.compare_outputs(source, source)


def test_files_of_inputs(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.ones(3))
    assert read_inputs(path)["x"].tolist() == [1, 1, 1]
    np.savez(path)
    with pytest.raises(CorruptFile, match=r"inputs\.npz: contains no named arrays: write it with np\.savez"):
        read_inputs(path)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(CorruptFile, match=r"one\.npy: contains no named arrays"):
        read_inputs(tmp_path / "one.npy")
    path.write_bytes(b"no arrays")
    with pytest.raises(CorruptFile, match=r"inputs\.npz: cannot be read as named arrays \(\.npz\): "):
        read_inputs(path)


def test_as_many_formats_as_targets(tmp_path: Path) -> None:
    source = FIXTURES / "tflite" / "mlp_float32.tflite"
    with pytest.raises(UsageError, match="2 targets, but 1 formats"):
        nibblecast.convert(source, tmp_path / "a", tmp_path / "b", to=["onnx"])
