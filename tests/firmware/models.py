"""The models that are decoded on every target, and the lines that checksums.c must print for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import ml_dtypes
import numpy as np

from nibblecast.converters.arithmetic.dtypes import is_integer
from nibblecast.converters.ir import Model, Quantization, Tensor, per_axis
from nibblecast.formats.cheader.writer import CHeaderOptions, CHeaderWriter
from nibblecast.formats.tflite.reader import TFLiteReader
from tests import zoo

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
RUNTIME = Path(__file__).parents[2] / "formats" / "cheader" / "templates"

#: Models of real files, and of the zoo what no such file has: codebooks, offsets, group indices, ragged blocks, floats
#: of 4 and 8 bits, zero points of all kinds, codes of 64 bits.
SMALL = (
    "cnn_int4_per_channel mlp_int4_blockwise mlp_int2_per_channel mlp_int4_asymmetric uint4_weights cnn_int8_full "
    "mlp_int16x8 mlp_float16 types_but_float64 schemes wide_codes"
).split()
#: What AVR has no room for: float64 in its `double`, a large table of tensors in its RAM.
LARGE = ("types_zoo", "zoo")

_BLOCK = 64  # of codes, in checksums.c
_ZOO = {"schemes": zoo.schemes, "wide_codes": zoo.wide_codes, "zoo": zoo.zoo}


def model_of(name: str) -> Model:
    """The model without what the writer refuses."""
    if name == "types_but_float64":
        whole = model_of("types_zoo")
        return replace(whole, tensors={key: tensor for key, tensor in whole.items() if tensor.dtype != np.float64})
    model = _ZOO[name]() if name in _ZOO else TFLiteReader().read(FIXTURES / f"{name}.tflite")
    return replace(model, tensors={key: tensor for key, tensor in model.items() if _fits(tensor)})


def _fits(tensor: Tensor) -> bool:
    """No complex values, no integer zero points beyond int32_t."""
    zero_point = None if tensor.quantization is None else tensor.quantization.zero_point
    if zero_point is None or not is_integer(zero_point.dtype):
        return tensor.dtype.kind != "c"
    limits = np.iinfo(np.int32)
    return all(limits.min <= int(code) <= limits.max for code in zero_point.codes().reshape(-1))


def large_flash() -> Model:
    """Three int4 weights of 30000 bytes each: arrays that avr-gcc takes, and more than 64 KiB of them."""
    rng = np.random.default_rng(0)
    shape = (300, 200)
    tensors = {}
    for name in ("first", "second", "third"):
        scale = Tensor.from_array("scale", rng.random((300, 1), np.float32))
        codes = rng.integers(-8, 8, shape).astype(ml_dtypes.int4)
        tensors[name] = Tensor.from_array(name, codes, Quantization(scale, per_axis(shape, 0)))
    return Model(tensors)


def write(model: Model, folder: Path, name: str = "weights", **options: Any) -> list[Path]:
    """The C files to compile, beside the header of this name."""
    plan = zoo.write(CHeaderWriter(), model, folder / f"{name}.h", CHeaderOptions(**options))
    return [file.path for file in plan.files if file.path.suffix == ".c"]


def expected(model: Model, step: int = 1) -> list[str]:
    """What checksums.c prints, from the values that Python decodes."""
    return [_line(tensor, step) for tensor in model.values() if tensor.parameter_of not in model]


def _line(tensor: Tensor, step: int) -> str:
    with np.errstate(all="ignore"):  # float64 reaches beyond float32
        values = tensor.dequantize(np.float32).reshape(-1)
    values = np.where(np.isnan(values), np.float32(np.nan), values)
    name = tensor.name.encode("utf-8", "surrogatepass").partition(b"\0")[0]
    codes = tensor.codes().tobytes() if tensor.bits <= 4 and is_integer(tensor.dtype) else b""
    blocks = b"".join(codes[start : start + _BLOCK] for start in range(0, len(codes), _BLOCK * step))
    return f"{name.hex()} {values.size:08x} {crc32(values[::step].astype('<f4').tobytes()):08x} {crc32(blocks):08x}"
