"""A small header to read back, and changes of its text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nibblecast.converters.compare.comparison import compare
from nibblecast.converters.errors import Error
from nibblecast.converters.ir import Model, Tensor
from nibblecast.formats.cheader.reader import CHeaderReader
from tests.formats.cheader.c_harness import model_of, write
from tests.formats.cheader.c_zoo import dtype_of, floats, integers, random_codes

LAYOUTS = ("split", "header")
FIXTURES = Path(__file__).parents[3] / "fixtures" / "tflite"
INT4 = FIXTURES / "cnn_int4_per_channel.tflite"


def read(path: Path) -> Model:
    return CHeaderReader().read(path)


def write_small(folder: Path, **options: Any) -> tuple[Path, Model]:
    """A header of quantized and plain tensors, with the lines of each array that there can be."""
    rng = np.random.default_rng(0)
    shape = (6, 40)
    quantized = random_codes(
        "w",
        shape,
        dtype_of("int4"),
        rng,
        scale=floats((6, 2), rng),
        block_shape=(1, 20),
        zero_point=integers((6, 2), rng),
    )
    plain = [random_codes(name, (41,), dtype_of(name), rng) for name in ("uint8", "int8", "int16", "uint32", "int64")]
    reals = [Tensor.from_array(n, rng.normal(0, 1, (5, 9)).astype(n)) for n in ("float16", "float32", "float64")]
    model = model_of(quantized, *plain, *reals)
    write(model, folder / "m.h", **options)
    return folder / "m.h", model


def rewritten(header: Path, change) -> Path:
    """The header, after the text of its .c file was changed."""
    source = header.with_suffix(".c")
    text = source.read_bytes().decode("latin-1")
    changed = change(text)
    assert changed != text
    source.write_bytes(changed.encode("latin-1"))
    return header


def of_array(name: str, change):
    """A change of what is between the braces of one array."""

    def apply(text: str) -> str:
        return re.sub(
            rf"(\b{name}\[\w*\][^={{;]*= \{{)(.*?)(\}};)", lambda m: m[1] + change(m[2]) + m[3], text, flags=re.S
        )

    return apply


def assert_read_back(folder_or_header: Path, model: Model) -> Model:
    """Fails unless the same weights come back, in order, with the same bytes and the same values."""
    weights = {name: t for name, t in model.items() if t.parameter_of not in model}
    again = read(folder_or_header)
    comparison = compare(model, again)
    assert comparison.equal, [str(difference) for difference in comparison.differences[:3]]
    assert list(again) == list(weights)
    for name, tensor in weights.items():
        assert (again[name].dtype, again[name].shape) == (tensor.dtype, tensor.shape), name
        assert (again[name].quantization is None) == (tensor.quantization is None), name
        if tensor.dtype.kind != "f":  # of which one NaN is as good as another
            assert again[name].packed().tobytes() == tensor.packed().tobytes(), name
        if tensor.quantization is not None:
            assert again[name].quantization.block_shape == tensor.quantization.block_shape
            assert again[name].granularity == tensor.granularity
    return again


def read_all(header: Path) -> None:
    for tensor in read(header).values():
        tensor.codes()
        for _, parameter in tensor.quantization.parameters() if tensor.quantization else ():
            parameter.codes()


def refused(header: Path, kind: type[Error], pattern: str) -> None:
    with pytest.raises(kind) as caught:
        read_all(header)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert caught.value.path is not None
    assert "\n" not in str(caught.value)


def damaged(text: bytes, rng: np.random.Generator) -> bytes:
    """Text that was cut, spliced, or of which some bytes are others."""
    place, other, length = (int(n) for n in rng.integers(0, len(text), 3))
    match int(rng.integers(0, 5)):
        case 0:
            return text[:place]
        case 1:
            return text[:place] + text[place + length % 200 :]
        case 2:
            return text[:place] + text[other : other + length % 200] + text[place:]
        case 3:
            marks = b"{}[]()\",;=/*#\\'0x9.-\n \xff"
            changed = bytearray(text)
            for position in rng.integers(0, len(text), 1 + length % 4):
                changed[int(position)] = marks[int(rng.integers(0, len(marks)))]
            return bytes(changed)
        case _:
            numbers = list(re.finditer(rb"\d+", text))
            number = numbers[place % min(300, len(numbers))]
            return text[: number.start()] + str(int(rng.integers(0, 1 << 62))).encode() + text[number.end() :]
