"""torchao's tensors against what torchao itself decodes them to; fixtures/torchao says how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.converters.storage import Data, MappedFile
from nibblecast.formats.encodings.torchao import safetensors_keys
from nibblecast.formats.encodings.torchao.read import Cpu, WrappedTensor, decoded, dynamic_activation_linear
from nibblecast.formats.pytorch.modules.tensor_subclasses import wrapped
from nibblecast.formats.pytorch.pickle.archive import Archive
from nibblecast.formats.pytorch.pickle.files import saved_value
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import SubclassTensor
from nibblecast.formats.safetensors.container import open_container
from tests.formats.encodings.checkpoints import write_file

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[4] / "fixtures" / "torchao"
CASES = sorted(path.stem for path in FIXTURES.glob("*.pt"))
IN_SAFETENSORS = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
CPUS: tuple[Cpu, ...] = ("avx512", "avx2", "generic")

#: Decoded in float32 and rounded to the weight's dtype at the end: the truth is so rounded.
ROUNDED_ONCE = ("float8", "mx", "int4_cpu")


def same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def wrapped_tensors(case: str) -> dict[str, WrappedTensor]:
    state = saved_value(Archive.open(MappedFile.open(FIXTURES / f"{case}.pt")), Limits(0))
    return {name: wrapped(name, value, Limits(0)) for name, value in state.items() if isinstance(value, SubclassTensor)}


def cpu_of(case: str) -> Cpu:
    return next((cpu for cpu in CPUS if case == f"int4_cpu_{cpu}"), "avx512")


def check(case: str, name: str, tensor: Tensor, dtype: str) -> None:
    truth = np.load(FIXTURES / f"{case}.npz")
    is_rounded = any(case.startswith(prefix) for prefix in ROUNDED_ONCE) and case != "mx_nvfp4_0_12"
    wanted: np.ndarray[Any, Any] = truth[f"w/{name}"]
    values = tensor.dequantize(np.dtype(dtype) if is_rounded else np.float32).astype(np.float32)
    assert same_bits(values, wanted), (case, name, np.abs(values - wanted).max())
    if f"c/{name}" in truth:
        assert np.array_equal(tensor.codes(), truth[f"c/{name}"]), (case, name)


@pytest.mark.parametrize("case", CASES)
def test_a_pickled_weight_is_what_torchao_decodes(case: str) -> None:
    for name, tensor in wrapped_tensors(case).items():
        weight, _ = decoded(name, tensor, cpu_of(case))
        assert weight.name == name
        check(case, name, weight, tensor.dtype)


@pytest.mark.parametrize("case", IN_SAFETENSORS)
def test_a_safetensors_file_gives_the_same_weights(case: str) -> None:
    model = nibblecast.load(FIXTURES / f"{case}.safetensors")
    pickled = wrapped_tensors(case)
    assert set(model) >= set(pickled)
    for name, tensor in pickled.items():
        check(case, name, model[name], tensor.dtype)
    truth = np.load(FIXTURES / f"{case}.npz")
    assert {f"w/{name}" for name in model} == {key for key in truth if key.startswith("w/")}


@pytest.mark.parametrize("case", CASES)
def test_any_range_of_bytes_is_part_of_the_whole(case: str) -> None:
    for name, tensor in wrapped_tensors(case).items():
        weight, _ = decoded(name, tensor, cpu_of(case))
        for data in weight.stored():
            whole = data.read(0, data.nbytes)
            assert whole.size == data.nbytes
            if data.nbytes > 8:
                step = 8  # whole elements, of whichever dtype
                middle = data.nbytes // 2 // step * step
                for start, stop in ((0, step), (middle, middle + step), (0, middle), (middle, middle)):
                    stop = min(stop, data.nbytes)
                    assert np.array_equal(data.read(start, stop), whole[start:stop]), name
        values = weight.dequantize(np.float32)
        assert same_bits(
            np.concatenate([part.dequantize().reshape(-1) for part in weight.parts(64)]), values.reshape(-1)
        )


def test_nothing_is_read_until_it_is_asked_for() -> None:
    reads: list[tuple[int, int]] = []

    class Recording(Data):
        def __init__(self, data: Any) -> None:
            self.data, self.nbytes = data, data.nbytes

        def read(self, start: int, stop: int) -> Any:
            reads.append((start, stop))
            return self.data.read(start, stop)

    for case in CASES:
        for name, tensor in wrapped_tensors(case).items():
            recorded = {
                role: replace(value, data=Recording(value.data)) if isinstance(value, Tensor) else value
                for role, value in tensor.attributes.items()
            }
            decoded(name, replace(tensor, attributes=recorded), cpu_of(case))
    assert not reads


def test_what_is_assumed_of_the_machine_is_a_loss() -> None:
    tensors = wrapped_tensors("int4_cpu_avx2")
    _, losses = decoded("w", tensors["float32.weight"], "avx2")
    assert [loss.kind for loss in losses] == ["reinterpreted"]
    assert "in the order of avx2" in losses[0].detail
    (tile,) = wrapped_tensors("int4_tile_packed").values()
    assert [loss.kind for loss in decoded("w", tile)[1]] == ["reinterpreted"]


def test_the_cpus_differ() -> None:
    weight = wrapped_tensors("int4_cpu_avx512")["float32.weight"]
    codes = [decoded("w", weight, cpu)[0].codes().tobytes() for cpu in CPUS]
    assert len(set(codes)) == 3


def test_what_is_done_to_the_activation_is_a_loss() -> None:
    tensors = wrapped_tensors("affine_quantized_wrapped")
    assert decoded("w", tensors["dynamic.weight"])[1] == ()
    assert [loss.kind for loss in decoded("w", tensors["scaled.weight"])[1]] == ["dropped"]
    int8 = wrapped_tensors("int8")["row.weight"]
    scaled = replace(int8, attributes={**int8.attributes, "act_pre_scale": plain(np.ones(40, np.float32))})
    assert [loss.kind for loss in decoded("w", scaled)[1]] == ["dropped"]


@pytest.mark.parametrize(
    ("class_name", "words"),
    [("Int4PreshuffledTensor", "shuffled"), ("UIntxBitPackedTensor", "gemlite"), ("NewTensor", "not known")],
)
def test_classes_that_are_not_read_are_named(class_name: str, words: str) -> None:
    with pytest.raises(Unsupported, match=f"tensor 'fc.weight': is a torchao {class_name}, .*{words}.*: save"):
        decoded("fc.weight", WrappedTensor(class_name, (4, 4), "float32", {}))


def test_implementations_that_are_not_read_are_named() -> None:
    tensor = wrapped_tensors("affine_quantized")["int4.weight"]
    for class_name in ("MarlinSparseAQTTensorImpl", "Other"):
        impl = replace(tensor.attributes["tensor_impl"], class_name=class_name)
        with pytest.raises(Unsupported, match=class_name):
            decoded("w", replace(tensor, attributes={**tensor.attributes, "tensor_impl": impl}))


def test_a_code_outside_its_dtype_is_an_error_when_it_is_read() -> None:
    tensor = wrapped_tensors("intx")["int4_bfloat16.weight"]
    codes = np.full(tensor.shape, 9, np.int8)
    weight, _ = decoded("fc.weight", replace(tensor, attributes={**tensor.attributes, "qdata": plain(codes)}))
    with pytest.raises(CorruptFile, match="tensor 'fc.weight': has the code 9"):
        weight.codes()


def test_the_module_of_legacy_quantization_aware_training() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (3, 64)).astype(np.int8)
    scales, zeros = rng.random((3, 2), np.float32), rng.integers(-8, 8, (3, 2)).astype(np.float32)
    tensor = dynamic_activation_linear("fc.weight", plain(weight), plain(scales), plain(zeros))
    wanted = (weight - zeros.repeat(32, 1)) * scales.repeat(32, 1)
    assert tensor.dtype == ml_dtypes.int4
    assert same_bits(tensor.dequantize(), wanted)
    with pytest.raises(CorruptFile, match="5 groups of 64 columns"):
        dynamic_activation_linear("fc.weight", plain(weight), plain(np.ones((3, 5), np.float32)), plain(zeros))


def plain(array: np.ndarray[Any, Any]) -> Tensor:
    return Tensor.from_array("part", array)


HOSTILE: list[Any] = [
    None, True, 0, -1, 3, 1 << 70, 0.5, float("nan"), "", "int4", "float8_e4m3fn", (), (1,), (1, 1), (0, 32), (1, -1),
    (1, "2"), (1 << 70, 1), plain(np.zeros(0, np.float32)), plain(np.zeros((), np.int8)),
    plain(np.zeros((6, 64), np.uint8)), plain(np.zeros((6, 64), np.complex64)), plain(np.zeros((6, 2), np.bool_)),
    plain(np.zeros((1, 1, 1, 1), np.int32)), plain(np.zeros((2, 6), ml_dtypes.float8_e8m0fnu)),
    plain(np.zeros((6, 2), ml_dtypes.float4_e2m1fn)), plain(np.zeros((6, 1), ml_dtypes.int4)),
    WrappedTensor("UintxTensor", (6, 64), "uint8", {}),
]  # fmt: skip
EVERY = [(case, name, tensor) for case in CASES for name, tensor in wrapped_tensors(case).items()]


def places(tensor: WrappedTensor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for role, value in tensor.attributes.items():
        yield (*path, role)
        if isinstance(value, WrappedTensor):
            yield from places(value, (*path, role))


def with_value(tensor: WrappedTensor, path: tuple[str, ...], value: Any) -> WrappedTensor:
    role, *rest = path
    inner = with_value(tensor.attributes[role], tuple(rest), value) if rest else value
    return replace(tensor, attributes={**tensor.attributes, role: inner})


def survives(tensor: WrappedTensor) -> None:
    """Whatever comes of it is a tensor that can be read, or an error for people."""
    try:
        weight, losses = decoded("w", tensor)
        assert all(isinstance(loss, Loss) for loss in losses)
        assert weight.shape == tensor.shape
        weight.dequantize()
    except Error as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("case", CASES)
def test_hostile_attributes_are_errors(case: str) -> None:
    for tensor in wrapped_tensors(case).values():
        for path in places(tensor):
            for value in HOSTILE:
                survives(with_value(tensor, path, value))
        for shape in ((), (0,), (6,), (6, 0), (64, 6), (6, 64, 1), (1 << 40, 1 << 40), (-1, 64)):
            survives(replace(tensor, shape=shape))
        for dtype in ("", "float64", "int8", "float16"):
            survives(replace(tensor, dtype=dtype))


@given(st.data())
@settings(max_examples=200)
def test_several_hostile_attributes_are_errors(data: st.DataObject) -> None:
    _, _, tensor = data.draw(st.sampled_from(EVERY))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(places(tensor))))
        small = st.integers(-2, 300)
        hostile = st.sampled_from(HOSTILE) | small | st.lists(small, max_size=4).map(tuple)
        if len(path) == 1 or isinstance(tensor.attributes.get(path[0]), WrappedTensor):
            tensor = with_value(tensor, path[:1] if len(path) > 1 else path, data.draw(hostile))
    if data.draw(st.booleans()):
        _, _, other = data.draw(st.sampled_from(EVERY))
        tensor = replace(tensor, class_name=other.class_name)
    survives(tensor)


@given(st.sampled_from(EVERY), st.sampled_from(EVERY))
@settings(max_examples=200)
def test_attributes_of_another_class_are_errors(
    one: tuple[str, str, WrappedTensor], other: tuple[str, str, WrappedTensor]
) -> None:
    survives(replace(one[2], attributes={**one[2].attributes, **other[2].attributes}))


def stored(case: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, as they are stored."""
    path = FIXTURES / f"{case}.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    from nibblecast.formats.safetensors.container import open_container

    entries = open_container(MappedFile.open(path)).entries
    return {key: Tensor(key, e.shape, e.dtype, e.data) for key, e in entries.items()}, metadata


def changed(metadata: Mapping[str, str], name: str, **entry: Any) -> dict[str, str]:
    return {**metadata, name: json.dumps(json.loads(metadata[name]) | entry)}


def test_the_keys_of_torchao_0_14() -> None:
    tensors, metadata = stored("float8")
    tensors["norm.bias"] = plain(np.ones(3, np.float32))
    metadata |= {"norm.bias": '{"_type": "Tensor"}'}
    old, names = {}, json.loads(metadata["tensor_names"])
    for key, tensor in tensors.items():
        module, dot, rest = key.rpartition("._weight_")
        old[f"{module}.weight:{rest}" if dot else f"{key}:_data"] = tensor
    for name in names:
        entry = json.loads(metadata[name])
        del entry["_tensor_data_names"]
        metadata[name] = json.dumps(entry)
    metadata["tensor_names"] = json.dumps([*names, "norm.bias"])
    assert safetensors_keys.describes(metadata)
    model, _ = safetensors_keys.grouped(old, metadata)
    assert set(model) == {*names, "norm.bias"}
    for name, tensor in wrapped_tensors("float8").items():
        check("float8", name, model[name], tensor.dtype)


def test_a_part_of_a_model_is_read_with_the_metadata_of_all_of_it() -> None:
    tensors, metadata = stored("intx")
    some = {key: tensor for key, tensor in tensors.items() if key.startswith("int4_bfloat16")}
    assert list(safetensors_keys.grouped(some, metadata)[0]) == ["int4_bfloat16.weight"]


def test_metadata_and_tensors_that_disagree_are_errors() -> None:
    tensors, metadata = stored("intx")
    name = "int4_bfloat16.weight"
    incomplete = {key: tensor for key, tensor in tensors.items() if key != "int4_bfloat16._weight_scale"}
    data = json.loads(metadata[name])["_data"]
    for given_tensors, given_metadata in (
        (incomplete, metadata),
        ({**tensors, name: plain(np.ones(1, np.float32))}, metadata),
        (tensors, changed(metadata, name, _type=3)),
        (tensors, changed(metadata, name, _data=None)),
        (tensors, changed(metadata, name, _data={**data, "block_size": [1, 7]})),
        (tensors, changed(metadata, name, _data={**data, "target_dtype": {"_type": "torch.dtype", "_data": "int99"}})),
        (tensors, changed(metadata, name, _tensor_data_names=[])),
        (tensors, changed(metadata, name, _tensor_data_names=["qdata"])),
        (tensors, {**metadata, name: "{"}),
    ):
        with pytest.raises(CorruptFile, match=f"tensor '{name}'"):
            safetensors_keys.grouped(given_tensors, given_metadata)
    with pytest.raises(Unsupported, match="OtherTensor"):
        safetensors_keys.grouped(tensors, changed(metadata, name, _type="OtherTensor"))


@pytest.mark.parametrize("names", ["", "[", "{}", "[1]", "[]", '["other"]', '"norm.weight"', "[" * 5000])
def test_metadata_of_others_is_none_of_torchao(names: str) -> None:
    assert not safetensors_keys.describes({"tensor_names": names, "norm.weight": "{}"})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    st.sampled_from(["block_size", "target_dtype", "dtype", "shape", "zero_point", "qdata"]),
)
@settings(max_examples=200)
def test_hostile_metadata_are_errors(value: Any, role: str) -> None:
    tensors, metadata = stored("intx")
    name = "int4_bfloat16.weight"
    data = json.loads(metadata[name])["_data"]
    try:
        model, _ = safetensors_keys.grouped(tensors, changed(metadata, name, _data={**data, role: value}))
        model[name].dequantize()
    except Error as error:
        assert "\n" not in str(error)


def test_tensors_that_wrap_themselves_are_an_error() -> None:
    endless = SubclassTensor("LinearActivationQuantizedTensor", (1, 1), "float32", {})
    endless.attributes["original_weight_tensor"] = endless
    with pytest.raises(CorruptFile, match="tensor 'w': wraps tensors more than 8 deep"):
        wrapped("w", endless, Limits(0))


def test_attributes_that_are_no_attributes_are_harmless() -> None:
    made = wrapped(
        "w", SubclassTensor("Int8Tensor", (1, 1), "float32", {"kwargs": {}, "3": [[1], {}], "bytes": b"x"}), Limits(0)
    )
    assert made.attributes == {"kwargs": "dict", "3": ("list", "dict"), "bytes": "bytes"}


@pytest.mark.parametrize("whole_model_in_each", [True, False])
def test_shards_list_their_own_tensors_or_the_models(whole_model_in_each: bool, tmp_path: Path) -> None:
    source = FIXTURES / "intx.safetensors"
    container = open_container(MappedFile.open(source))
    names = json.loads(container.metadata["tensor_names"])
    for number, own in enumerate((names[:3], names[3:])):
        keys = [key for key in container.entries if key.partition(".")[0] in {name.partition(".")[0] for name in own}]
        metadata = dict(container.metadata)
        if not whole_model_in_each:
            metadata = {name: container.metadata[name] for name in own} | {"tensor_names": json.dumps(own)}
        arrays = {
            key: container.entries[key]
            .data.read(0, container.entries[key].data.nbytes)
            .view(entry.dtype)
            .reshape(entry.shape)
            for key, entry in container.entries.items()
            if key in keys
        }
        write_file(tmp_path / f"model-{number}.safetensors", arrays, metadata)
    assert nibblecast.verify(source, tmp_path).equal


def test_the_linear_of_the_first_qat_flow_is_recognised_by_its_keys(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (6, 64)).astype(np.int8)
    scales, zeros = random.random((6, 2)).astype(np.float32), random.integers(-3, 3, (6, 2)).astype(np.float32)
    tensors = {"fc.weight": codes, "fc.scales": scales, "fc.zeros": zeros, "other.weight": codes}
    model = nibblecast.load(write_file(tmp_path / "m.safetensors", tensors))
    assert set(model) == {"other.weight", "fc.weight"}
    values = (codes.astype(np.float32) - zeros.repeat(32, 1)) * scales.repeat(32, 1)
    np.testing.assert_array_equal(model["fc.weight"].codes(), codes)
    np.testing.assert_array_equal(model["fc.weight"].dequantize(), values)
    assert model["other.weight"].quantization is None
