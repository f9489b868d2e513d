"""The options of TFLite's operators: one table of each operator's fields, by schema.fbs 3d (google-ai-edge/LiteRT,
2026-08). A field that is absent from a file has its default.

Dozens of operators have options. In a table of text, each takes about one line. As a class like those of `schema`, each
would take about ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import UINT8
from nibblecast.formats.tflite.flatbuffer import Table


@dataclass(frozen=True, slots=True)
class OptionField:
    """A field: its slot, its `struct` format ("[i" and "[f" are vectors of 32-bit elements), and its default."""

    slot: int
    format: str
    default: float = 0


def _fields(text: str) -> Mapping[str, OptionField]:
    """Fields in the schema's order: `name:format` or `name:format=default`; a "-" skips a slot."""
    fields = {}
    for slot, word in enumerate(text.split()):
        if word != "-":
            name, _, rest = word.partition(":")
            format, _, default = rest.partition("=")
            fields[name] = OptionField(slot, format, float(default or 0))
    return MappingProxyType(fields)


_POOL = "padding:b stride_w:i stride_h:i filter_width:i filter_height:i fused_activation:b"
_REDUCE = "keep_dims:?"
_FUSED = "fused_activation:b"
_CONV_3D = (
    "padding:b stride_d:i stride_w:i stride_h:i fused_activation:b dilation_d_factor:i=1 dilation_w_factor:i=1 "
    "dilation_h_factor:i=1"
)

OPTIONS: Mapping[str, Mapping[str, OptionField]] = MappingProxyType(
    {
        name: _fields(text)
        for name, text in {
            "ADD": "fused_activation:b pot_scale_int16:?=1",
            "ARG_MAX": "output_type:b",
            "ARG_MIN": "output_type:b",
            "AVERAGE_POOL_2D": _POOL,
            "BATCH_MATMUL": "adj_x:? adj_y:? asymmetric_quantize_inputs:?",
            "BUCKETIZE": "boundaries:[f",
            "CALL_ONCE": "init_subgraph_index:i",
            "CAST": "in_data_type:b out_data_type:b",
            "CONCATENATION": "axis:i fused_activation:b",
            "CONV_2D": "padding:b stride_w:i stride_h:i fused_activation:b dilation_w_factor:i=1 dilation_h_factor:i=1",
            "CONV_3D": _CONV_3D,
            "CONV_3D_TRANSPOSE": _CONV_3D,
            "CUMSUM": "exclusive:? reverse:?",
            "DEPTHWISE_CONV_2D": (
                "padding:b stride_w:i stride_h:i depth_multiplier:i fused_activation:b dilation_w_factor:i=1 "
                "dilation_h_factor:i=1"
            ),
            "DEPTH_TO_SPACE": "block_size:i",
            "DIV": _FUSED,
            "FAKE_QUANT": "min:f max:f num_bits:i narrow_range:?",
            "FULLY_CONNECTED": "fused_activation:b weights_format:b keep_num_dims:? asymmetric_quantize_inputs:?",
            "GATHER": "axis:i batch_dims:i",
            "GELU": "approximate:?",
            "IF": "then_subgraph_index:i else_subgraph_index:i",
            "L2_NORMALIZATION": _FUSED,
            "L2_POOL_2D": _POOL,
            "LEAKY_RELU": "alpha:f",
            "LOCAL_RESPONSE_NORMALIZATION": "radius:i bias:f alpha:f beta:f",
            "LSTM": "fused_activation:b cell_clip:f proj_clip:f kernel_type:b",
            "MAX_POOL_2D": _POOL,
            "MEAN": _REDUCE,
            "MIRROR_PAD": "mode:b",
            "MUL": _FUSED,
            "ONE_HOT": "axis:i",
            "PACK": "values_count:i axis:i",
            "REDUCE_ALL": _REDUCE,
            "REDUCE_ANY": _REDUCE,
            "REDUCE_MAX": _REDUCE,
            "REDUCE_MIN": _REDUCE,
            "REDUCE_PROD": _REDUCE,
            "RESHAPE": "new_shape:[i",
            "RESIZE_BILINEAR": "- - align_corners:? half_pixel_centers:?",
            "RESIZE_NEAREST_NEIGHBOR": "align_corners:? half_pixel_centers:?",
            "REVERSE_SEQUENCE": "seq_dim:i batch_dim:i",
            "SHAPE": "out_type:b",
            "SOFTMAX": "beta:f",
            "SPACE_TO_DEPTH": "block_size:i",
            "SPLIT": "num_splits:i",
            "SPLIT_V": "num_splits:i",
            "SQUEEZE": "squeeze_dims:[i",
            "STABLEHLO_COMPOSITE": "name:s decomposition_subgraph_index:i",
            "STRIDED_SLICE": "begin_mask:i end_mask:i ellipsis_mask:i new_axis_mask:i shrink_axis_mask:i offset:?",
            "SUB": "fused_activation:b pot_scale_int16:?=1",
            "SUM": _REDUCE,
            "SVDF": "rank:i fused_activation:b",
            "TRANSPOSE_CONV": "padding:b stride_w:i stride_h:i fused_activation:b",
            "UNIDIRECTIONAL_SEQUENCE_LSTM": "fused_activation:b cell_clip:f proj_clip:f time_major:?",
            "UNPACK": "num:i axis:i",
            "VAR_HANDLE": "container:s shared_name:s",
            "WHILE": "cond_subgraph_index:i body_subgraph_index:i",
        }.items()
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The options of one operator, read at each access. `table` is None if the file has none."""

    operator: str
    table: Table | None

    def integer(self, name: str) -> int:
        """An integer field, or a bool as 0 or 1. Raises CorruptFile if it lies outside the file."""
        return int(self._scalar(name))

    def number(self, name: str) -> float:
        """A float field."""
        return float(self._scalar(name))

    def integers(self, name: str) -> list[int] | None:
        """A vector of integers; None if it is absent."""
        values = self._vector(name, "<i4")
        return None if values is None else [int(value) for value in values]

    def numbers(self, name: str) -> list[float]:
        """A vector of floats; empty if it is absent."""
        values = self._vector(name, "<f4")
        return [] if values is None else [float(value) for value in values]

    def _vector(self, name: str, dtype: str) -> NDArray[Any] | None:
        position = self._position(name)
        if self.table is None or position is None:
            return None
        buffer = self.table.flatbuffer
        values: NDArray[Any] = buffer.array(buffer.follow(position), np.dtype(dtype))
        buffer.spend(values.nbytes)
        return values

    def text(self, name: str) -> str:
        """A string; empty if it is absent."""
        position = self._position(name)
        if self.table is None or position is None:
            return ""
        buffer = self.table.flatbuffer
        characters = buffer.array(buffer.follow(position), UINT8)
        buffer.spend(characters.size)
        return characters.tobytes().decode("utf-8", "backslashreplace")

    def _scalar(self, name: str) -> float:
        field, position = OPTIONS[self.operator][name], self._position(name)
        if self.table is None or position is None:
            return field.default
        return self.table.flatbuffer.unpack(field.format, position)

    def _position(self, name: str) -> int | None:
        return None if self.table is None else self.table.position_of(OPTIONS[self.operator][name].slot)
