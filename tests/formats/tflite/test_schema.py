"""The schema against the official Python classes: PyPI's `tflite` 2.18, and `ai-edge-litert` for what it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import flatbuffers
import ml_dtypes
import numpy as np
import pytest
import tflite

from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.flatbuffer import Field, Table
from tests.formats.tflite.models import MODELS, fixture, serialize

#: Fields that have a name of their own here: the union's alternatives, and a name that reads better.
OFFICIAL_NAMES = {
    "blockwise": "Details",
    "multi_axis": "Details",
    "segments_type": "ArraySegmentsType",
    "segments_int32": "ArraySegments",
    "segments_uint16": "ArraySegments",
    "segments_uint8": "ArraySegments",
    "indices_type": "ArrayIndicesType",
    "indices_int32": "ArrayIndices",
    "indices_uint16": "ArrayIndices",
    "indices_uint8": "ArrayIndices",
    "batch_matmul_options": "BuiltinOptions",
    "builtin_options_2": "BuiltinOptions2",
}
#: What `tflite` 2.18 does not have.
NEWER = {
    "BlockwiseQuantization",
    "MultiAxisQuantization",
    "ExternalBuffer",
    "ExternalBufferGroup",
    "Tensor.external_buffer",
    "Model.external_buffer_groups",
    "Model.external_buffers",
}


def fields_of(kind: type[Table]) -> dict[str, Field[Any]]:
    return {name: value for name, value in vars(kind).items() if isinstance(value, Field)}


def all_fields() -> Iterator[tuple[type[Table], str]]:
    for kind in vars(schema).values():
        if isinstance(kind, type) and issubclass(kind, Table) and kind is not Table:
            for name in fields_of(kind):
                yield kind, name


def official_name(field: str) -> str:
    return OFFICIAL_NAMES.get(field) or re.sub(r"(?:^|_)([a-z])", lambda match: match[1].upper(), field)


def str_of(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


EMPTY = serialize({})
FIELDS = list(all_fields())
OLD = [(kind, name) for kind, name in FIELDS if not {kind.__name__, f"{kind.__name__}.{name}"} & NEWER]
NEW = [each for each in FIELDS if each not in OLD]


def slots_written(module: ModuleType, kind: type[Table], name: str) -> list[int]:
    """The slots that are present in a table in which the official builder has set that one field."""
    default = getattr(kind.root(np.frombuffer(EMPTY, np.uint8)), name)
    builder = flatbuffers.Builder(64)
    value = builder.CreateString("x")  # stands for any vector or table
    if default is not None and default != []:
        value = not default  # every scalar has 0 or 1 for default, and so it is written
    getattr(module, f"{kind.__name__}Start")(builder)
    getattr(module, f"{kind.__name__}Add{official_name(name)}")(builder, value)
    builder.Finish(getattr(module, f"{kind.__name__}End")(builder))
    table = kind.root(np.frombuffer(bytes(builder.Output()), np.uint8))
    return [slot for slot in range(64) if table.position_of(slot) is not None]


@pytest.mark.parametrize(("kind", "name"), OLD, ids=str_of)
def test_every_field_has_the_official_slot(kind: type[Table], name: str) -> None:
    assert slots_written(tflite, kind, name) == [getattr(kind, name).slot]


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=str_of)
def test_every_field_has_the_slot_that_litert_gives_it(kind: type[Table], name: str) -> None:
    from ai_edge_litert import schema_py_generated

    assert slots_written(schema_py_generated, kind, name) == [getattr(kind, name).slot]


def test_only_what_tflite_2_18_lacks_is_left_to_litert() -> None:
    for kind, name in NEW:
        assert not hasattr(tflite, f"{kind.__name__}Add{official_name(name)}")


def assert_same_default(module: ModuleType, kind: type[Table], name: str) -> None:
    theirs = getattr(module, kind.__name__).GetRootAs(EMPTY, 0)
    ours = getattr(kind.root(np.frombuffer(EMPTY, np.uint8)), name)
    official = official_name(name)
    if isinstance(ours, list) or hasattr(theirs, f"{official}AsNumpy"):
        assert getattr(theirs, f"{official}Length")() == 0
        assert ours is None or ours == []
    else:
        assert getattr(theirs, official)() == ours


@pytest.mark.parametrize(("kind", "name"), OLD, ids=str_of)
def test_every_absent_field_has_the_official_default(kind: type[Table], name: str) -> None:
    assert_same_default(tflite, kind, name)


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "name"), NEW, ids=str_of)
def test_every_absent_field_has_the_default_that_litert_gives_it(kind: type[Table], name: str) -> None:
    from ai_edge_litert import schema_py_generated

    assert_same_default(schema_py_generated, kind, name)


UNIONS = {"blockwise", "multi_axis", "batch_matmul_options"} | {
    f"{part}_{kind}" for part in ("segments", "indices") for kind in ("int32", "uint16", "uint8")
}


def assert_same_table(ours: Table, theirs: Any, seen: set[tuple[str, str]]) -> None:
    """Every field of our class has the value that the official accessor gives; `seen` collects the fields compared."""
    for name in fields_of(type(ours)):
        official = official_name(name)
        if name in UNIONS | {"builtin_code"} or not hasattr(theirs, official):
            continue  # tflite 2.18 gives the older code where the newer one is below 127
        value = getattr(ours, name)
        if isinstance(value, list):
            assert len(value) == getattr(theirs, f"{official}Length")()
            for i, item in enumerate(value):
                assert_same_table(item, getattr(theirs, official)(i), seen)
        elif isinstance(value, np.ndarray):
            expected = getattr(theirs, f"{official}AsNumpy")()
            if value.size:
                assert value.dtype == expected.dtype
                assert np.array_equal(value, expected)
            else:
                assert getattr(theirs, f"{official}Length")() == 0
        elif isinstance(value, Table):
            assert_same_table(value, getattr(theirs, official)(), seen)
        elif isinstance(value, str):
            assert value.encode() == getattr(theirs, official)()
        elif value is not None:
            assert value == getattr(theirs, official)()
        if value is not None:
            seen.add((type(ours).__name__, name))


def test_every_fixture_reads_as_with_the_official_accessors() -> None:
    seen: set[tuple[str, str]] = set()
    for name in MODELS:
        content = fixture(f"{name}.tflite")
        ours = schema.Model.root(np.frombuffer(content, np.uint8))
        assert_same_table(ours, tflite.Model.GetRootAs(content, 0), seen)
    kinds = {"Model", "SubGraph", "Tensor", "QuantizationParameters", "Operator", "OperatorCode", "Buffer"}
    assert kinds <= {kind for kind, _ in seen}
    assert {("DimensionMetadata", "segments_type"), ("SparsityParameters", "block_map")} <= seen


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        (schema.Int32Vector, "Int32Vector", np.int32),
        (schema.Uint16Vector, "Uint16Vector", np.uint16),
        (schema.Uint8Vector, "Uint8Vector", np.uint8),
    ],
)
def test_vectors_of_sparse_indices_have_the_official_width(kind: Any, name: str, dtype: type) -> None:
    builder = flatbuffers.Builder(64)
    vector = builder.CreateNumpyVector(np.array([1, 2, 255], dtype))
    getattr(tflite, f"{name}Start")(builder)
    getattr(tflite, f"{name}AddValues")(builder, vector)
    builder.Finish(getattr(tflite, f"{name}End")(builder))
    content = bytes(builder.Output())
    values = kind.root(np.frombuffer(content, np.uint8)).values
    official = getattr(tflite, name).GetRootAs(content, 0).ValuesAsNumpy()
    assert values.dtype == official.dtype
    assert values.tolist() == official.tolist() == [1, 2, 255]


def enum(official: Any) -> dict[str, int]:
    return {name: value for name, value in vars(official).items() if name.isupper() and isinstance(value, int)}


def test_operators_have_the_official_codes() -> None:
    official = enum(tflite.BuiltinOperator)
    assert {name: schema.BUILTIN_OPERATORS.index(name) for name in official} == official
    assert schema.BUILTIN_OPERATORS.index("CUSTOM") == schema.CUSTOM


def test_tensor_types_have_the_official_numbers() -> None:
    official = enum(tflite.TensorType)
    assert {name: schema.TENSOR_TYPES.index(name) for name in official} == official


def test_the_types_of_unions_have_the_official_numbers() -> None:
    vectors = vars(tflite.SparseIndexVector)
    assert [vectors[name] for name in ("Int32Vector", "Uint16Vector", "Uint8Vector")] == [1, 2, 3]
    assert tflite.BuiltinOptions.BatchMatMulOptions == schema.BatchMatMulOptions.TYPE
    assert (tflite.DimensionType.DENSE, tflite.DimensionType.SPARSE_CSR) == (0, 1)


@pytest.mark.peers
def test_all_numbers_are_those_of_litert() -> None:
    from ai_edge_litert import schema_py_generated as litert

    assert dict(enumerate(schema.TENSOR_TYPES)) == {value: name for name, value in enum(litert.TensorType).items()}
    assert dict(enumerate(schema.BUILTIN_OPERATORS)) == {
        value: name for name, value in enum(litert.BuiltinOperator).items()
    }
    assert litert.QuantizationDetails.BlockwiseQuantization == schema.BlockwiseQuantization.TYPE
    assert litert.QuantizationDetails.MultiAxisQuantization == schema.MultiAxisQuantization.TYPE


def test_every_type_of_numbers_has_its_dtype() -> None:
    assert set(schema.TENSOR_TYPES) - set(schema.DTYPES) == {"STRING", "RESOURCE", "VARIANT"}
    assert all(dtype.name == name.lower() for name, dtype in schema.DTYPES.items())
    assert schema.DTYPES["INT4"] == ml_dtypes.int4
    assert schema.DTYPES["COMPLEX128"].itemsize == 16
