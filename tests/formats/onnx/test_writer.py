"""What is written is a valid ONNX model, and onnxruntime decodes it to the IR's values bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibblecast.converters.compare.comparison import compare
from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.interfaces import Size
from nibblecast.converters.ir import Model, Quantization, Tensor, grid_shape, per_axis, per_tensor
from nibblecast.converters.storage import Computed
from nibblecast.formats.onnx.options import OnnxOptions
from nibblecast.formats.onnx.reader import OnnxReader
from nibblecast.formats.onnx.writer import OnnxWriter
from nibblecast.formats.onnx.writing.files import OnnxPlan
from tests import zoo
from tests.formats.onnx.onnx_models import write

THEMES = (
    zoo.granularities,
    zoo.zero_points,
    zoo.scales,
    zoo.schemes,
    zoo.small_floats,
    zoo.wide_codes,
    zoo.shapes,
    zoo.names,
    zoo.shared_parameters,
    zoo.plain,
    zoo.zoo,
)
#: What onnxruntime's Python binding cannot hand out.
_UNREADABLE_OUTPUTS = {np.dtype(t) for t in zoo.PLAIN} - {
    np.dtype(t) for t in (np.float32, np.float16, np.float64, np.bool_, np.int8, np.uint8, *zoo.WIDE_CODES)
}


def run(path: Path, names: list[str], *, optimized: bool = False) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(names, {})


def check(model: Model, path: Path, options: OnnxOptions | None = None) -> OnnxPlan:
    """Writes, validates, runs, reads again."""
    plan = write(model, path, options)
    onnx.checker.check_model(str(path), full_check=True)
    runnable = {n: t for n, t in model.items() if t.quantization or t.dtype not in _UNREADABLE_OUTPUTS}
    if runnable and all(tensor.dtype.kind != "c" for tensor in model.values()):
        for (name, tensor), value in zip(runnable.items(), run(path, list(runnable)), strict=True):
            expected = tensor.dequantize(np.float32) if tensor.quantization else tensor.numpy()
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
            assert value.tobytes() == expected.tobytes(), name
    zoo.assert_identical(OnnxReader().read(path), model)
    return plan


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.__name__)
@pytest.mark.parametrize("external_data", [None, Size(0), Size(40)])
def test_valid_equal_and_read_again(theme, external_data, tmp_path):
    check(theme(), tmp_path / "weights.onnx", OnnxOptions(external_data=external_data))


def test_onnxruntime_optimizing_computes_the_same(tmp_path):
    model = zoo.zoo()
    write(model, tmp_path / "w.onnx")
    quantized = [name for name, tensor in model.items() if tensor.quantization is not None]
    for name, value in zip(quantized, run(tmp_path / "w.onnx", quantized, optimized=True), strict=True):
        assert value.tobytes() == model[name].dequantize(np.float32).tobytes(), name


CODES = st.sampled_from((*zoo.SMALL_CODES, *zoo.WIDE_CODES, *zoo.FLOAT8, ml_dtypes.float4_e2m1fn))
PARAMETERS = st.sampled_from((np.float32, np.float16, ml_dtypes.bfloat16, np.float64))
ZERO_POINTS = st.sampled_from((None, "same", np.int8, np.uint8, np.int32, np.int64, np.float32, np.float16))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    block_shape = tuple(draw(st.integers(1, size)) for size in shape)
    dtype, zero_point = draw(CODES), draw(ZERO_POINTS)
    is_float = np.dtype(dtype) in {np.dtype(t) for t in (*zoo.FLOAT8, ml_dtypes.float4_e2m1fn)}
    unsigned = np.dtype(dtype) in {np.dtype(t) for t in (ml_dtypes.uint2, ml_dtypes.uint4, np.uint8)}
    return zoo.quantized(
        draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)),
        shape,
        block_shape,
        dtype=dtype,
        scale=draw(PARAMETERS),
        zero_point=(None if is_float else dtype) if isinstance(zero_point, str) else zero_point,
        offset=draw(st.none() | PARAMETERS),
        codebook=draw(st.none() | PARAMETERS) if unsigned else None,
    )


@settings(max_examples=60)
@given(st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda tensor: tensor.name))
def test_any_tensors(tmp_path_factory, some):
    check(zoo.model(some), tmp_path_factory.mktemp("any") / "weights.onnx")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_dequantize_linear_is_used_wherever_it_can_be(tmp_path):
    shape = (4, 32)
    write(zoo.granularities(), tmp_path / "g.onnx")
    graph = onnx.load(tmp_path / "g.onnx").graph
    by_output = {node.output[0]: node.op_type for node in graph.node}
    assert {name: by_output[name] for name in zoo.granularities()} == {
        name: "Mul" if "two axes" in name else "DequantizeLinear" for name in zoo.granularities()
    }
    write(zoo.model([zoo.quantized("w", shape, per_tensor(shape), scale=np.float16)]), tmp_path / "f.onnx")
    assert operators(tmp_path / "f.onnx") == ["Cast", "DequantizeLinear"]


def test_codes_are_the_canonical_bytes(tmp_path):
    tensor = zoo.quantized("w", (3, 5), per_axis((3, 5), 0), zero_point=ml_dtypes.int4)
    write(zoo.model([tensor]), tmp_path / "w.onnx")
    stored = {i.name: i for i in onnx.load(tmp_path / "w.onnx").graph.initializer}
    assert list(stored) == ["w_quantized", "w_scale", "w_zero_point"]
    assert stored["w_quantized"].raw_data == tensor.packed().tobytes()
    assert (stored["w_quantized"].data_type, list(stored["w_quantized"].dims)) == (onnx.TensorProto.INT4, [3, 5])
    assert stored["w_scale"].raw_data == tensor.quantization.scale.packed().tobytes()


def test_literal_bytes(tmp_path):
    """The whole file, so that no change of it goes unseen."""
    write(zoo.model([Tensor.from_array("w", np.array([1, -2, 7], ml_dtypes.int4))]), tmp_path / "w.onnx")
    assert (tmp_path / "w.onnx").read_bytes() == (
        b"\x08\x0a\x12\x0anibblecast\x42\x04\x0a\x00\x10\x15"
        b"\x72\x1c\x0a\x11nibblecast.layout\x12\x07weights"
        b"\x3a\x27\x12\x07weights\x62\x0f\x0a\x01w\x12\x0a\x0a\x08\x08\x16\x12\x04\x0a\x02\x08\x03"
        b"\x2a\x0b\x08\x03\x10\x16\x42\x01w\x4a\x02\xe1\x07"
    )


def test_same_bytes_for_the_same_model(tmp_path):
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(zoo.zoo(), tmp_path / name / "weights.onnx", OnnxOptions(external_data=Size(1)))
        files = [tmp_path / name / "weights.onnx", tmp_path / name / "weights.onnx.data"]
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("dtype", "opset", "ir_version"),
    [
        (ml_dtypes.int4, 21, 10),
        (np.float32, 21, 10),
        (ml_dtypes.float4_e2m1fn, 23, 11),
        (ml_dtypes.float8_e8m0fnu, 24, 12),
        (ml_dtypes.int2, 25, 13),
    ],
)
def test_opset_is_raised_only_for_types_that_need_it(dtype, opset, ir_version, tmp_path):
    write(zoo.model([zoo.codes("w", (4,), dtype)]), tmp_path / "w.onnx")
    model = onnx.load(tmp_path / "w.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)


@pytest.mark.parametrize("opset", range(13, 26))
def test_every_opset(opset, tmp_path):
    shape = (4, 9)
    dtypes = (np.int8, np.uint8, np.int16, np.int32) if opset < 21 else (*zoo.SMALL_CODES[:2], np.int8, np.uint16)
    some = [
        zoo.quantized(f"{np.dtype(dtype).name} {block_shape}", shape, block_shape, dtype=dtype, zero_point=dtype)
        for dtype in dtypes
        for block_shape in (per_tensor(shape), per_axis(shape, 0), (1, 4))
    ]
    check(zoo.model(some), tmp_path / "w.onnx", OnnxOptions(opset=opset))
    assert onnx.load(tmp_path / "w.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [13, 18, 20, 24])
def test_an_operator_set_without_small_integers_takes_a_byte_for_each(opset, tmp_path):
    shape = (3, 9)
    model = zoo.model(
        [
            zoo.codes("plain", (5,), ml_dtypes.int4 if opset < 21 else ml_dtypes.int2),
            *(
                zoo.quantized(f"{np.dtype(dtype).name} {blocks}", shape, blocks, dtype=dtype, zero_point=dtype)
                for dtype in zoo.SMALL_CODES[:4]
                for blocks in (per_tensor(shape), per_axis(shape, 0), (1, 4))
            ),
        ]
    )
    plan = write(model, tmp_path / "w.onnx", OnnxOptions(opset=opset))
    onnx.checker.check_model(str(tmp_path / "w.onnx"), full_check=True)
    assert {loss.kind for loss in plan.losses} == {"widened"}
    names = [name for name in model if name != "plain"]
    for name, value in zip(names, run(tmp_path / "w.onnx", names), strict=True):
        assert value.tobytes() == model[name].dequantize(np.float32).tobytes(), name
    assert compare(model, OnnxReader().read(tmp_path / "w.onnx")).equal


def test_float4_codes_need_no_float4_type(tmp_path):
    shape = (2, 8)
    some = zoo.model([zoo.quantized("w", shape, (1, 4), dtype=ml_dtypes.float4_e2m1fn)])
    check(some, tmp_path / "w.onnx", OnnxOptions(opset=21))
    stored = onnx.load(tmp_path / "w.onnx").graph.initializer
    assert [i.data_type for i in stored if i.name == "w_quantized"] == [onnx.TensorProto.UINT4]


def test_opset_that_lacks_a_type(tmp_path):
    some = zoo.model([zoo.codes("w", (4,), ml_dtypes.float8_e8m0fnu)])
    with pytest.raises(UsageError, match=r"tensor 'w': opset 21 has no float8_e8m0fnu: give 24 or higher"):
        OnnxWriter().plan(some, tmp_path / "w.onnx", OnnxOptions(opset=21))
    with pytest.raises(UsageError, match=r"opset 7 cannot be written: give one from 13 to 25"):
        OnnxWriter().plan(some, tmp_path / "w.onnx", OnnxOptions(opset=7))


def test_dtype_that_onnx_lacks(tmp_path):
    some = zoo.model([Tensor.from_array("w", np.zeros(3, ml_dtypes.float6_e2m3fn))])
    with pytest.raises(Unsupported, match=r"tensor 'w': ONNX has no type for float6_e2m3fn"):
        OnnxWriter().plan(some, tmp_path / "w.onnx", OnnxOptions())


def test_a_name_that_onnx_cannot_hold_is_a_loss(tmp_path):
    some = zoo.model(
        [zoo.codes("", (3,), np.float32), zoo.codes("unnamed", (3,), np.int8), zoo.codes("\ud800", (1,), np.int8)]
    )
    plan = write(some, tmp_path / "w.onnx")
    assert [str(loss) for loss in plan.losses] == [
        "note: the model: it is named 'unnamed_1', because names in ONNX must be Unicode and not empty",
        "note: \\ud800: it is named '\\ud800', because names in ONNX must be Unicode and not empty",
    ]
    onnx.checker.check_model(str(tmp_path / "w.onnx"), full_check=True)
    assert list(OnnxReader().read(tmp_path / "w.onnx")) == ["unnamed_1", "unnamed", "\\ud800"]


def test_shared_parameters_are_written_once(tmp_path):
    write(zoo.shared_parameters(), tmp_path / "w.onnx")
    stored = [i.name for i in onnx.load(tmp_path / "w.onnx").graph.initializer]
    assert stored.count("scale of owner") == 1
    assert not [name for name in stored if name.startswith("owner_") and "quantized" not in name]
    read = OnnxReader().read(tmp_path / "w.onnx")
    assert read["owner"].quantization.scale is read["scale of owner"]


def test_external_data_are_aligned(tmp_path):
    some = zoo.model(
        [zoo.codes("a", (100,), np.int8), zoo.codes("b", (50,), np.int8), zoo.codes("c", (5000,), np.int8)]
    )
    write(some, tmp_path / "w.onnx", OnnxOptions(external_data=Size(64)))
    graph = onnx.load(tmp_path / "w.onnx", load_external_data=False).graph
    places = {i.name: {e.key: e.value for e in i.external_data} for i in graph.initializer}
    location = {"location": "w.onnx.data"}
    assert places == {
        "a": location | {"offset": "0", "length": "100"},
        "b": {},
        "c": location | {"offset": "4096", "length": "5000"},
    }


def huge(name: str, nbytes: int) -> Tensor:
    def compute(start: int, stop: int) -> np.ndarray:
        raise AssertionError("planning reads no payload")

    return Tensor(name, (nbytes,), np.dtype(np.int8), Computed(nbytes, compute))


def test_large_models_use_external_data_unasked(tmp_path):
    plan = OnnxWriter().plan(zoo.model([huge("a", 1 << 30), huge("b", 1 << 30)]), tmp_path / "w.onnx", OnnxOptions())
    assert [file.path.name for file in plan.files] == ["w.onnx", "w.onnx.data"]
    assert plan.files[1].nbytes == 2 << 30


def test_a_model_that_protobuf_cannot_hold(tmp_path):
    options = OnnxOptions(external_data=Size(4 << 30))
    with pytest.raises(Unsupported, match=r"more than protobuf's 2147483647.*external_data=1M"):
        OnnxWriter().plan(zoo.model([huge("a", 1 << 31)]), tmp_path / "w.onnx", options)


def test_payloads_are_written_in_pieces(tmp_path):
    taken = []

    def compute(start: int, stop: int) -> np.ndarray:
        taken.append(stop - start)
        return np.zeros(stop - start, np.uint8)

    scale = Tensor.from_array("s", np.ones((1, 1), np.float32))
    tensor = Tensor(
        "w", (4096, 8192), np.dtype(ml_dtypes.int4), Computed(1 << 24, compute), Quantization(scale, (4096, 8192))
    )
    write(zoo.model([tensor]), tmp_path / "w.onnx")
    assert (sum(taken), max(taken)) == (1 << 24, 1 << 20)


def test_external_data_beside_a_name_that_is_not_unicode(tmp_path):
    some = zoo.model([zoo.codes("w", (100,), np.int8)])
    target = Path("\udcff.onnx")
    with pytest.raises(UsageError, match="is not Unicode"):
        OnnxWriter().plan(some, target, OnnxOptions(external_data=Size(1)))
    assert OnnxWriter().plan(some, target, OnnxOptions()).files[0].path == target


def test_an_empty_model(tmp_path):
    write(zoo.model([]), tmp_path / "w.onnx")
    onnx.checker.check_model(str(tmp_path / "w.onnx"), full_check=True)
    assert not OnnxReader().read(tmp_path / "w.onnx")


def test_the_zoo_has_what_it_says():
    for tensor in zoo.zoo().values():
        if tensor.quantization is not None and tensor.quantization.group_index is None:
            assert tensor.quantization.scale.shape == grid_shape(tensor.shape, tensor.quantization.block_shape)
    assert replace(zoo.zoo(), losses=()).tensors
