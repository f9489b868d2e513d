"""Fixtures and their broken variants, and small models written from the reader's own schema (which test_schema holds
against the official one)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import flatbuffers.number_types
import numpy as np
from numpy.typing import NDArray

from nibblecast import Model
from nibblecast.formats.tflite import schema
from nibblecast.formats.tflite.flatbuffer import Table

#: What the fixture `load` is.
Load = Callable[..., Model]

FIXTURES = Path(__file__).parents[3] / "fixtures" / "tflite"
MODELS = sorted(path.stem for path in FIXTURES.glob("*.tflite"))

_spec = importlib.util.spec_from_file_location("hostile", FIXTURES / "hostile.py")
assert _spec is not None
assert _spec.loader is not None
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)


def fixture(name: str) -> bytes:
    return (FIXTURES / name).read_bytes()


# ---- patching a file in place --------------------------------------------------------------------


class Patch(hostile.Flat):
    """A copy of a model file in which numbers are overwritten."""

    def __init__(self, name: str) -> None:
        super().__init__(fixture(name))

    def tensor(self, name: str) -> int:
        """Where the table of the first tensor of the first subgraph lies whose name ends so."""
        return next(table for table in self.tensors() if self.text(table, schema.Tensor.name.slot).endswith(name))

    def text(self, table: int, slot: int) -> str:
        place = self.child(table, slot)
        return self.data[place + 4 : place + 4 + self.get("I", place)].decode()

    def quantization(self, name: str) -> int:
        return self.child(self.tensor(name), schema.Tensor.quantization.slot)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


# ---- writing a model -----------------------------------------------------------------------------

Fields = dict[int, Any]


def table(kind: type[Table], **fields: Any) -> Fields:
    """A table of the schema: scalars are NumPy's, vectors arrays, strings str, tables dicts, several lists."""
    return {getattr(kind, name).slot: value for name, value in fields.items()}


def serialize(root: Fields, identifier: bytes = schema.IDENTIFIER) -> bytes:
    """The flatbuffer of a table. An object that appears several times is written once and shared."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(_put(builder, root, {}), file_identifier=identifier)
    return bytes(builder.Output())


def _put(builder: Any, value: Any, known: dict[int, int]) -> int:
    if id(value) not in known:
        known[id(value)] = _WRITERS[type(value)](builder, value, known)
    return known[id(value)]


def _put_table(builder: Any, fields: Mapping[int, Any], known: dict[int, int]) -> int:
    offsets = {slot: _put(builder, value, known) for slot, value in fields.items() if type(value) in _WRITERS}
    builder.StartObject(max(fields, default=0) + 1)
    for slot, value in fields.items():
        if slot in offsets:
            builder.PrependUOffsetTRelativeSlot(slot, offsets[slot], 0)
        else:
            flags = getattr(flatbuffers.number_types, f"{value.dtype.name.capitalize()}Flags")
            builder.PrependSlot(flags, slot, value.item(), None)
    return builder.EndObject()


def _put_list(builder: Any, items: Sequence[Any], known: dict[int, int]) -> int:
    offsets = [_put(builder, item, known) for item in items]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


_WRITERS: dict[type, Callable[[Any, Any, dict[int, int]], int]] = {
    dict: _put_table,
    list: _put_list,
    str: lambda builder, value, _: builder.CreateString(value),
    np.ndarray: lambda builder, value, _: builder.CreateNumpyVector(value),
}


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def affine(scale: Sequence[float], zero_point: Sequence[int] | None = None, axis: int = 0) -> Fields:
    return table(
        schema.QuantizationParameters,
        scale=np.array(scale, np.float32),
        zero_point=np.array([0] * len(scale) if zero_point is None else zero_point, np.int64),
        quantized_dimension=np.int32(axis),
    )


def blockwise(scales: int, block_size: int, zero_points: int | None = -1, **more: Any) -> Fields:
    details = table(schema.BlockwiseQuantization, scales=np.int32(scales), block_size=np.int32(block_size), **more)
    if zero_points is not None:
        details |= table(schema.BlockwiseQuantization, zero_points=np.int32(zero_points))
    return table(
        schema.QuantizationParameters, details_type=np.uint8(schema.BlockwiseQuantization.TYPE), blockwise=details
    )


def constant(name: str, type_name: str, shape: Sequence[int], data: bytes, **more: Any) -> tuple[Fields, bytes]:
    """A tensor and the bytes of its buffer."""
    return tensor(name, type_name, shape, **more), data


def tensor(name: str, type_name: str, shape: Sequence[int], **more: Any) -> Fields:
    kind = np.int8(schema.TENSOR_TYPES.index(type_name))
    return table(schema.Tensor, name=name, type=kind, shape=ints(*shape), **more)


def operator(code: int, inputs: Sequence[int], outputs: Sequence[int], **more: Any) -> Fields:
    return table(schema.Operator, opcode_index=np.uint32(code), inputs=ints(*inputs), outputs=ints(*outputs), **more)


def subgraph(tensors: Sequence[Fields], operators: Sequence[Fields] = (), inputs: Sequence[int] = ()) -> Fields:
    return table(schema.SubGraph, tensors=[*tensors], operators=[*operators], inputs=ints(*inputs))


def model(
    tensors: Sequence[Fields | tuple[Fields, bytes]], operators: Sequence[Fields] = (), codes: Sequence[str] = ()
) -> bytes:
    """A model of one subgraph; `codes` are the names of the operators that `operators` refer to by index."""
    plain, buffers = [], [b""]
    for each in tensors:
        fields = each
        if isinstance(each, tuple):
            fields = each[0] | table(schema.Tensor, buffer=np.uint32(len(buffers)))
            buffers.append(each[1])
        plain.append(fields)
    return whole([subgraph(plain, operators)], buffers, codes)


def whole(subgraphs: Sequence[Fields], buffers: Sequence[bytes], codes: Sequence[str] = (), **more: Any) -> bytes:
    return serialize(
        table(
            schema.Model,
            version=np.uint32(schema.VERSION),
            subgraphs=[*subgraphs],
            buffers=[table(schema.Buffer, data=np.frombuffer(data, np.uint8)) if data else {} for data in buffers],
            operator_codes=[
                table(schema.OperatorCode, builtin_code=np.int32(schema.BUILTIN_OPERATORS.index(code)))
                for code in codes
            ],
            **more,
        )
    )
