"""TensorProto's payload -> the IR's data, mapped if its bytes are already in the canonical order.

raw_data is little-endian and row-major; 4- and 2-bit types are packed low bits first. An entry of int32_data holds one
element, or one packed *byte* of a 4- or 2-bit type (onnx.proto, and the ONNX node tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import SUB_BYTE, bits_of
from nibblecast.converters.arithmetic.packing import packed_size
from nibblecast.converters.errors import CorruptFile, Unsupported, located
from nibblecast.converters.input.allowance import Allowance
from nibblecast.converters.input.containment import contained_file
from nibblecast.converters.ir import Tensor
from nibblecast.converters.storage import Data, InMemory, MappedFile
from nibblecast.formats.onnx.file.graph import CARRIED, TensorHeader
from nibblecast.formats.onnx.file.schema import DTYPES, ELEMENT_TYPES, STRING
from nibblecast.formats.onnx.file.wire import Range, count_varints, unpack_varints

_FIXED_WIDTH = {"float_data": 4, "double_data": 8}


@dataclass(slots=True, eq=False)
class _Varints(Data):
    """Elements that the file has as protobuf varints, decoded when they are first read.

    Varints have different lengths, so a part of them cannot be found without decoding all before it. Hence the whole is
    decoded at once and kept."""

    view: memoryview
    ranges: list[Range]
    width: int
    nbytes: int
    decoded: NDArray[np.uint8] | None = field(default=None)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        if self.decoded is None:
            parts = [unpack_varints(self.view, where).astype(f"<u{self.width}") for where in self.ranges]
            self.decoded = np.concatenate([part.view(np.uint8) for part in parts])
        return self.decoded[start:stop]


class PayloadTensors:
    """Makes the tensors of one model file and maps each file of external data once. `carried` are payloads outside any
    file, by the offset that external data at CARRIED gives. `allowance` is the model's."""

    def __init__(
        self, file: MappedFile, carried: Mapping[int, Tensor] | None = None, allowance: Allowance | None = None
    ) -> None:
        self.file = file
        self.carried = carried or {}
        self.view = file.view.data
        self.external: dict[str, MappedFile] = {}
        self.allowance = allowance or Allowance(file.view.size)
        self._claims = self.allowance.rest()
        self._known: dict[int, tuple[TensorHeader, Data]] = {}

    def tensor(self, header: TensorHeader, shape: tuple[int, ...] | None = None) -> Tensor:
        """The plain tensor of a header, in another shape of the same size if `shape` is given. Raises CorruptFile if
        the payload's size does not match dims, Unsupported for an unknown element type."""
        dtype = DTYPES.get(header.data_type)
        if dtype is None:
            what = "strings" if header.data_type == STRING else f"elements of ONNX type {header.data_type}"
            raise Unsupported(f"holds {what}, which cannot be read", tensor=header.name)
        if id(header) not in self._known:  # many weights may share scales, and counting varints takes time
            with located(tensor=header.name):
                data = self._data(header, dtype, packed_size(prod(header.dims), bits_of(dtype)))
            self._known[id(header)] = (header, data)
        return Tensor(header.name, header.dims if shape is None else shape, dtype, self._known[id(header)][1])

    def _data(self, header: TensorHeader, dtype: np.dtype[Any], nbytes: int) -> Data:
        if header.external is not None:
            return self._external(header.external, nbytes)
        raw = header.record.ranges("raw_data")
        if raw:
            if raw[-1].nbytes != nbytes:
                raise CorruptFile(
                    f"has {raw[-1].nbytes} bytes of raw_data, but dims {header.dims} of {dtype} take {nbytes}"
                )
            return self.file.range(raw[-1].start, nbytes)
        return self._typed(header, dtype, nbytes)

    def _typed(self, header: TensorHeader, dtype: np.dtype[Any], nbytes: int) -> Data:
        name = ELEMENT_TYPES[dtype].typed_field
        ranges = header.record.ranges(name)
        fixed = _FIXED_WIDTH.get(name)
        if fixed is not None:
            found, needed = sum(where.nbytes for where in ranges) // fixed, nbytes // fixed
        else:
            width = 1 if dtype in SUB_BYTE else dtype.itemsize
            found, needed = sum(count_varints(self.view, where) for where in ranges), nbytes // width
        if found != needed:
            raise CorruptFile(f"has {found} entries of {name}, but dims {header.dims} of {dtype} take {needed}")
        if fixed is None and nbytes:
            return _Varints(self.view, ranges, width, nbytes)
        if len(ranges) == 1:
            return self.file.range(ranges[0].start, nbytes)
        return InMemory(np.frombuffer(b"".join(self.view[r.start : r.stop] for r in ranges), np.uint8))

    def _external(self, entries: dict[str, str] | Any, nbytes: int) -> Data:
        location = entries.get("location", "")
        if self.carried and location == CARRIED:
            return self.carried[int(entries["offset"])].data
        file = self.external.get(location)
        if file is None:
            file = self.external[location] = MappedFile.open(contained_file(self.file.path.parent, location))
            self.allowance.include(file.view.size)
            self._claims.include(file.view.size)
        offset, length = (_number(entries, key) for key in ("offset", "length"))
        if length is not None and length != nbytes:
            raise CorruptFile(f"has {length} bytes of external data where its dims take {nbytes}")
        data = file.range(offset or 0, nbytes)
        self._claims.hold(nbytes)  # here too: some payloads are read before the model's tensors are known
        return data


def _number(entries: dict[str, str], key: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CorruptFile(f"external data has {key} '{text[:40]}': a decimal number is needed")
    return int(text)
