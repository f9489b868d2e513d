"""What operators refuse: models of one operator that ONNX cannot express, or that contradict themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.options import OPTIONS
from tests.formats.tflite.models import Fields, constant, ints, operator, subgraph, table, tensor, whole

_SCALARS = {"b": np.int8, "i": np.int32, "?": np.bool_, "f": np.float32}


def floats(name: str, *shape: int, signature: Sequence[int] | None = None) -> Fields:
    made = tensor(name, "FLOAT32", shape)
    return made if signature is None else made | table(schema.Tensor, shape_signature=ints(*signature))


def weights(name: str, *shape: int) -> tuple[Fields, bytes]:
    return constant(name, "FLOAT32", shape, bytes(4 * int(np.prod(shape))))


def integers(name: str, *values: int) -> tuple[Fields, bytes]:
    return constant(name, "INT32", (len(values),), ints(*values).tobytes())


def options(name: str, **values: float) -> Fields:
    fields = OPTIONS[name]
    return {fields[key].slot: _SCALARS[fields[key].format](value) for key, value in values.items()}


def call(name: str, inputs: Sequence[int], outputs: Sequence[int], code: int = 0, **values: float) -> Fields:
    """An operator with the options that it has."""
    if name not in OPTIONS:
        return operator(code, inputs, outputs)
    return operator(code, inputs, outputs, builtin_options=options(name, **values))


def refused(
    folder: Path,
    name: str,
    tensors: Sequence[Any],
    message: str,
    kind: type[Error],
    inputs: Sequence[int] | None = None,
    results: int = 1,
    **values: float,
) -> None:
    """Expects an error for an operator that takes all tensors but the last ones, which are its results."""
    taken = range(len(tensors) - results) if inputs is None else inputs
    made = [*range(len(tensors) - results, len(tensors))]
    with pytest.raises(kind, match=message) as caught:
        convert(folder, tensors, [call(name, [*taken], made, **values)], [name], outputs=made)
    assert str(caught.value).count("\n") == 0
    assert caught.value.tensor is not None  # the result's name says which of many operators it is


def convert(
    folder: Path,
    tensors: Sequence[Any],
    operators: Sequence[Fields],
    codes: Sequence[str],
    outputs: Sequence[int],
    more: Sequence[Fields] = (),
    **how: Any,
) -> nibblecast.Conversion:
    plain = [each if isinstance(each, dict) else each[0] for each in tensors]
    buffers = [b""]
    for at, each in enumerate(tensors):
        if not isinstance(each, dict):
            plain[at] = each[0] | table(schema.Tensor, buffer=np.uint32(len(buffers)))
            buffers.append(each[1])
    given = [at for at, each in enumerate(tensors) if isinstance(each, dict) and at not in outputs]
    graph = subgraph(plain, operators, given) | table(schema.SubGraph, outputs=ints(*outputs))
    source = folder / "m.tflite"
    source.write_bytes(whole([graph, *more], buffers, codes))
    return nibblecast.convert(source, folder / "m.onnx", **how)


REFUSED: Mapping[str, tuple[str, Sequence[Any], str, type[Error], Mapping[str, Any]]] = {
    "an input that is needed and absent": (
        "ADD",
        [floats("x", 2, 2), floats("y", 2, 2)],
        "lacks an input",
        Unsupported,
        {"inputs": [0, -1]},
    ),
    "an activation that is not known": (
        "ADD",
        [floats("x", 2), floats("x2", 2), floats("y", 2)],
        "fused activation 7",
        Unsupported,
        {"fused_activation": 7},
    ),
    "padding that is not known": (
        "MAX_POOL_2D",
        [floats("x", 1, 4, 4, 1), floats("y", 1, 2, 2, 1)],
        "padding 2",
        Unsupported,
        {"padding": 2, "stride_w": 2, "stride_h": 2, "filter_width": 2, "filter_height": 2},
    ),
    "padding of a convolution that is not known": (
        "CONV_2D",
        [floats("x", 1, 4, 4, 1), weights("w", 1, 2, 2, 1), floats("y", 1, 4, 4, 1)],
        "padding -1",
        Unsupported,
        {"padding": -1, "stride_w": 1, "stride_h": 1},
    ),
    "shuffled weights": (
        "FULLY_CONNECTED",
        [floats("x", 1, 4), weights("w", 2, 4), floats("y", 1, 2)],
        "shuffled weights",
        Unsupported,
        {"weights_format": 1},
    ),
    "soft suppression": (
        "NON_MAX_SUPPRESSION_V5",
        [
            floats("boxes", 3, 4),
            floats("scores", 3),
            integers("most", 2),
            weights("overlap", 1),
            weights("least", 1),
            constant("sigma", "FLOAT32", (1,), np.float32([0.5]).tobytes()),
            tensor("picked", "INT32", (2,)),
            floats("scores_of", 2),
            tensor("count", "INT32", (1,)),
        ],
        "sigma other than 0",
        Unsupported,
        {"results": 3},
    ),
    "soft suppression by a sigma that is computed": (
        "NON_MAX_SUPPRESSION_V5",
        [
            floats("boxes", 3, 4),
            floats("scores", 3),
            integers("most", 2),
            weights("overlap", 1),
            weights("least", 1),
            floats("sigma", 1),
            tensor("picked", "INT32", (2,)),
            floats("scores_of", 2),
            tensor("count", "INT32", (1,)),
        ],
        "sigma other than 0",
        Unsupported,
        {"results": 3},
    ),
    "a diagonal of an open axis": (
        "MATRIX_DIAG",
        [floats("x", 1, 3, signature=(1, -1)), floats("y", 1, 3, 3)],
        "MATRIX_DIAG of an axis whose size is open",
        Unsupported,
        {},
    ),
    "blocks of an image of open sizes": (
        "SPACE_TO_BATCH_ND",
        [
            floats("x", 1, 4, 4, 1, signature=(1, -1, -1, 1)),
            integers("blocks", 2, 2),
            constant("around", "INT32", (2, 2), bytes(16)),
            floats("y", 4, 2, 2, 1),
        ],
        "SPACE_TO_BATCH_ND of an image whose sizes are open",
        Unsupported,
        {},
    ),
    "a mirrored open axis": (
        "MIRROR_PAD",
        [
            floats("x", 1, 4, signature=(-1, 4)),
            constant("around", "INT32", (2, 2), ints(1, 1, 0, 0).tobytes()),
            floats("y", 3, 4),
        ],
        "SYMMETRIC of an axis whose size is open",
        Unsupported,
        {"mode": 1},
    ),
    "a batch of more axes than there are": (
        "GATHER",
        [floats("x", 2, 3), tensor("i", "INT32", (2, 2)), floats("y", 2, 2)],
        "GATHER with 3 axes of a batch, of tensors with 2 and 2 axes",
        CorruptFile,
        {"batch_dims": 3},
    ),
    "a list that is known at run time only": (
        "EXPAND_DIMS",
        [floats("x", 2, 3), tensor("axis", "INT32", (1,)), floats("y", 2, 1, 3)],
        "'axis', which is known at run time only",
        Unsupported,
        {},
    ),
    "too many bits": (
        "FAKE_QUANT",
        [floats("x", 2), floats("y", 2)],
        "FAKE_QUANT to 40 bits",
        CorruptFile,
        {"num_bits": 40, "max": 1.0},
    ),
    "no bits": (
        "FAKE_QUANT",
        [floats("x", 2), floats("y", 2)],
        "FAKE_QUANT to 0 bits",
        CorruptFile,
        {"num_bits": 0, "max": 1.0},
    ),
    "a state of another size": (
        "SVDF",
        [
            floats("x", 1, 3),
            weights("feature", 4, 3),
            weights("time", 4, 5),
            weights("bias", 4),
            floats("state", 1, 19) | table(schema.Tensor, is_variable=np.bool_(True)),
            floats("y", 1, 4),
        ],
        r"SVDF has a state of \(19,\) for each batch, and 4 filters: \(20,\) is needed",
        CorruptFile,
        {"rank": 1},
    ),
    "a rank that does not divide the filters": (
        "SVDF",
        [
            floats("x", 1, 3),
            weights("feature", 4, 3),
            weights("time", 4, 5),
            weights("bias", 4),
            floats("state", 1, 20) | table(schema.Tensor, is_variable=np.bool_(True)),
            floats("y", 1, 4),
        ],
        "SVDF has a state of",
        CorruptFile,
        {"rank": 3},
    ),
    "a basic LSTM of other inputs": (
        "LSTM",
        [floats("x", 1, 3), floats("h", 1, 2), weights("w", 8, 5), floats("y", 1, 2)],
        "LSTM with 3 inputs and 1 outputs",
        Unsupported,
        {"kernel_type": 1},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_operator_that_is_refused(what: str, tmp_path: Path) -> None:
    name, tensors, message, kind, more = REFUSED[what]
    refused(tmp_path, name, tensors, message, kind, **more)


def test_a_mirrored_axis_that_does_not_grow_may_be_open(tmp_path: Path) -> None:
    around = constant("around", "INT32", (2, 2), ints(0, 0, 1, 1).tobytes())
    tensors = [floats("x", 1, 4, signature=(-1, 4)), around, floats("y", 1, 6)]
    assert convert(tmp_path, tensors, [call("MIRROR_PAD", [0, 1], [2], mode=1)], ["MIRROR_PAD"], [2])


def test_a_tensor_that_is_taken_before_anything_computes_it(tmp_path: Path) -> None:
    tensors = [floats("x", 2), floats("late", 2), floats("y", 2)]
    steps = [operator(0, [1], [2]), operator(0, [0], [1])]
    plain = list(tensors)
    graph = subgraph(plain, steps, [0]) | table(schema.SubGraph, outputs=ints(2))
    (tmp_path / "m.tflite").write_bytes(whole([graph], [b""], ["RELU"]))
    with pytest.raises(Unsupported, match="tensor 'y': 'late' is taken before anything computes it"):
        nibblecast.convert(tmp_path / "m.tflite", tmp_path / "m.onnx")


def composite(index: int, outputs: int = 1) -> Fields:
    """STABLEHLO_COMPOSITE that is what a subgraph computes; its options are the second table."""
    fields = {OPTIONS["STABLEHLO_COMPOSITE"]["decomposition_subgraph_index"].slot: np.int32(index)}
    return operator(0, [0], [1], builtin_options_2=fields)


@pytest.mark.parametrize("index", [-1, 1, 7])
@pytest.mark.parametrize("custom", ["", "acme"])
def test_a_subgraph_that_there_is_not(index: int, custom: str, tmp_path: Path) -> None:
    how = {"custom": custom} if custom else {}
    with pytest.raises(Error, match=f"subgraph {index} of 1.*the file is damaged"):
        convert(tmp_path, [floats("x", 2), floats("y", 2)], [composite(index)], ["STABLEHLO_COMPOSITE"], [1], **how)


def chain(length: int, last: int) -> list[Fields]:
    """Subgraphs of which each runs the next one; the last runs `last`."""
    follow = [*range(2, length + 1), last]
    return [
        subgraph([floats("x", 2), floats("y", 2)], [composite(index)], [0]) | table(schema.SubGraph, outputs=ints(1))
        for index in follow
    ]


@pytest.mark.parametrize("last", [0, 1, 3])
def test_subgraphs_that_run_themselves(last: int, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"subgraph {last} runs itself"):
        convert(
            tmp_path,
            [floats("x", 2), floats("y", 2)],
            [composite(1)],
            ["STABLEHLO_COMPOSITE"],
            [1],
            more=chain(3, last),
        )


def test_subgraphs_that_run_each_other_too_deep(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="run each other more than 32 deep"):
        convert(
            tmp_path,
            [floats("x", 2), floats("y", 2)],
            [composite(1)],
            ["STABLEHLO_COMPOSITE"],
            [1],
            more=chain(40, 40),
        )


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    """What the operators' kernels would not accept is said of the operator, not left to Python's own errors."""
    around = constant("around", "INT32", (3,), ints(1, 1, 1).tobytes())
    tensors = [floats("x", 1, 4), around, floats("y", 1, 6)]
    with pytest.raises(CorruptFile, match="tensor 'y': PAD has shapes, inputs or options that contradict each other"):
        convert(tmp_path, tensors, [operator(0, [0, 1], [2])], ["PAD"], [2])


def test_a_signature_of_a_subgraph_that_there_is_not(tmp_path: Path) -> None:
    graph = subgraph([floats("x", 2), floats("y", 2)], [operator(0, [0], [1])], [0])
    graph |= table(schema.SubGraph, outputs=ints(1))
    signature = table(schema.SignatureDef, signature_key="serve", subgraph_index=np.uint32(4))
    (tmp_path / "m.tflite").write_bytes(whole([graph], [b""], ["RELU"], signature_defs=[signature]))
    with pytest.raises(CorruptFile, match="signature 'serve' is of subgraph 4 of 1"):
        nibblecast.convert(tmp_path / "m.tflite", tmp_path / "m.onnx")
