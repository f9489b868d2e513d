"""TFLite models as ONNX models that run: structure, names, options; what they compute is in test_lowering_operators."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import nibblecast
from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.options import OPTIONS
from nibblecast.formats.tflite.to_onnx.documentation import BEGIN, END, PAGE, table
from nibblecast.formats.tflite.to_onnx.operators import LOWERINGS
from tests.formats.tflite.models import FIXTURES, MODELS, ints, operator, subgraph, tensor, whole

TYPES = onnx.TensorProto


def converted(name: str, folder: Path, **options: object) -> onnx.ModelProto:
    """The fixture's ONNX model, verified and checked."""
    target = folder / f"{name}.onnx"
    nibblecast.convert(FIXTURES / f"{name}.tflite", target, verify=True, **options)
    onnx.checker.check_model(str(target), full_check=True)
    return onnx.load(target)


def operators(made: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in made.graph.node)


def ports(values: object) -> list[tuple[str, int, list[int]]]:
    return [(v.name, v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("types_zoo", "external_buffer")])
def test_every_fixture_becomes_a_model_that_is_valid(name, tmp_path):
    made = converted(name, tmp_path)
    assert made.graph.node
    assert made.opset_import[0].version >= 20


def test_int4_weights_stay_int4_where_they_are_stored(tmp_path):
    made = converted("cnn_int4_per_channel", tmp_path)
    assert [i.data_type for i in made.graph.initializer if len(i.dims) > 1].count(TYPES.INT4) == 3
    assert operators(made)["DequantizeLinear"] == 3
    source = nibblecast.load(FIXTURES / "cnn_int4_per_channel.tflite")
    dense = next(t for t in source.values() if t.uses and t.uses[0].operator == "FULLY_CONNECTED" and t.quantization)
    stored = next(i for i in made.graph.initializer if i.name == dense.name)
    assert stored.raw_data == dense.packed().tobytes()


def test_names_and_shapes_of_the_ends_survive(tmp_path):
    made = converted("cnn_int8_full", tmp_path)
    (source,), (result,) = ports(made.graph.input), ports(made.graph.output)
    assert (source[1], result[1]) == (TYPES.INT8, TYPES.INT8)
    assert source[2][0] == 1
    assert source[2][-1] < source[2][1]  # channels last
    assert ":0" in source[0]
    assert ":0" in result[0]


@pytest.mark.parametrize("name", ["cnn_int4_per_channel", "cnn_int8_full"])
def test_hardly_a_transpose(name, tmp_path):
    assert operators(converted(name, tmp_path))["Transpose"] <= 2


@pytest.mark.parametrize("name", ["cnn_int8_full", "mlp_int16x8", "lstm_while", "types_zoo"])
def test_no_node_does_nothing(name, tmp_path):
    graph = converted(name, tmp_path).graph
    makers = {output: node for node in graph.node for output in node.output}
    taken = {value for node in graph.node for value in node.input} | {output.name for output in graph.output}
    inner = {value for node in graph.node for a in node.attribute for n in a.g.node for value in n.input}
    assert not [node.name for node in graph.node if not (taken | inner) & set(node.output)]
    for node in graph.node:
        before = makers.get(node.input[0]) if node.input else None
        if before is None:
            continue
        assert (before.op_type, node.op_type) != ("Reshape", "Reshape")
        moved = before.op_type == "Reshape" and node.op_type == "QuantizeLinear" and makers.get(before.input[0])
        assert not (moved and moved.op_type == "DequantizeLinear" and moved.input[1:] == node.input[1:])


def test_channels_first_at_the_ends(tmp_path):
    (last,) = ports(converted("cnn_int8_full", tmp_path).graph.input)
    made = converted("cnn_int8_full", tmp_path, layout="nchw")
    (first,) = ports(made.graph.input)
    assert first[2] == [last[2][axis] for axis in (0, 3, 1, 2)]
    assert operators(made)["Transpose"] <= 1


def test_weights_for_matmul_nbits(tmp_path):
    for options in ({"weights": "matmulnbits"}, {"layout": "matmulnbits"}):
        made = converted("mlp_int4_blockwise", tmp_path, **options)
        assert operators(made)["MatMulNBits"] == 2


def test_dequantizing_gives_a_plain_float_model(tmp_path):
    made = converted("cnn_int4_per_channel", tmp_path, dequantize="float32")
    assert "DequantizeLinear" not in operators(made)
    assert {i.data_type for i in made.graph.initializer} <= {TYPES.FLOAT, TYPES.INT64}


def test_dequantizing_leaves_no_integers_between_operators_either(tmp_path):
    made = converted("cnn_int8_full", tmp_path, dequantize="float32")
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(made))
    assert [port[1] for port in ports([*made.graph.input, *made.graph.output])] == [TYPES.FLOAT, TYPES.FLOAT]


def test_signatures_and_metadata_are_copied(tmp_path):
    made = converted("two_signatures", tmp_path)
    properties = {entry.key: entry.value for entry in made.metadata_props}
    for name in nibblecast.load(FIXTURES / "two_signatures.tflite").graph.signatures:
        assert set(json.loads(properties[f"tflite.signature.{name}"])) == {"inputs", "outputs"}
    assert any(key.startswith("tflite.metadata.") for key in properties)


def test_quantizing_on_request(tmp_path):
    made = converted("mlp_float32", tmp_path, quantize="int4,block=16")
    assert Counter(i.data_type for i in made.graph.initializer)[TYPES.INT4] == 2


def test_signatures(tmp_path):
    names = list(nibblecast.load(FIXTURES / "two_signatures.tflite").graph.signatures)
    assert len(names) == 2
    made = [converted("two_signatures", tmp_path, signature=name) for name in names]
    assert ports(made[0].graph.output) != ports(made[1].graph.output) or str(made[0]) != str(made[1])
    with pytest.raises(Unsupported, match=f"has no signature 'nope': it has '{names[0]}', '{names[1]}'"):
        nibblecast.convert(FIXTURES / "two_signatures.tflite", tmp_path / "m.onnx", signature="nope")


def test_weights_alone_on_request(tmp_path):
    made = converted("cnn_int4_per_channel", tmp_path, graph=False)
    assert not made.graph.input
    assert len(made.graph.output) == len(nibblecast.load(FIXTURES / "cnn_int4_per_channel.tflite"))
    with pytest.raises(UsageError, match="weights=matmulnbits is for models with a graph"):
        nibblecast.convert(FIXTURES / "mlp_float32.tflite", tmp_path / "m.onnx", graph=False, weights="matmulnbits")


def unknown_operators(path: Path) -> Path:
    """A model of an operator without a lowering, twice, and of one with."""
    tensors = [tensor(name, "FLOAT32", (2, 3)) for name in ("x", "y", "z", "out")]
    steps = [operator(0, [0], [1]), operator(0, [1], [2]), operator(1, [2], [3])]
    graph = subgraph(tensors, steps, [0]) | {schema.SubGraph.outputs.slot: ints(3)}
    path.write_bytes(whole([graph], [b""], ["DILATE", "RELU"]))
    return path


def test_unknown_operators_are_named_and_counted_before_anything_is_written(tmp_path):
    source = unknown_operators(tmp_path / "m.tflite")
    with pytest.raises(Unsupported, match=r"operators that do not become ONNX: DILATE \(2 times\); --opt graph"):
        nibblecast.convert(source, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_unknown_operators_as_they_are(tmp_path):
    nibblecast.convert(unknown_operators(tmp_path / "m.tflite"), tmp_path / "m.onnx", custom="acme")
    made = onnx.load(tmp_path / "m.onnx")
    assert [(n.domain, n.op_type) for n in made.graph.node] == [
        ("acme", "DILATE"),
        ("acme", "DILATE"),
        ("", "Relu"),
    ]
    assert {each.domain for each in made.opset_import} == {"", "acme"}


def test_all_lowerings_are_of_operators_that_there_are():
    assert set(LOWERINGS) <= set(schema.BUILTIN_OPERATORS)
    assert set(OPTIONS) <= set(LOWERINGS)


def test_the_page_has_the_table():
    found = re.search(f"{BEGIN}(.*){END}", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    assert found[1] == table(), "run `python -m nibblecast.formats.tflite.to_onnx.documentation`"


@pytest.mark.peers
@pytest.mark.parametrize("operator_name", sorted(OPTIONS))
def test_options_have_the_official_slots_and_defaults(operator_name):
    import flatbuffers
    from ai_edge_litert import schema_py_generated as official

    from tests.formats.tflite.to_onnx.one_operator import options_class

    name = options_class(operator_name)
    spelled = {"fused_activation": "fused_activation_function"}
    for option, where in OPTIONS[operator_name].items():
        builder = flatbuffers.Builder(64)
        value = builder.CreateString("x") if where.format in ("s", "[i", "[f") else 1 - int(where.default)
        getattr(official, f"{name}Start")(builder)
        word = "".join(part[:1].upper() + part[1:] for part in spelled.get(option, option).split("_"))
        getattr(official, f"{name}Add{word}")(builder, value)
        builder.Finish(getattr(official, f"{name}End")(builder))
        content = np.frombuffer(bytes(builder.Output()), np.uint8)
        written = schema.Table.root(content)
        slots = [slot for slot in range(32) if written.position_of(slot) is not None]
        assert slots == [where.slot], option
        empty = getattr(official, f"{name}T")()
        stored = [v for k, v in vars(empty).items() if k.lower() == word.lower()]
        assert where.format in ("s", "[i", "[f") or float(stored[0] or 0) == where.default, option


@pytest.mark.peers
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("types_zoo", "external_buffer", "container")])
def test_models_compute_what_litert_computes(name, tmp_path):
    converted(name, tmp_path)
    for output in nibblecast.compare_outputs(FIXTURES / f"{name}.tflite", tmp_path / f"{name}.onnx", seed=1):
        assert output.relative <= 0.02 or (output.steps is not None and output.steps <= 3), output


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A copy with one to eight bytes or words changed."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(len(data)))
        if rng.integers(2):
            data[at] ^= 1 << int(rng.integers(8))
        else:
            data[at : at + 4] = int(rng.choice([0, 1, 3, 255, 65535, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("name", ["cnn_int8_full", "lstm_while", "mlp_int16x8", "two_signatures"])
def test_damaged_graphs_give_an_error_of_one_line_or_a_model(name, tmp_path):
    rng = np.random.default_rng(len(name))
    content = (FIXTURES / f"{name}.tflite").read_bytes()
    source = tmp_path / "m.tflite"
    refused = 0
    for _ in range(150):
        source.write_bytes(damaged(content, rng))
        try:
            nibblecast.convert(source, tmp_path / "m.onnx")
        except nibblecast.Error as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused
