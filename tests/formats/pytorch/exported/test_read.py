"""Exported programs: weights as torch itself decodes them, under the names of the float model."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.metadata import Port, Use
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.pytorch.exported.read import Exported, read_exported
from nibblecast.formats.pytorch.pickle.archive import Archive
from nibblecast.formats.pytorch.pickle.limits import Limits

FIXTURES = Path(__file__).parents[4] / "fixtures" / "pytorch"
NET = ("conv.weight", "head.0.weight", "head.2.weight")
#: The quantized tensors of each fixture, in the order of its dequantize nodes, and their dtypes.
QUANTIZED = {
    "activations": dict.fromkeys(NET, ml_dtypes.int4),
    "affine_per_channel": dict.fromkeys(NET, ml_dtypes.int4),
    "affine_per_tensor_uint4": dict.fromkeys(NET, ml_dtypes.uint4),
    "fake_quantized": {"linear.weight": ml_dtypes.uint4, "conv.weight": ml_dtypes.int4},
    "int8_and_dynamic": dict.fromkeys(NET, np.int8),
    "not_folded": dict.fromkeys(NET, ml_dtypes.int4),
    "not_folded_per_tensor": dict.fromkeys(NET, ml_dtypes.uint4),
    "old_layout": dict.fromkeys(NET, ml_dtypes.int4),
    "per_tensor": dict.fromkeys(NET, ml_dtypes.int4),
    "qat": dict.fromkeys(NET, ml_dtypes.int4),
    "reordered": {"weight": ml_dtypes.int4, "grouped": ml_dtypes.int4},
    "tied": {},
    "tied_quantized": {"_frozen_param0": ml_dtypes.int4},
    "torchao_bfloat16": {"0.weight": ml_dtypes.int4},
    "torchao_decomposed": {},
    "torchao_groups": {"0.weight": ml_dtypes.int4, "2.weight": ml_dtypes.int2},
    "torchao_subclass": {"0.weight": ml_dtypes.int4},
    "transposed_int2": {"up.weight": ml_dtypes.int2},
}


def read(archive: Archive) -> Exported:
    return read_exported(archive, Limits(archive.data.nbytes))


def opened(name):
    return read(Archive.open(MappedFile.open(FIXTURES / f"exported_{name}.pt2")))


def test_every_fixture_is_expected():
    names = {path.stem.removeprefix("exported_") for path in FIXTURES.glob("exported_*.pt2")}
    assert names == set(QUANTIZED)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_what_torch_decodes(name):
    truth = np.load(FIXTURES / f"exported_{name}.npz")
    found = opened(name)
    weights = {key: tensor for key, tensor in found.tensors.items() if tensor.quantization is not None}
    assert {key: tensor.dtype for key, tensor in weights.items()} == {
        key: np.dtype(dtype) for key, dtype in QUANTIZED[name].items()
    }
    keys = [key.removeprefix("values/") for key in truth if key.startswith("values/")]
    for key, tensor in zip(keys, weights.values(), strict=True):
        values = truth[f"values/{key}"]
        np.testing.assert_array_equal(tensor.dequantize().view(np.uint32), values.view(np.uint32))
        if f"codes/{key}" in truth:
            np.testing.assert_array_equal(tensor.codes(), truth[f"codes/{key}"])
    assert not found.losses or name == "torchao_decomposed"
    assert not found.wrapped


@pytest.mark.parametrize("name", ["per_tensor", "affine_per_channel", "not_folded", "old_layout"])
def test_only_the_model_is_left(name):
    found = opened(name)
    assert list(found.tensors) == [
        "conv.weight",
        "conv.bias",
        "head.0.weight",
        "head.0.bias",
        "head.2.weight",
        "head.2.bias",
    ]
    assert all(tensor.name == key for key, tensor in found.tensors.items())


def test_weights_that_the_program_decodes_by_arithmetic_are_said():
    found = opened("torchao_decomposed")
    assert found.tensors["0.parametrizations.weight.original0"].dtype == np.int8
    said = {loss.tensor: loss.kind for loss in found.losses}
    assert said["0.parametrizations.weight.original0"] == "reinterpreted"


def test_metadata():
    found = opened("int8_and_dynamic")
    assert found.producer == "torch 2.13.0+cpu"
    assert found.inputs == (Port("x", "float32", ("s77", 2, 4, 4)),)
    assert found.outputs == (Port("linear_1", "float32", ("s77", 3)),)
    assert found.operators["aten.linear"] == 2
    assert found.opsets == {"aten": 10}


def test_uses_and_activations():
    tensors = opened("activations").tensors
    (use,) = tensors["conv.weight"].uses
    assert (use.operator, use.input, use.channel_axis) == ("aten.conv2d", 1, 0)
    assert use.activation.dtype == np.int8
    assert use.activation.shape == (2, 2, 4, 4)
    assert use.result.shape == (2, 4, 4, 4)
    assert opened("transposed_int2").tensors["up.weight"].uses == (Use("aten.conv_transpose2d", 1, 1, sum_axes=(0,)),)
    (use,) = opened("reordered").tensors["weight"].uses
    assert (use.operator, use.channel_axis) == ("aten.linear", 1)


def test_tied_weights_share_their_bytes():
    tensors = opened("tied").tensors
    first, second = tensors["embedding.weight"].data, tensors["output.weight"].data
    assert (first.offset, first.nbytes) == (second.offset, second.nbytes)
    np.testing.assert_array_equal(tensors["rows"].numpy(), np.arange(24, dtype=np.float32).reshape(4, 6)[1:3, ::2])


def test_unfolded_codes_come_in_pieces():
    tensor = opened("not_folded").tensors["head.0.weight"]
    whole = tensor.packed()
    np.testing.assert_array_equal(np.concatenate([part.packed() for part in tensor.parts(40)]), whole)


def documents(name="affine_per_channel"):
    """All records of a fixture."""
    archive = Archive.open(MappedFile.open(FIXTURES / f"exported_{name}.pt2"))
    return {record: archive.bytes_of(record) for record in archive.entries}


def packed(records):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name}", content)
    view = np.frombuffer(stream.getvalue(), np.uint8)
    return Archive.open(MappedFile(Path("model.pt2"), view, None))


PROGRAM, CONFIG = "models/model.json", "data/weights/model_weights_config.json"


def changed(record, change, name="affine_per_channel"):
    records = documents(name)
    document = json.loads(records[record])
    change(document)
    return packed(records | {record: json.dumps(document).encode()})


def of_weight(**meta):
    def change(document):
        document["config"]["_frozen_param0"]["tensor_meta"] |= meta

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_weight(sizes=[{"as_int": -4}]), "no count for sizes"),
        (of_weight(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 1}]), "reaches element"),
        (of_weight(storage_offset={"as_int": 70}), "reaches element"),
        (of_weight(strides=[{"as_int": 1}]), "do not fit"),
        (of_weight(sizes=[{"as_expr": {"expr_str": "s0"}}]), "no count for sizes"),
        (of_weight(dtype=99), "ScalarType 99"),
        (of_weight(dtype=[]), "ScalarType"),
        (of_weight(layout=1), "sparse"),
        (lambda d: d["config"]["_frozen_param0"].update(path_name="../../models/model.json"), "not a plain name"),
        (lambda d: d["config"]["_frozen_param0"].update(path_name="weight_99"), "no record"),
        (lambda d: d["config"]["_frozen_param0"].update(use_pickle=True), "ZIP directory"),
        (lambda d: d.pop("config"), "no object for config"),
    ],
)
def test_damaged_descriptions(change, message):
    with pytest.raises(Error, match=message):
        read(changed(CONFIG, change))


def of_node(number, **arguments):
    def change(document):
        node = document["graph_module"]["graph"]["nodes"][number]
        given = {argument["name"]: argument for argument in node["inputs"]}
        for name, value in arguments.items():
            given[name]["arg"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_node(0, axis={"as_int": 9}), "tensor '_frozen_param0': is quantized along axis 9"),
        (of_node(0, axis={"as_int": 1}), "scales of shape"),
        (of_node(0, axis={"as_string": "x"}), "an integer is needed"),
        (of_node(0, quant_min={"as_int": 8}), "a range that no code dtype holds"),
        (of_node(0, quant_min={"as_none": True}), "an integer is needed"),
        (of_node(0, scales={"as_tensor": {"name": "b__frozen_param0"}}), "scales of shape"),
        (of_node(0, scales={"as_float": 1.0, "as_int": 1}), "2 kinds"),
        (lambda d: d["graph_module"]["graph"].pop("nodes"), "no array for nodes"),
        (lambda d: d["graph_module"]["signature"].pop("input_specs"), "no array for input_specs"),
        (lambda d: d.update(graph_module=7), "no object for graph_module"),
    ],
)
def test_damaged_programs(change, message):
    with pytest.raises(CorruptFile, match=message):
        read(changed(PROGRAM, change))


def test_a_scale_that_the_program_computes_is_a_loss():
    found = read(changed(PROGRAM, of_node(0, scales={"as_tensor": {"name": "nowhere"}})))
    assert found.tensors["_frozen_param0"].quantization is None
    (loss,) = found.losses
    assert (loss.tensor, loss.kind) == ("_frozen_param0", "reinterpreted")


def test_values_that_refer_to_each_other_in_a_circle():
    def change(document):
        nodes = document["graph_module"]["graph"]["nodes"]
        nodes[0]["inputs"][0]["arg"]["as_tensor"]["name"] = nodes[1]["outputs"][0]["as_tensor"]["name"]
        nodes[1]["inputs"][0]["arg"]["as_tensor"]["name"] = nodes[0]["outputs"][0]["as_tensor"]["name"]

    found = read(changed(PROGRAM, change))
    assert found.tensors["_frozen_param0"].quantization is None


def test_machine_code_alone_is_refused():
    records = {"archive_format": b"pt2", "data/aotinductor/model/model.so": b"\x7fELF"}
    with pytest.raises(Unsupported, match=r"AOTInductor.*torch\.export\.save"):
        read(packed(records))


def test_a_package_of_two_programs():
    records, other = documents(), documents("per_tensor")
    records |= {
        "models/second.json": other[PROGRAM],
        "data/weights/second_weights_config.json": other[CONFIG].replace(b"weight_", b"other_"),
        "data/constants/second_constants_config.json": b'{"config": {}}',
    }
    records |= {name.replace("/weight_", "/other_"): other[name] for name in other if "/weight_" in name}
    names = list(read(packed(records)).tensors)
    assert "model/conv.weight" in names
    assert "second/conv.weight" in names


def test_the_pickle_of_sample_inputs_is_not_looked_at():
    records = documents() | {"data/sample_inputs/model.pt": b"cos\nsystem\n(S'true'\ntR."}
    assert list(read(packed(records)).tensors) == list(opened("affine_per_channel").tensors)


def paths(value, path=()):
    """Every place in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


STRANGE = [None, True, -1, 0, 1 << 80, 1.5, float("nan"), "", "..", [], {}, [[]], {"as_int": -1}, {"name": "x"}]
RECORDS = {name: documents(name) for name in ("affine_per_channel", "torchao_groups", "not_folded_per_tensor")}


@settings(max_examples=400)
@given(st.data())
def test_any_change_of_the_json_is_read_or_refused_in_one_line(data):
    records = RECORDS[data.draw(st.sampled_from(sorted(RECORDS)))]
    record = data.draw(st.sampled_from([PROGRAM, CONFIG]))
    document = json.loads(records[record])
    *way, last = data.draw(st.sampled_from([path for path in paths(document) if path]))
    place = document
    for key in way:
        place = place[key]
    if data.draw(st.booleans()):
        del place[last]
    else:
        place[last] = data.draw(st.sampled_from(STRANGE))
    try:
        found = read(packed(records | {record: json.dumps(document).encode()}))
        for tensor in found.tensors.values():
            tensor.dequantize()
    except Error as error:
        assert "\n" not in str(error)


def test_nested_json_is_no_traceback():
    with pytest.raises(CorruptFile, match="not a JSON object"):
        read(packed(documents() | {PROGRAM: b"[" * 100_000}))
