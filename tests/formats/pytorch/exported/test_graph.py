"""Exported programs as ONNX: onnxruntime computes what torch does, with int4 weights that are still int4."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import nibblecast
from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.formats.pytorch.exported import graph as exported_graph
from nibblecast.formats.pytorch.exported import read as exported
from nibblecast.formats.pytorch.exported.graph import MissingGraph
from nibblecast.formats.pytorch.exported.program import program_of
from nibblecast.formats.pytorch.exported.to_fx import rebuilt

ROOT = Path(__file__).parents[4]
FIXTURES = ROOT / "fixtures" / "pytorch"
INT4, UINT4, INT2 = onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT2
RUNNABLE = sorted(
    path.stem.removeprefix("exported_")
    for path in FIXTURES.glob("exported_*.pt2")
    if "bfloat16" not in path.name  # onnxruntime 1.32 has no Gemm of bfloat16 on CPUs
)
with_torch = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("torch") is None or find_spec("onnxscript") is None, reason="needs torch, onnxscript"),
]


def torch_test(function):
    for mark in with_torch:
        function = mark(function)
    return function


def path_of(name):
    return FIXTURES / f"exported_{name}.pt2"


def outputs(path, name):
    """What onnxruntime computes for the inputs that the truth was made with, and that truth."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    truth = np.load(FIXTURES / f"exported_{name}.npz")
    given = {value.name: truth[f"input/{i}"] for i, value in enumerate(session.get_inputs())}
    return session.run(None, given), [truth[f"output/{i}"] for i in range(len(session.get_outputs()))]


@torch_test
@pytest.mark.parametrize("name", RUNNABLE)
def test_onnxruntime_computes_what_torch_does(name, tmp_path):
    target = tmp_path / "model.onnx"
    # the reader of ONNX follows the arithmetic that a decomposed program decodes its weights by
    done = nibblecast.convert(path_of(name), target, verify=name != "torchao_decomposed")
    assert all(
        loss.detail == "no operator of the graph uses it" or loss.kind == "reinterpreted" for loss in done.losses
    )
    for found, expected in zip(*outputs(target, name), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@torch_test
@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("activations", {"conv.weight": INT4, "head.0.weight": INT4, "head.2.weight": INT4}),
        ("affine_per_tensor_uint4", {"conv.weight": UINT4, "head.0.weight": UINT4, "head.2.weight": UINT4}),
        ("torchao_groups", {"0.weight": INT4, "2.weight": INT2}),
        ("not_folded", {"conv.weight": INT4, "head.0.weight": INT4, "head.2.weight": INT4}),
        ("torchao_bfloat16", {"0.weight": INT4}),
    ],
)
def test_weights_keep_their_codes(name, types, tmp_path):
    target = tmp_path / "model.onnx"
    nibblecast.convert(path_of(name), target)
    written = {tensor.name: tensor.data_type for tensor in onnx.load(target).graph.initializer}
    assert {key: written.get(key) for key in types} == types
    source, result = nibblecast.load(path_of(name)), nibblecast.load(target)
    for key in types:
        np.testing.assert_array_equal(source[key].codes(), result[key].codes())
        np.testing.assert_array_equal(source[key].quantization.scale.numpy(), result[key].quantization.scale.numpy())


@torch_test
def test_open_sizes_keep_their_names(tmp_path):
    target = tmp_path / "model.onnx"
    nibblecast.convert(path_of("int8_and_dynamic"), target)
    graph = onnx.load(target).graph
    (size,) = {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)}
    assert size == "s77"
    session = ort.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros((5, 2, 4, 4), np.float32)})[0].shape == (5, 3)


@torch_test
def test_dequantized_means_float_activations(tmp_path):
    target = tmp_path / "model.onnx"
    nibblecast.convert(path_of("activations"), target, dequantize="float32")
    graph = onnx.load(target).graph
    assert not {node.op_type for node in graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    for found, expected in zip(*outputs(target, "activations"), strict=True):
        assert np.abs(found - expected).max() < 0.05


@torch_test
def test_nothing_of_the_machine_is_written(tmp_path):
    target = tmp_path / "model.onnx"
    nibblecast.convert(path_of("activations"), target)
    content = target.read_bytes()
    assert not [text for text in (b"site-packages", b"stack_trace", str(ROOT).encode()) if text in content]
    other = tmp_path / "other.onnx"
    nibblecast.convert(path_of("activations"), other)
    assert other.read_bytes() == content


@torch_test
def test_loading_imports_no_torch():
    program = (
        "import sys, nibblecast\n"
        f"model = nibblecast.load({str(path_of('per_tensor'))!r})\n"
        "assert model.graph is not None\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@torch_test
def test_older_operator_sets_are_refused(tmp_path):
    with pytest.raises(UsageError, match="18 is the first"):
        nibblecast.convert(path_of("tied"), tmp_path / "model.onnx", opset=17)


def test_without_torch_the_weights_come_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(exported, "is_torch_installed", lambda: False)
    model = nibblecast.load(path_of("per_tensor"))
    assert isinstance(model.graph, MissingGraph)
    with pytest.raises(nibblecast.Error, match=r"pip install 'nibblecast\[torch\]'"):
        model.graph.onnx_ir()
    done = nibblecast.save(model, tmp_path / "model.onnx")
    (loss,) = done.losses
    assert loss.kind == "dropped"
    assert "pip install 'nibblecast[torch]'" in loss.detail
    np.testing.assert_array_equal(
        nibblecast.load(tmp_path / "model.onnx")["conv.weight"].codes(), model["conv.weight"].codes()
    )


def program_with(change):
    with zipfile.ZipFile(path_of("fake_quantized")) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        document = json.loads(archive.read(name))
    change(document["graph_module"])
    return program_of(json.dumps(document).encode())


@torch_test
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.ops.aten.from_file.default", "aten.from_file, which is not converted"),
        ("torch.os.system", "which is not converted"),
        ("torch.ops.aten.__class__.default", "which is not converted"),
        ("torch.ops.aten.conv1d.__init__", "PyTorch does not know"),
        ("torch.ops.aten.no_such_operator.default", "PyTorch does not know"),
        ("_operator.attrgetter", "which is not converted"),
        ("torch.ops.higher_order.cond", "which is not converted"),
        ("#custom:x", "which is not converted"),
    ],
)
def test_only_known_operators_are_looked_up(target, message):
    program = program_with(lambda module: module["graph"]["nodes"][-1].update(target=target))
    graph = nibblecast.load(path_of("fake_quantized")).graph
    with pytest.raises(Unsupported, match=message):
        rebuilt(program, {**graph.others, **graph.weights}, without_quantized_activations=False)


@torch_test
def test_a_buffer_that_is_written_to_is_refused():
    def change(module):
        node = module["graph"]["nodes"][-1]
        node["target"] = "torch.ops.aten.add_.Tensor"
        node["inputs"] = [
            {"name": name, "arg": {"as_tensor": {"name": value}}, "kind": 1}
            for name, value in (("self", "p_conv_bias"), ("other", "linear"))
        ]

    graph = nibblecast.load(path_of("fake_quantized")).graph
    with pytest.raises(Unsupported, match=r"tensor 'conv.bias': is changed as the program runs"):
        rebuilt(program_with(change), {**graph.others, **graph.weights}, without_quantized_activations=False)


@torch_test
def test_state_that_changes_is_refused():
    def change(module):
        module["signature"]["output_specs"].append(
            {"buffer_mutation": {"arg": {"name": "linear"}, "buffer_name": "scale"}}
        )

    with pytest.raises(Unsupported, match="changes state"):
        rebuilt(program_with(change), {}, without_quantized_activations=False)


@torch_test
def test_expressions_of_sizes_are_names_or_nothing():
    def change(module):
        module["graph"]["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": "__import__('os').system('x')"}}

    assert program_with(change).inputs[0].shape == ("", 3, 9)


def test_the_exporter_is_only_imported_when_asked_for():
    assert "torch" not in vars(exported_graph)
